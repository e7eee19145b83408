"""A trained detector for pictures, and its detections in COCO's formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.dataset import Compose, pseudo_collate
from PIL import Image
from torch import Tensor

from ..config import ConfigError
from ..data.reading import BadImageError, DataError, Picture, read_image
from ..errors import UserError, memory_for, one_line
from ..training import load_checkpoint, load_network, set_contraction
from ..training.checkpoint import CheckpointError
from ..training.trained import choose_weights, detector_config, trained_file
from .annotations import ids_of
from .config import DetectorConfig, load_detector_config
from .data import check_sample, with_our_reading
from .detector import build_detector, has_masks, without_weights
from .drawing import draw_objects
from .mmdet import register_all_modules
from .run_lengths import encode_masks, mask_areas, segmentation_mask
from .sets import class_names

__all__ = ["Found", "Predictor", "coco_file", "coco_results", "load", "result_ids"]

_PIPELINE = "test_pipeline"


class Found(NamedTuple):
    """The detections in a picture, by falling score."""

    boxes: Tensor
    """float32 ``[N, 4]``: left, top, right, bottom in pixels"""
    scores: Tensor
    """float32 ``[N]``"""
    labels: Tensor
    """int64 ``[N]``, indices into :attr:`Predictor.classes`"""
    masks: list[dict[str, Any]] | None
    """run lengths of :func:`kw.detection.run_lengths.encode_masks`; None for boxes alone"""
    size: tuple[int, int]
    """width and height of the picture, pixels"""


class Predictor:
    """A trained detector, ready for pictures.

    Args:
        config: the detector, and how it reads pictures (``test_pipeline``).
        checkpoint: a file that training wrote; its moving average is used if it has one.
        device: device to run on.

    Attributes:
        classes: names of its categories; a label is an index into this list.

    Raises:
        ConfigError: the detector cannot be built.
        CheckpointError: the checkpoint cannot be read or is of another detector.
        DataError: neither the checkpoint nor the training annotations give the categories.
    """

    def __init__(
        self, config: DetectorConfig, checkpoint: str | Path, device: str | torch.device = "cpu"
    ) -> None:
        state = load_checkpoint(checkpoint)
        data = config.run.data
        self.classes: list[str] = list(state.get("meta", {}).get("classes") or class_names(data))
        self.config = config
        self.upright = data.exif_orientation == "apply"
        self.detector = build_detector(without_weights(config.model), self.classes)
        _, weights = choose_weights(state, checkpoint)
        load_network(self.detector, weights, str(checkpoint))
        set_contraction(config.run.contraction, self.detector)
        self.detector.to(device).eval()
        self.has_masks = has_masks(self.detector)
        register_all_modules(init_default_scope=True)
        # There are no annotations here.
        steps = [step for step in config.test_pipeline if not _reads_annotations(step)]
        try:
            transforms = Compose(steps).transforms
        except Exception as error:  # mmdetection raises any kind for wrong settings
            what = f"mmdetection cannot build it: {one_line(error)}"
            raise ConfigError(f"{_PIPELINE}: {what}") from error
        self._steps = with_our_reading(
            transforms, data.bad_images.max_pixels, self.upright, _PIPELINE
        )

    def read(self, picture: Picture) -> Image.Image:
        """A picture as the detector reads it: RGB, full size.

        Raises:
            BadImageError: it cannot be read.
        """
        return read_image(picture, self.config.run.data.bad_images.max_pixels, self.upright)

    @torch.no_grad()
    def predict(self, picture: Picture, score: float = 0.0) -> Found:
        """Find objects in one picture.

        Args:
            picture: a file, a Pillow image or an array, see :func:`kw.data.read_image`.
            score: detections below this score are left out, and those below the detector's own
                threshold (``test_cfg``).

        Raises:
            BadImageError: it cannot be read as an image, or the transforms fail on it.
            OutOfMemory: it needs too much memory.
        """
        sample: Any = {"img_path": picture, "img_id": 0}
        name = picture if isinstance(picture, (str, Path)) else "a picture"
        with memory_for(lambda: [name]):
            try:
                for step in self._steps:
                    sample = step(sample)
            except (UserError, MemoryError):
                raise
            except Exception as error:  # of transforms of mmdetection or the user
                what = f"{_PIPELINE} fails on it: {one_line(error)}"
                raise BadImageError.of(name, what) from error
            check_sample(sample, _PIPELINE)
            (found,) = self.detector.test_step(pseudo_collate([sample]))
            objects = found.pred_instances
            objects = objects[objects.scores >= score]
            objects = objects[objects.scores.argsort(descending=True, stable=True)]
            masks = encode_masks(objects.masks) if self.has_masks else None
        height, width = found.ori_shape
        return Found(
            objects.bboxes.float().cpu(),
            objects.scores.float().cpu(),
            objects.labels.cpu(),
            masks,
            (width, height),
        )

    def draw(self, picture: Picture, found: Found, score: float = 0.0) -> Image.Image:
        """The picture with its detections, without those below a score."""
        kept = (found.scores >= score).nonzero().flatten().tolist()
        labels = [int(found.labels[i]) for i in kept]
        texts = [
            f"{self.classes[label]} {found.scores[i]:.2f}"
            for i, label in zip(kept, labels, strict=True)
        ]
        masks = None
        if found.masks is not None:
            width, height = found.size
            masks = [segmentation_mask(found.masks[i], height, width) for i in kept]
        return draw_objects(self.read(picture), found.boxes[kept], labels, texts, masks)


def _reads_annotations(step: Any) -> bool:
    return isinstance(step, dict) and "LoadAnnotations" in str(step.get("type"))


def load(model: str | Path, device: str = "cpu") -> Predictor:
    """The trained detector of a run.

    Its ``config.py`` is run as a program: load only folders that you trust.

    Args:
        model: a work directory of ``tools/train.py``, or a checkpoint in it.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        CheckpointError: it is not a detector's, or as for :class:`Predictor`.
        ConfigError: its configuration cannot be used.
    """
    config = detector_config(model)
    if config is None:
        raise CheckpointError(
            f"{model}: expected a detector's work directory, with its config.py, or a checkpoint "
            "in it"
        )
    return Predictor(load_detector_config(config), trained_file(model), device)


def result_ids(classes: Sequence[str], content: Mapping[str, Any], file: str) -> list[int]:
    """The category ids of a detector's labels in an annotation file.

    Args:
        classes: classes of the detector.
        content: content of the file; it needs no annotations.
        file: its name, for messages.

    Raises:
        DataError: the file lacks a category, or has several of one name and no objects that show
            which one is meant.
    """
    objects = content.get("annotations") or []
    ids = ids_of(classes, {**content, "annotations": objects}, file)
    used = {each.get("category_id") for each in objects}
    names = Counter(each["name"] for each in content["categories"])
    pairs = zip(classes, ids, strict=True)
    if twice := [name for name, number in pairs if names[name] > 1 and number not in used]:
        raise DataError(
            f"{file} has several categories {', '.join(twice)}: remove those that are not meant"
        )
    return ids


def coco_results(found: Iterable[tuple[int, Found]], ids: Sequence[int]) -> list[dict[str, Any]]:
    """Detections in COCO's results format, for its evaluation server and tools.

    Args:
        found: image ids and their detections.
        ids: category ids by label, see :func:`result_ids`.
    """
    return [row for image_id, each in found for row in _rows(image_id, each, ids)]


def coco_file(found: Sequence[tuple[str, Found]], classes: Sequence[str]) -> dict[str, Any]:
    """Detections as an annotation file with scores; images and categories count from 1.

    Args:
        found: file names and their detections.
        classes: classes of the detector.
    """
    numbered = [(place, name, each) for place, (name, each) in enumerate(found, 1)]
    ids = range(1, len(classes) + 1)
    rows: list[dict[str, Any]] = []
    for place, _, each in numbered:
        sides = (each.boxes[:, 2:] - each.boxes[:, :2]).double()
        areas = sides.prod(1).tolist() if each.masks is None else mask_areas(each.masks)
        for row, area in zip(_rows(place, each, ids), areas, strict=True):
            rows.append({**row, "id": len(rows) + 1, "iscrowd": 0, "area": area})
    return {
        "images": [
            {"id": place, "file_name": name, "width": each.size[0], "height": each.size[1]}
            for place, name, each in numbered
        ],
        "annotations": rows,
        "categories": [{"id": i, "name": name} for i, name in zip(ids, classes, strict=True)],
    }


def _rows(image_id: int, found: Found, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    boxes = found.boxes.double()
    boxes[:, 2:] -= boxes[:, :2]
    rows: list[dict[str, Any]] = [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": [round(value, 2) for value in box],
            "score": round(score, 5),
        }
        for box, label, score in zip(
            boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True
        )
    ]
    for row, mask in zip(rows, found.masks or (), strict=False):
        row["segmentation"] = {"size": list(mask["size"]), "counts": mask["counts"].decode()}
    return rows
