"""Write a trained detector as ONNX, verified, with a model card (:mod:`.graph` has its network).

The file is written under a temporary name and run by onnxruntime, with the code that serves it, on
pictures in which mmdetection's detector finds something; it gets its name if it finds the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from ..data.reading import BadImageError
from ..deploy.card import page, table
from ..deploy.description import ExportError
from ..deploy.detector import DetectorDescription, ExportedDetector, resized
from ..deploy.export import Different
from ..deploy.graph import traced
from ..deploy.onnx_file import OnnxNetwork, needs, write_program
from ..deploy.source import figures_of
from ..errors import one_line
from ..objects.found import Found
from ..objects.run_lengths import import_evaluator
from ..version import __version__
from .graph import DetectorGraph, check_detector, preprocessing
from .predictor import Predictor

PICTURES = 8
"""With detections, which a file is verified on."""
TOLERANCE = 1e-4
"""Of boxes, relative to the longer side of the picture; of scores."""
MASKS = 0.01
"""Of masks: pixels in one of two, relative to those in any."""
ALONE = 0.01
"""The share of detections without a partner that is taken: rounding moves a box across a threshold
of overlap, and equal scores, which flat areas of a picture give, come in another order."""


@dataclass
class Agreement:
    """How a file's detections agree with mmdetection's.

    Attributes:
        pictures: that were compared.
        objects: detections of both, twice those in common.
        alone: those without a partner: one of the same label, with box and score within
            :data:`TOLERANCE` and the mask within :data:`MASKS`.
        box: the largest difference of partners, relative to the longer side of the picture.
        score: the largest difference of partners.
        mask: the largest share of pixels that differ, of partners.
    """

    pictures: int = 0
    objects: int = 0
    alone: int = 0
    box: float = 0.0
    score: float = 0.0
    mask: float = 0.0

    def add(self, expected: Found, found: Found) -> None:
        """Compare the detections in a picture."""
        self.pictures += 1
        self.objects += len(expected.scores) + len(found.scores)
        left = torch.ones(len(found.scores), dtype=torch.bool)
        for i in range(len(expected.scores)):
            score = (found.scores - expected.scores[i]).abs()
            box = (found.boxes - expected.boxes[i]).abs().amax(1) / max(expected.size)
            fits = left & (found.labels == expected.labels[i])
            fits &= (score <= TOLERANCE) & (box <= TOLERANCE)
            best = int(box.where(fits, torch.inf).argmin()) if fits.any() else None
            mask = 0.0 if best is None else _apart(expected, found, i, best)
            if best is None or mask > MASKS:
                self.alone += 1
                continue
            left[best] = False
            self.box = max(self.box, float(box[best]))
            self.score = max(self.score, float(score[best]))
            self.mask = max(self.mask, mask)
        self.alone += int(left.sum())

    def __str__(self) -> str:
        masks = f", masks in {self.mask:.1e} of their pixels" if self.mask else ""
        return (
            f"{self.pictures} pictures, {self.objects - self.alone} of {self.objects} detections "
            f"of both are the same; boxes differ by {self.box:.1e} of the longer side, scores by "
            f"{self.score:.1e}{masks}"
        )


@dataclass(frozen=True)
class Written:
    """A file that was written and verified.

    Attributes:
        path: the file.
        agreement: with mmdetection's detector.
        seconds: that writing and verifying took.
        notes: what a user should know, a sentence each.
    """

    path: Path
    agreement: Agreement
    seconds: float
    notes: tuple[str, ...]


def export_detector(
    predictor: Predictor,
    name: str,
    target: Path,
    files: Iterable[Path],
    nms: bool = True,
    fixed_size: bool = False,
) -> Written:
    """Write a detector as ONNX.

    Args:
        predictor: the detector, on the CPU.
        name: of the model.
        target: ``NAME.onnx``.
        files: pictures; the first :data:`PICTURES` with detections are compared.
        nms: whether the file suppresses boxes. Without, it gives the candidates: the boxes, scores
            and labels from which the last suppression chooses, and no masks.
        fixed_size: take images of one size, a square into which every resized picture fits.

    Raises:
        ExportError: it cannot be exported, nothing is found in the pictures, or the file finds
            something else.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        needs(package)
    if target.suffix != ".onnx":
        raise ExportError(f"{target}: detectors are exported as .onnx, found {target.suffix!r}")
    begin = time.perf_counter()
    graph, description = describe(predictor, name, nms, fixed_size)
    preprocessor = predictor.detector.data_preprocessor
    before = preprocessor.pad_size_divisor
    preprocessor.pad_size_divisor = description.preprocessing["pad_to_multiple_of"]
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.stem}.partial.onnx")
    notes: tuple[str, ...] = ()
    if not nms and predictor.has_masks:
        notes = ("the file gives no masks: they are computed of what suppression leaves (--nms)",)
    try:
        expected = _expected(predictor, files)
        try:
            _write(graph, description, expected[0][1].size, partial)
            agreement = _verify(partial, expected, target)
        except Different:  # as kw.deploy.export: the optimizer has rules that change results
            _write(graph, description, expected[0][1].size, partial, optimize=False)
            agreement = _verify(partial, expected, target)
            notes += ("onnxscript's optimizer changes the result: written without it",)
        os.replace(partial, target)
    finally:
        preprocessor.pad_size_divisor = before
        partial.unlink(missing_ok=True)
    if agreement.alone:
        notes += (f"{agreement.alone} of {agreement.objects} detections have no partner",)
    _write_card(target, description, agreement)
    return Written(target, agreement, time.perf_counter() - begin, notes)


