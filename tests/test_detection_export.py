"""Exported detectors: the graph beside mmdetection, the written file, its use without it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet", reason="the detection extra is not installed", exc_type=ImportError)
pytest.importorskip("onnxruntime", reason="the export extra is not installed")

import mmcv
import onnx
from PIL import Image
from processes import Forked

import kw
from kw.data import BadImageError
from kw.deploy import ExportError
from kw.deploy.detector import DetectorDescription, ExportedDetector, lay_masks, resized
from kw.detection import load_detector_config
from kw.detection.detector import build_detector
from kw.detection.export import Agreement, describe, export_detector
from kw.detection.predictor import Predictor
from kw.objects.found import Found
from kw.objects.run_lengths import encode_masks
from kw.training.checkpoint import save_checkpoint

CLASSES = ["red", "green"]
_STRIDES = [4, 8, 16]
_TWO_STAGES = {
    "rpn_head": {
        "in_channels": 16,
        "feat_channels": 16,
        "anchor_generator": {"scales": [4], "strides": _STRIDES},
    },
    "test_cfg": {"rpn": {"nms_pre": 60, "max_per_img": 30}, "rcnn": {"max_per_img": 12}},
}
_BOXES = {
    "bbox_roi_extractor": {"out_channels": 16, "featmap_strides": [4, 8], "finest_scale": 20},
    "bbox_head": {"in_channels": 16, "fc_out_channels": 32},
}
_ANCHORS = {"octave_base_scale": 4, "scales_per_octave": 1, "strides": _STRIDES}
_RANGES = ((-1, 32), (32, 64), (64, 1e8))
_ONE_STAGE = {"in_channels": 16, "feat_channels": 16, "stacked_convs": 1}
DETECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "mask": (
        "mask-rcnn_r50_fpn",
        _TWO_STAGES
        | {
            "roi_head": _BOXES
            | {
                "mask_roi_extractor": {
                    "out_channels": 16,
                    "featmap_strides": [4, 8],
                    "finest_scale": 20,
                    "roi_layer": {"output_size": 7},
                },
                "mask_head": {"num_convs": 1, "in_channels": 16, "conv_out_channels": 16},
            }
        },
    ),
    "faster": ("faster-rcnn_r50_fpn", _TWO_STAGES | {"roi_head": _BOXES}),
    "retina": (
        "retinanet_r50_fpn",
        {
            "bbox_head": _ONE_STAGE | {"anchor_generator": _ANCHORS},
            "test_cfg": {"nms_pre": 60, "max_per_img": 20},
        },
    ),
    "fcos": (
        "retinanet_r50_fpn",
        {
            "bbox_head": _ONE_STAGE
            | {
                "_delete_": True,
                "type": "FCOSHead",
                "num_classes": 80,
                "strides": _STRIDES,
                "regress_ranges": _RANGES,
                "norm_cfg": {"type": "GN", "num_groups": 4},
            },
            "test_cfg": {"nms_pre": 60, "max_per_img": 20},
        },
    ),
}


def write_run(kind: str, folder: Path, coco: Path) -> Path:
    """A work directory of a small detector with random weights, whose scores differ."""
    base, parts = DETECTORS[kind]
    kernels = {"plan": "resnet18", "start": "paper"}
    network = {
        "name": "resnet18",
        "timm_args": {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]},
        "kernel_warehouse": kernels,
    }
    backbone = {"_delete_": True, "type": "kw.Backbone", "network": network, "out_indices": (1, 2)}
    neck = {"in_channels": [8, 8], "out_channels": 16, "num_outs": 3, "start_level": 0}
    model = dict(data_preprocessor={"pad_size_divisor": 16}, backbone=backbone, neck=neck, **parts)
    data = {
        "root": str(coco),
        "train_annotations": "annotations/instances_train.json",
        "train_images": "train",
        "val_annotations": "annotations/instances_val.json",
        "val_images": "val",
    }
    text = f"""