def describe(
    predictor: Predictor, name: str, nms: bool, fixed_size: bool
) -> tuple[DetectorGraph, DetectorDescription]:
    """The network to be traced and the file's description; otherwise as :func:`export_detector`."""
    check_detector(predictor)
    steps = preprocessing(predictor)
    multiple, side = steps["pad_to_multiple_of"], None
    if fixed_size:
        scale = steps["resize"]["scale"]
        if scale is None:
            raise ExportError("--fixed-size: test_pipeline's Resize has a scale_factor, not a size")
        side = -(-max(scale) // multiple) * multiple
        steps["pad_to_multiple_of"] = side
    graph = DetectorGraph(predictor.detector, nms)
    config = graph.config
    meta = predictor.meta
    figures = figures_of(meta, predictor.weights)
    return graph, DetectorDescription(
        model=name,
        classes=predictor.classes,
        preprocessing=steps,
        input={
            "image": [1, 3, side, side],
            "least": side or (graph.deepest // multiple + 1) * multiple,
            "size": "height and width without padding, float32 [2]",
        },
        output={
            "nms": nms,
            "masks": nms and predictor.has_masks,
            "score_threshold": config.get("score_thr", 0),
            "iou_threshold": config.nms.iou_threshold,
            "class_agnostic": config.nms.get("class_agnostic", False),
            "max_detections": config.max_per_img,
            "mask_threshold": config.get("mask_thr_binary") if predictor.has_masks else None,
        },
        weights={
            "of": predictor.weights,
            "epoch": meta.get("epoch"),
            "metrics": {key: figures[key] for key in _FIGURES if key in figures},
        },
        config=predictor.config.to_python(places=False),
        versions={"kernelwarehouse": __version__, "torch": str(torch.__version__)},
    )


_FIGURES = {"bbox_mAP": "box AP", "bbox_mAP_50": "box AP50", "segm_mAP": "mask AP"}


def _expected(predictor: Predictor, files: Iterable[Path]) -> list[tuple[Path, Found]]:
    """The first pictures with detections, and these."""
    expected: list[tuple[Path, Found]] = []
    count = 0
    for file in files:
        try:
            found = predictor.find(file)
        except BadImageError:
            continue
        count += 1
        if len(found.scores):
            expected.append((file, found))
        if len(expected) == PICTURES:
            break
    if not expected:
        raise ExportError(
            f"the detector finds nothing in {count} picture(s), so that a file could not be "
            "verified: name pictures of its categories with --images; a detector that finds none "
            "has to be trained further, or has too high a score_thr in test_cfg"
        )
    return expected


def _write(
    graph: DetectorGraph,
    description: DetectorDescription,
    picture: tuple[int, int],
    path: Path,
    optimize: bool = True,
) -> None:
    """Trace and write the network; ``picture`` is the size of one, which the example has."""
    outputs = ["boxes", "scores", "labels", *(["masks"] if description.output["masks"] else [])]
    is_open = description.input["image"][2] is None
    axes: Any = ({2: "height", 3: "width"}, {}) if is_open else None
    names = {"input_names": ["image", "size"], "output_names": outputs, "dynamic_shapes": axes}
    # Anew for every file: with torch 2.15 a program that contains nms is written only once.
    write_program(_trace(graph, description, picture), description, path, optimize, names)


def _trace(graph: DetectorGraph, description: DetectorDescription, picture: tuple[int, int]) -> Any:
    multiple = description.preprocessing["pad_to_multiple_of"]
    width, height = resized(picture, description.preprocessing["resize"])
    shapes: Any = None
    sides = description.input["image"][2:]
    if sides[0] is None:
        least = description.input["least"]
        sides = [-(-max(side, 4 * least) // multiple) * multiple for side in (height, width)]
        axes = [multiple * Dim(name, min=least // multiple) for name in ("height", "width")]
        shapes = {2: axes[0], 3: axes[1]}, {}
    example = torch.zeros(1, 3, *sides), torch.tensor([float(side) for side in sides])
    with torch.no_grad():
        return traced(graph, example, shapes, "onnx", type(graph.detector).__name__)


def _verify(path: Path, expected: list[tuple[Path, Found]], target: Path) -> Agreement:
    """The written file against the detector; :class:`Different` if it finds something else."""
    written = ExportedDetector(OnnxNetwork(path), str(target))
    agreement = Agreement()
    for file, wanted in expected:
        try:
            found = written.find(file)
        except MemoryError:
            raise
        except Exception as error:  # a runtime raises its own kinds
            raise ExportError(f"{target}: the file refuses {file}: {one_line(error)}") from error
        if not written.has_masks:
            wanted = wanted._replace(masks=None)
        agreement.add(wanted, found)
    if agreement.alone > ALONE * agreement.objects:
        raise Different(
            f"{target}: {agreement.alone} of {agreement.objects} detections of the file and of "
            f"PyTorch have no partner in the other's; expected at most {ALONE:.0%}. Nothing was "
            "written"
        )
    return agreement


def _apart(expected: Found, found: Found, i: int, j: int) -> float:
    """The share of the pixels of two masks that are in one of them only."""
    if expected.masks is None or found.masks is None:
        return 0.0
    first, second = expected.masks[i], found.masks[j]
    if first["counts"] == second["counts"]:
        return 0.0
    return 1 - float(import_evaluator().mask.iou([first], [second], [0])[0][0])


def _write_card(path: Path, description: DetectorDescription, agreement: Agreement) -> None:
    """Write ``<file>.md``."""
    output, weights = description.output, description.weights
    rows: dict[str, object] = {
        "classes": ", ".join(description.classes),
        "epochs trained": weights["epoch"] or "unknown",
        "weights": "moving average" if weights["of"] == "ema" else "the model's own",
    }
    for key, name in _FIGURES.items():
        if key in weights["metrics"]:
            rows[f"{name}, in the run's evaluation"] = f"{weights['metrics'][key]:.4g}"
    given = {key.replace("_", " "): value for key, value in description.preprocessing.items()}
    what = "the detections, suppressed" if output["nms"] else "candidates, to be suppressed by you"
    masks = "; `masks` [N, h, w], probabilities over the boxes" if output["masks"] else ""
    given |= {
        "input `image`": f"float32 {description.input['image']}, None is open, from "
        f"{description.input['least']} on",
        "input `size`": description.input["size"],
        "output": f"{what}: `boxes` [N, 4], left, top, right, bottom in pixels of the resized "
        f"picture; `scores` [N], falling, -1 where there is none; `labels` [N]{masks}",
        **{f"output: {key.replace('_', ' ')}": value for key, value in output.items()},
    }
    use = f"""\
```python
import kw

detector = kw.load("{path.name}")
(found,) = detector.predict(["image.jpg"], score=0.3)
```

    kw predict {path.name} image.jpg folder/ --pictures found --json found.json

onnxruntime alone runs it too; classes, preprocessing and thresholds are in its metadata."""
    sections = {
        "Detector": table(rows),
        "Input and output": table(given),
        "Verification": f"After writing, the file was run beside PyTorch: {agreement}.",
        "Use": use,
    }
    card = path.with_name(path.name + ".md")
    card.write_text(page(description.model, path.name, sections), encoding="utf-8")