_base_ = ["mmdet::_base_/models/{base}.py"]
model = {model!r}
data = {data!r}
train_pipeline = []
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(112, 72), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "ori_shape", "img_shape", "scale_factor")),
]
epochs = 1
total_batch_size = 1
batch_size = 1
optimizer = dict(name="adamw", lr=1e-3)
"""
    folder.mkdir(parents=True)
    (folder / "config.py").write_text(text)
    config = load_detector_config(folder / "config.py")
    torch.manual_seed(0)
    detector = build_detector(config.model, CLASSES)
    for _ in range(10):  # BatchNorm's statistics
        detector.backbone(torch.randn(4, 3, 64, 64))
    for name, parameter in detector.named_parameters():
        if name.endswith("cls.bias"):
            torch.nn.init.zeros_(parameter)  # not so that everything is background at first
        if not name.startswith("backbone") and parameter.dim() > 1:
            scale = 0.3 if name.endswith("reg.weight") else 1.5
            torch.nn.init.normal_(parameter, std=scale / parameter[0].numel() ** 0.5)
    (folder / "config.py").write_text(config.to_python())
    meta = {"classes": CLASSES, "epoch": 3, "metrics": {"bbox_mAP": 0.25}}
    save_checkpoint({"meta": meta, "state_dict": detector.state_dict()}, folder / "best.pth")
    return folder


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set without annotations."""
    folder = tmp_path_factory.mktemp("export") / "set"
    (folder / "val").mkdir(parents=True)
    for number, pixels in enumerate(pictures()):
        Image.fromarray(pixels).save(folder / "val" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, coco: Path) -> Any:
    """Work directories by kind, made when they are first asked for."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = write_run(kind, root / kind, coco)
        return made[kind]

    return get


def pictures() -> list[np.ndarray]:
    """Noise of several shapes. Flat areas would give equal scores, which PyTorch's topk,
    onnxruntime's and mmdetection's sort may put in different orders."""
    rng = np.random.default_rng(0)
    sizes = [(64, 96), (80, 64), (72, 112), (30, 97), (21, 13)]  # a thin one, and an enlarged one
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def as_exported(predictor: Predictor, nms: bool = True) -> ExportedDetector:
    """The graph, not traced, behind the code that serves files."""
    graph, description = describe(predictor, "x", nms, False)

    def run(names: None, given: dict[str, np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad():
            inputs = (torch.from_numpy(given[name]) for name in ("image", "size"))
            return [output.numpy() for output in graph(*inputs)]

    network: Any = SimpleNamespace(
        metadata=description.to_strings(), session=SimpleNamespace(run=run)
    )
    return ExportedDetector(network, "x")


@pytest.mark.parametrize("nms", [True, False])
@pytest.mark.parametrize("kind", DETECTORS)
def test_the_graph_finds_what_mmdetection_finds(kind: str, nms: bool, runs: Any) -> None:
    """Boxes, scores, labels and masks of whole pictures, resized and normalised without it."""
    predictor = kw.load(runs(kind))
    written = as_exported(predictor, nms)
    agreement = Agreement()
    labels = set()
    for picture in pictures():
        expected = predictor.predict(picture)
        found = written.predict(picture)
        labels |= set(expected.labels.tolist())
        assert (found.masks is None) == (not nms or kind != "mask")
        if found.masks is None:
            expected = expected._replace(masks=None)
        agreement.add(expected, found)
    assert labels == {0, 1}
    assert agreement.objects >= 2 * 15
    assert agreement.alone == 0
    best = predictor.predict(pictures()[0]).scores[0].item()
    assert len(written.predict(pictures()[0], score=best).scores) == 1


def export(run: Path, target: Path, coco: Path, **settings: Any) -> Any:
    predictor = kw.load(run)
    return export_detector(predictor, "small", target, sorted((coco / "val").iterdir()), **settings)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("export {name} {file} {folder}/a.onnx --precision int8", "exported in fp32"),
        ("inspect annotations {name} --set data.root={folder}", "instances_train2017.json"),
    ],
)
def test_a_configuration_has_a_name(
    words: str, said: str, tmp_path: Path, tool: Any, capsys: Any
) -> None:
    """As every command takes it."""
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "a.pth")
    places = {"name": "mask_rcnn_kw_resnet50_1x", "file": tmp_path / "a.pth", "folder": tmp_path}
    command, *rest = words.format(**places).split()
    if command == "inspect":
        command = f"{command} {rest.pop(0)}"
    with pytest.raises(SystemExit):
        tool(f"kw {command}", *rest)
    printed = capsys.readouterr()
    assert said in printed.out + printed.err


@pytest.mark.long
def test_a_file_is_written_and_used_without_mmdetection(
    runs: Any, coco: Path, tmp_path: Path, tool: Any, capsys: Any
) -> None:
    run, file = runs("mask"), tmp_path / "mask.onnx"
    tool("tools/export.py", run, file)
    assert "detections of both are the same" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mask.onnx", "mask.onnx.md"]
    card = (tmp_path / "mask.onnx.md").read_text()
    for words in ("red, green", "0.25", "[1, 3, None, None]", "mask.onnx"):
        assert words in card
    assert b"site-packages" not in file.read_bytes()
    assert str(coco.parent).encode() not in file.read_bytes()
    assert str(coco.parent) in (run / "config.py").read_text()

    written, predictor = kw.load(file), kw.load(run)
    assert isinstance(written, ExportedDetector)
    assert written.classes == CLASSES
    agreement = Agreement()
    for picture in pictures():  # of other sizes than the example's
        agreement.add(predictor.predict(picture), written.predict(picture))
    assert agreement.alone == 0
    assert len(written.predict(pictures())) == agreement.pictures
    with pytest.raises(BadImageError, match="the file takes sides from 32 on"):
        written.predict(np.zeros((2, 300, 3), np.uint8))

    tool("tools/predict.py", run, coco / "val", "--json", tmp_path / "run.json", "--score", "0.1")
    program = (
        "import sys\n"
        "for name in list(sys.modules):\n"
        "    if name.startswith(('kw.detection', 'mmdet', 'mmcv')):\n"
        "        del sys.modules[name]\n"
        "sys.modules.update(mmdet=None, mmcv=None); sys.argv[0] = 'kw'\n"
        "from kw.cli import main; main()"
    )
    arguments = ["predict", file, coco / "val", "--score", "0.1", "--pictures", tmp_path / "found"]
    arguments += ["--json", tmp_path / "file.json"]
    assert Forked([sys.executable, "-c", program, *arguments]).wait(120) == 0
    assert len(list((tmp_path / "found").iterdir())) == 5
    expected, found = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("run", "file"))
    assert found["images"] == expected["images"]
    assert found["categories"] == expected["categories"]
    assert len(found["annotations"]) == len(expected["annotations"]) > 10
    for ours, theirs in zip(found["annotations"], expected["annotations"], strict=True):
        assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=0.02)
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)
        assert ours["segmentation"]["size"] == theirs["segmentation"]["size"]
        assert ours["area"] == pytest.approx(theirs["area"], abs=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["faster", "retina", "fcos"])
@pytest.mark.parametrize("nms", [True, False])
def test_other_detectors_are_written(
    kind: str, nms: bool, runs: Any, coco: Path, tmp_path: Path
) -> None:
    written = export(runs(kind), tmp_path / "small.onnx", coco, nms=nms)
    assert written.agreement.pictures == 5
    assert written.agreement.objects >= 2 * 20
    assert written.agreement.alone == 0
    kinds = {node.op_type for node in onnx.load(written.path).graph.node}
    assert ("NonMaxSuppression" in kinds) == (nms or kind == "faster")  # that of proposals stays
    found = kw.load(written.path).predict(pictures())
    assert sum(len(each.scores) for each in found) > 20


@pytest.mark.slow
def test_a_fixed_size(runs: Any, coco: Path, tmp_path: Path) -> None:
    written = export(runs("mask"), tmp_path / "small.onnx", coco, fixed_size=True)
    assert written.agreement.alone == 0
    inputs = onnx.load(written.path).graph.input
    assert [axis.dim_value for axis in inputs[0].type.tensor_type.shape.dim] == [1, 3, 112, 112]
    assert len(kw.load(written.path).predict(pictures()[-1]).size) == 2


def test_a_file_that_finds_something_else_is_not_left(
    runs: Any, coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kw.detection.export as module

    predictor = kw.load(runs("retina"))
    other = as_exported(predictor)
    find = other.find
    monkeypatch.setattr(other, "find", lambda *a: find(*a)._replace(labels=1 - find(*a).labels))
    monkeypatch.setattr(module, "ExportedDetector", lambda *_: other)
    monkeypatch.setattr(module, "OnnxNetwork", lambda *_: None)
    monkeypatch.setattr(module, "_trace", lambda *_: None)
    monkeypatch.setattr(module, "write_program", lambda p, d, path, *_: path.write_text("x"))
    files = sorted((coco / "val").iterdir())
    with pytest.raises(ExportError, match=r"detections .* have no partner .* Nothing was written"):
        export_detector(predictor, "small", tmp_path / "small.onnx", files)
    assert list(tmp_path.iterdir()) == []
    predictor.detector.test_cfg.score_thr = 1.0
    with pytest.raises(ExportError, match=r"finds nothing in 5 picture.*--images"):
        export_detector(predictor, "small", tmp_path / "small.onnx", files)
    assert predictor.detector.data_preprocessor.pad_size_divisor == 16


def test_agreement() -> None:
    """What counts as the same detection, and what does not."""
    mask = np.zeros((1, 50, 80), bool)
    mask[0, 10:30, 10:40] = True
    one = Found(
        torch.tensor([[10.0, 10.0, 40.0, 30.0]]),
        torch.tensor([0.9]),
        torch.tensor([1]),
        encode_masks(mask),
        (80, 50),
    )
    moved = mask.copy()
    moved[0, 10:30, 40] = True
    none = Found(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), [], (80, 50))
    for other, alone in (
        (one, 0),
        (one._replace(boxes=one.boxes + 0.004), 0),
        (one._replace(boxes=one.boxes + 0.02), 2),
        (one._replace(scores=one.scores + 0.001), 2),
        (one._replace(labels=one.labels - 1), 2),
        (one._replace(masks=encode_masks(moved)), 2),
        (none, 1),
    ):
        agreement = Agreement()
        agreement.add(one, other)
        assert agreement.alone == alone
        assert agreement.objects == 1 + len(other.scores)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("retina", ("test_cfg.nms.type", "soft_nms"), r"model.test_cfg.nms = .*kw predict"),
        ("faster", ("test_cfg.rcnn.nms.sigma", 1), r"model.test_cfg.rcnn.nms ="),
        ("faster", ("test_cfg.rpn.nms_pre", -1), r"model.test_cfg.rpn.nms_pre = -1"),
        ("retina", ("test_cfg.min_bbox_size", 3), "min_bbox_size = 3"),
        ("retina", ("bbox_head.type", "GFLHead"), "model.bbox_head = GFLHead cannot be exported"),
        ("retina", ("type", "GFL"), ""),
    ],
)
def test_what_cannot_be_exported_is_refused(
    kind: str, change: tuple[str, Any], message: str, runs: Any, coco: Path, tmp_path: Path
) -> None:
    predictor = kw.load(runs(kind))
    place, value = change
    if place == "bbox_head.type":
        from mmdet.models import GFLHead

        predictor.detector.bbox_head.__class__ = GFLHead
    elif place != "type":
        target = predictor.detector
        *steps, last = place.split(".")
        for step in steps:
            target = getattr(target, step)
        setattr(target, last, value)
    if not message:  # a subclass with the same functions is taken
        predictor.detector.__class__ = type("GFL", (type(predictor.detector),), {})
        assert describe(predictor, "x", True, False)
        return
    with pytest.raises(ExportError, match=message):
        export_detector(predictor, "small", tmp_path / "small.onnx", [])


def test_the_tool_refuses(runs: Any, coco: Path, tmp_path: Path, tool: Any, capsys: Any) -> None:
    for arguments, message in (
        (["small.onnx", "--precision", "fp16"], "fp32 for one picture"),
        (["small.onnx", "--batch", "2"], "fp32 for one picture"),
        (["small.pt2"], "detectors are exported as .onnx"),
    ):
        with pytest.raises(SystemExit) as stop:
            tool("tools/export.py", runs("retina"), tmp_path / arguments[0], *arguments[1:])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    predictor = kw.load(runs("retina"))
    predictor.steps.insert(1, predictor.steps[-1])
    predictor.steps[1] = SimpleNamespace()
    with pytest.raises(ExportError, match="test_pipeline: SimpleNamespace cannot be exported"):
        describe(predictor, "x", True, False)


def test_sizes_are_mmcvs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        size = tuple(int(side) for side in rng.integers(1, 3000, 2))
        settings = {"scale": [1333, 800], "scale_factor": None, "keep_ratio": True}
        assert resized(size, settings) == mmcv.rescale_size(size, (1333, 800))
        factor = {"scale": None, "scale_factor": [0.5, 0.5], "keep_ratio": True}
        theirs = mmcv.rescale_size(size, mmcv.image.geometric._scale_size(size, 0.5))
        assert resized(size, factor) == theirs
    assert resized((30, 40), {"scale": [64, 32], "keep_ratio": False}) == (64, 32)


def test_masks_are_laid_as_mmdetection_lays_them() -> None:
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(20, 4, generator=generator) * torch.tensor([80.0, 60.0, 80.0, 60.0])
    boxes = torch.cat([torch.minimum(*corners.split(2, 1)), torch.maximum(*corners.split(2, 1))], 1)
    boxes[0, 2:] = boxes[0, :2]  # no area
    masks = torch.rand(20, 7, 7, generator=generator)
    expected = torch.zeros(20, 60, 80, dtype=torch.bool)
    for i in range(20):
        found, place = _do_paste_mask(masks[i : i + 1, None], boxes[i : i + 1], 60, 80)
        expected[(slice(i, i + 1), *place)] = found >= 0.5
    assert expected.sum() > 1000
    assert lay_masks(masks, boxes, (80, 60), 0.5) == encode_masks(expected)


def test_a_damaged_description_is_refused() -> None:
    good = DetectorDescription("m", ["a"], {}, {}, {}, {}, "").to_strings()
    assert DetectorDescription.from_strings(good, "f").classes == ["a"]
    with pytest.raises(ExportError, match="f: its description is damaged"):
        DetectorDescription.from_strings({**good, "classes": "["}, "f")
    with pytest.raises(ExportError, match="version '7'"):
        DetectorDescription.from_strings({**good, "kernelwarehouse": "7"}, "f")
