"""Detectors that start from trained weights: a classifier's, a backbone's, or all of a detector."""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from coco_set import detector_text, write_coco_set
from safetensors.torch import save_file
from test_parts import as_earlier
from torch import Tensor, nn

pytest.importorskip("mmdet", reason="the detection extra is not installed", exc_type=ImportError)

from mmengine.config import Config, ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.structures import InstanceData

from kw.config import ConfigError
from kw.detection import evaluate_checkpoint, load_detector_config, train
from kw.detection import start as detection_start
from kw.detection.backbone import Backbone
from kw.detection.detector import build_detector
from kw.detection.mmdet import MODELS, register_all_modules
from kw.detection.origins import installed_path
from kw.detection.start import start_detector
from kw.detection.weights import read_detector
from kw.training import CheckpointError
from kw.warehouse import KWLayer

NARROW: Any = {"channels": [8, 8, 16, 16]}
STATIC: dict[str, Any] = {"name": "resnet18", "timm_args": NARROW, "num_classes": 7}
CONVERTED: dict[str, Any] = {**STATIC, "kernel_warehouse": {"plan": "resnet18"}}
CLASSES = ["red", "green", "blue"]


def trained(module: nn.Module, seed: int = 0) -> Any:
    """As if it had been trained: no statistic or scale is what it was initialised to."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2, generator=generator)
            elif value.is_floating_point() and value.dim() == 1:
                value.add_(torch.randn(value.shape, generator=generator) / 10)
    return module.eval()


def assert_maps(backbone: Any, static: Any, images: Tensor) -> None:
    expected = static.forward_intermediates(images, intermediates_only=True)
    maps = backbone.eval()(images)
    for found, whole in zip(maps, expected[-len(maps) :], strict=True):
        assert (found - whole).abs().max() <= 1e-5 * whole.abs().max()


def classifier_pth(static: nn.Module, folder: Path, _: Any) -> str:
    torch.save(static.state_dict(), folder / "static.pth")
    return str(folder / "static.pth")


def classifier_safetensors(static: nn.Module, folder: Path, _: Any) -> str:
    save_file(static.state_dict(), folder / "static.safetensors")
    return str(folder / "static.safetensors")


def own_average(static: nn.Module, folder: Path, _: Any) -> str:
    """A run's checkpoint: the average is taken, the network's own weights are not."""
    state = static.state_dict()
    worse = {name: value * 2 for name, value in state.items()}
    torch.save({"state_dict": worse, "ema_state_dict": state}, folder / "best.pth")
    return str(folder / "best.pth")


def converted_classifier(static: nn.Module, folder: Path, monkeypatch: Any) -> str:
    import kw

    network = kw.convert(copy.deepcopy(static), "resnet18")
    torch.save({"state_dict": network.state_dict()}, folder / "converted.pth")
    return str(folder / "converted.pth")


def backbone_of_mmdetection(static: nn.Module, folder: Path, _: Any) -> str:
    """No classifier, no counters of batches as in old files, and heads that are not wanted."""
    state = {
        f"backbone.{name}": value
        for name, value in static.state_dict().items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
    state["neck.lateral_convs.0.conv.weight"] = torch.ones(2, 2)
    torch.save({"meta": {"CLASSES": ("a",)}, "state_dict": state}, folder / "detector.pth")
    return str(folder / "detector.pth")


def backbone_of_ours(converts: bool) -> Any:
    def write(static: nn.Module, folder: Path, monkeypatch: Any) -> str:
        file = classifier_pth(static, folder, monkeypatch)
        backbone = Backbone(CONVERTED if converts else STATIC, weights=file, output_norm=True)
        state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
        torch.save({"state_dict": state, "meta": {"classes": ["a"]}}, folder / "own.pth")
        return str(folder / "own.pth")

    return write


def hub(name: str) -> Any:
    def bring(static: nn.Module, folder: Path, monkeypatch: Any) -> str:
        create = timm.create_model

        def from_hub(model: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
            if not pretrained:
                return create(model, **arguments)
            assert model == "resnet18" + name.removeprefix("timm").replace(":", ".")
            return copy.deepcopy(static)

        monkeypatch.setattr(timm, "create_model", from_hub)
        return name

    return bring


SOURCES = {
    "pth": classifier_pth,
    "safetensors": classifier_safetensors,
    "average": own_average,
    "converted": converted_classifier,
    "mmdetection": backbone_of_mmdetection,
    "own-static-detector": backbone_of_ours(False),
    "own-converted-detector": backbone_of_ours(True),
    "hub": hub("timm"),
    "hub-tag": hub("timm:a1_in1k"),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_the_backbone_computes_what_the_static_network_did(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    static = trained(timm.create_model("resnet18", num_classes=5, **NARROW))
    weights = source(static, tmp_path, monkeypatch)
    caplog.clear()
    backbone = Backbone(CONVERTED, weights=weights)
    assert any(isinstance(module, KWLayer) for module in backbone.modules())
    assert_maps(backbone, static, torch.randn(2, 3, 70, 91))
    told = caplog.text
    assert "classifier" not in told  # which a backbone has not
    if source is backbone_of_mmdetection:
        assert "105 tensors of the backbone are taken; not used here: neck 1" in told


@pytest.mark.parametrize(
    ("base", "found"),
    [
        ("mask_rcnn/mask-rcnn_r50_fpn_1x_coco", None),
        ("fcos/fcos_r50-caffe_fpn_gn-head_1x_coco", r"BGR with mean=\[10.*std=\[1.0, 1.0, 1.0\]"),
        ("rtmdet/rtmdet_tiny_8xb32-300e_coco", r"BGR with mean=\[103.*std=\[57"),
        ("yolox/yolox_tiny_8xb8-300e_coco", r"BGR with mean=\[0.0, .*std=\[1.0, 1.0, 1.0\]"),
    ],
)
def test_pixels_that_a_classifier_does_not_know_are_said(
    base: str, found: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """https://github.com/facebookresearch/maskrcnn-benchmark/issues/643: 58 mAP for 73"""
    theirs = Config.fromfile(Path(installed_path("mmdet"), ".mim", "configs", f"{base}.py"))
    (tmp_path / "ours.py").write_text(detector_text(tmp_path))
    model = load_detector_config(tmp_path / "ours.py").model
    model["data_preprocessor"] = {**theirs.model.data_preprocessor, "batch_augments": None}
    static = timm.create_model("resnet18", **NARROW, layers=[1, 1, 1, 1])
    weights = classifier_pth(static, tmp_path, None)
    for start in (None, weights):
        caplog.clear()
        model["backbone"]["weights"] = start
        build_detector(model, CLASSES)
        says = rf"{weights}: trained on RGB with mean=\[123.675, .*most.*gives {found}"
        assert bool(re.search(says, caplog.text)) is (start is not None and found is not None)


@pytest.mark.parametrize(("value", "is_said"), [(127.5, False), (116.28, True)])
def test_timms_weights_know_their_pixels(
    value: float, is_said: bool, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    static = timm.create_model("resnet18", **NARROW, layers=[1, 1, 1, 1])
    weights = hub("timm:a1_in1k")(static, tmp_path, monkeypatch)
    known = timm.get_pretrained_cfg("resnet18.a1_in1k")
    half = dataclasses.replace(known, mean=(0.5,) * 3, std=(0.5,) * 3)
    monkeypatch.setattr(timm, "get_pretrained_cfg", {"resnet18.a1_in1k": half}.get)
    (tmp_path / "ours.py").write_text(detector_text(tmp_path))
    model = load_detector_config(tmp_path / "ours.py").model
    model["data_preprocessor"].update(mean=[value] * 3, std=[127.5] * 3)
    model["backbone"]["weights"] = weights
    build_detector(model, CLASSES)
    says = r"timm:a1_in1k: trained on RGB with mean=\[127.5, 127.5, 127.5\], std=\[127.5, .*; model"
    assert bool(re.search(says, caplog.text)) is is_said


@pytest.mark.parametrize(
    "dynamic",
    [
        {"kernel_warehouse": {"plan": "resnet18", "start": "paper"}},
        {"kernel_warehouse": {"plan": "resnet18", "warehouses": {"layer3": {"start": "paper"}}}},
        {"peer": {"method": "odconv", "start": "paper"}},
    ],
    ids=["plan", "warehouse", "peer"],
)
def test_a_classifiers_own_start_does_not_count(
    dynamic: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its file may be for training from nothing; without weights it is."""
    static = trained(timm.create_model("resnet18", **NARROW))
    weights = classifier_pth(static, tmp_path, None)
    backbone = Backbone({**STATIC, **dynamic}, weights=weights)
    assert_maps(backbone, static, torch.randn(1, 3, 64, 64))
    assert "the network's start 'paper', which replaces them, is not used" in caplog.text
    caplog.clear()
    Backbone({**STATIC, **dynamic})
    assert " replaced" in caplog.text


def test_a_detector_without_its_last_stage(tmp_path: Path) -> None:
    """What a file lacks may be fresh where no map depends on it, and nowhere else."""
    static = trained(timm.create_model("resnet18", **NARROW))
    for settings in (STATIC, CONVERTED):
        whole = Backbone(settings, weights=classifier_pth(static, tmp_path, None))
        assert any(name.startswith("network.layer4") for name in whole.state_dict())
        part = Backbone(
            settings, weights=classifier_pth(static, tmp_path, None), out_indices=(1, 2)
        )
        state = {f"backbone.{name}": value for name, value in part.state_dict().items()}
        assert not any("layer4" in name for name in state)
        torch.save({"state_dict": state}, tmp_path / "part.pth")
        again = Backbone(settings, weights=str(tmp_path / "part.pth"), out_indices=(1, 2))
        for name, value in part.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], value)
        with pytest.raises(CheckpointError, match=r"missing layer3"):
            Backbone(settings, weights=str(tmp_path / "part.pth"))


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    static = timm.create_model("resnet18", **NARROW)
    other = timm.create_model("resnet18", channels=[8, 8, 16, 24])
    path = tmp_path / "weights.pth"
    backbone_of_mmdetection(other, tmp_path, None)
    with pytest.raises(CheckpointError, match=r"layer4\.0\.conv1\.weight is \[24, 16, 3, 3\]"):
        Backbone(CONVERTED, weights=str(tmp_path / "detector.pth"))
    state = {f"backbone.{k}": v for k, v in static.state_dict().items() if "fc." not in k}
    torch.save({"state_dict": {**state, "backbone.layer2.0.conv2.offset": state}}, path)
    with pytest.raises(CheckpointError, match="no tensors"):
        Backbone(CONVERTED, weights=str(path))
    offset = {"backbone.layer2.0.conv_offset.weight": torch.ones(1)}
    torch.save({"state_dict": {**state, **offset}}, path)
    with pytest.raises(CheckpointError, match=r"unexpected layer2\.0\.conv_offset\.weight"):
        Backbone(CONVERTED, weights=str(path))
    with pytest.raises(ConfigError, match=r"model\.backbone\.weights 'timm:none'"):
        Backbone(CONVERTED, weights="timm:none")
    with pytest.raises(ConfigError, match=r"model\.backbone\.weights = 3"):
        Backbone(CONVERTED, weights=3)  # type: ignore[arg-type]
    # mmengine's own checkpoints hold objects, which could run code.
    history = HistoryBuffer()
    torch.save({"state_dict": state, "message_hub": history}, path)
    with pytest.raises(
        CheckpointError,
        match=r"HistoryBuffer, and reading those could run code.*save its weights alone",
    ):
        Backbone(CONVERTED, weights=str(path))


def test_blocks_that_stride_elsewhere(tmp_path: Path) -> None:
    """The same names and shapes, another function: the file's own configuration tells."""
    args: Any = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}
    state = timm.create_model("resnet50", num_classes=0, **args).state_dict()
    path = tmp_path / "detector.pth"
    content = {"state_dict": {f"backbone.{k}": v for k, v in state.items()}, "meta": {}}
    for text in ("backbone=dict(depth=50, style='pytorch')", "backbone=dict(style='caffe')"):
        content["meta"] = {"config": text}
        torch.save(content, path, _use_new_zipfile_serialization="caffe" not in text)
        network = {"name": "resnet50", "timm_args": args}
        if "caffe" not in text:
            Backbone(network, weights=str(path))
            continue
        with pytest.raises(CheckpointError, match="style='caffe'"):
            Backbone(network, weights=str(path))


def test_a_detectors_backbone_of_an_earlier_version(tmp_path: Path) -> None:
    backbone, path = Backbone(CONVERTED), tmp_path / "detector.pth"
    state = backbone.network.state_dict()
    named = {f"backbone.network.{name}": value for name, value in state.items()}
    earlier = as_earlier(backbone.network, named, "backbone.network.")
    assert any(".warehouses." in name for name in earlier)
    torch.save({"state_dict": earlier, "meta": {}}, path)
    loaded = Backbone(CONVERTED, weights=str(path)).network.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_freezing_by_name() -> None:
    patterns = ["layer[12]", r".*\.warehouse"]
    backbone = Backbone(CONVERTED, frozen_stages=0, freeze=patterns)
    for name, parameter in backbone.network.named_parameters():
        frozen = name.startswith(("conv1", "bn1", "layer1", "layer2")) or "warehouse" in name
        assert parameter.requires_grad != frozen, name
    assert not backbone.network.layer1.training
    assert backbone.network.layer3.training
    Backbone(CONVERTED, freeze=[".*"])  # the heads are left to train
    with pytest.raises(ConfigError, match=r"model\.backbone\.freeze 'layer9' matches nothing"):
        Backbone(CONVERTED, freeze=["layer9"])


def mask_rcnn(backbone: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The small Mask R-CNN of the tests on a whole ResNet18, an eighth as wide."""
    path = tmp_path / "detector.py"
    path.write_text(detector_text(tmp_path))
    model = load_detector_config(path).model
    model["neck"]["in_channels"] = [8, 16, 32, 64]
    return {**model, "backbone": backbone}


THEIRS = {
    "type": "ResNet",
    "depth": 18,
    "base_channels": 8,
    "stem_channels": 64,
    "out_indices": (0, 1, 2, 3),
    "norm_eval": True,
}
TWIN: dict[str, Any] = {"name": "resnet18", "timm_args": {"channels": [8, 16, 32, 64]}}
OURS = {
    "type": "kw.Backbone",
    "network": {**TWIN, "kernel_warehouse": {"plan": "resnet18"}},
    "weights": "elsewhere.pth",
}


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kw")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """mmdetection's Mask R-CNN, settings included, and the file of its weights."""
    folder = tmp_path_factory.mktemp("theirs")
    torch.manual_seed(0)
    register_all_modules(init_default_scope=True)
    model = mask_rcnn(THEIRS, folder)
    settings = copy.deepcopy(model)
    for head in ("bbox_head", "mask_head"):
        settings["roi_head"][head]["num_classes"] = 3
    detector = trained(MODELS.build(ConfigDict(settings)))
    file = folder / "mask_rcnn_r18_fpn.pth"
    meta = {"dataset_meta": {"classes": tuple(CLASSES)}, "cfg": "style='pytorch'"}
    torch.save({"meta": meta, "state_dict": detector.state_dict(), "optimizer": {}}, file)
    return detector, model, str(file)


def outputs(detector: Any) -> list[Tensor]:
    """Maps, proposals' scores and shifts, and what the heads of regions say of fixed regions."""
    detector.eval()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 96, 112, generator=generator)
    corners = torch.rand(2, 6, 2, generator=generator) * 50
    regions = [InstanceData(bboxes=torch.cat([c, c + 40], -1)) for c in corners]
    with torch.no_grad():
        maps = detector.extract_feat(images)
        scores, shifts = detector.rpn_head(maps)
        heads = detector.roi_head.forward(maps, regions)
    return [*maps, *scores, *shifts, *heads]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_a_published_detector_as_the_start(
    theirs: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    detector, model, file = theirs
    settings = {**model, "backbone": {**OURS, "frozen_stages": 1}}
    ours = start_detector(settings, CLASSES, file)
    told = caplog.text
    assert any(isinstance(module, KWLayer) for module in ours.backbone.modules())
    assert_same(outputs(ours), outputs(detector))
    parts = "backbone 126, neck 16, rpn_head 6, roi_head.bbox_head 8, roi_head.mask_head 6"
    assert f"tensors loaded: {parts}" in told
    assert "model.backbone.weights elsewhere.pth is not read" in told
    for words in ("start afresh", "not used", "other names"):
        assert words not in told
    # What was started so is a start itself: converted, or on mmdetection's own backbone.
    torch.save({"state_dict": ours.state_dict()}, tmp_path / "ours.pth")
    assert_same(
        outputs(start_detector(settings, CLASSES, str(tmp_path / "ours.pth"))), outputs(ours)
    )
    static = {**OURS, "network": TWIN}
    for backbone in (THEIRS, static):
        again = start_detector({**model, "backbone": backbone}, CLASSES, file)
        assert_same(outputs(again), outputs(detector))


def test_other_classes_and_other_parts(
    theirs: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    detector, model, file = theirs
    settings = {**model, "backbone": OURS}
    more = start_detector(settings, [*CLASSES, "white", "black"], file)
    told = caplog.text
    assert "start afresh: 6: roi_head.bbox_head.fc_cls.weight [6, 32] ([4, 32] in the file)" in told
    assert "roi_head.mask_head.conv_logits.bias [5] ([3] in the file)" in told
    fresh = ("bbox_head.fc_cls", "bbox_head.fc_reg", "mask_head.conv_logits")
    before = detector.state_dict()
    for name, value in more.state_dict().items():
        if not name.startswith(("backbone.", *(f"roi_head.{head}" for head in fresh))):
            torch.testing.assert_close(value, before[name])
    assert_same(outputs(more)[:-3], outputs(detector)[:-3])

    caplog.clear()
    start_detector(settings, ["green", "red", "blue"], file)
    assert "other names, heads loaded as: 2: red -> green, green -> red" in caplog.text

    boxes = copy.deepcopy(settings)
    boxes["type"] = "FasterRCNN"
    for key in ("mask_head", "mask_roi_extractor"):
        boxes["roi_head"][key] = None
    faster = start_detector(boxes, CLASSES, file)
    assert "not used: 6: roi_head.mask_head.convs.0.conv.weight" in caplog.text
    torch.save({"state_dict": faster.state_dict()}, tmp_path / "faster.pth")
    start_detector(settings, CLASSES, str(tmp_path / "faster.pth"))
    assert "start afresh: 6: roi_head.mask_head.convs.0.conv.weight" in caplog.text


def test_detectors_that_do_not_fit(theirs: Any, tmp_path: Path) -> None:
    detector, model, file = theirs
    settings = {**model, "backbone": OURS}
    wider = copy.deepcopy(settings)
    wider["roi_head"]["bbox_head"]["fc_out_channels"] = 48
    with pytest.raises(CheckpointError, match=r"shared_fcs\.0\.weight is \[32, 784\]"):
        start_detector(wider, CLASSES, file)
    path = tmp_path / "other.pth"
    state = detector.state_dict()
    del state["neck.fpn_convs.0.conv.weight"]
    state["rpn_head.more"] = torch.zeros(1)
    torch.save({"state_dict": state}, path)
    ours = build_detector({**settings, "backbone": {**OURS, "weights": None}}, CLASSES)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(
        CheckpointError,
        match=r"missing neck\.fpn_convs\.0\.conv\.weight\n  unexpected rpn_head\.more",
    ):
        detection_start._load(ours, read_detector(str(path)), settings, CLASSES)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name]), name
    torch.save({"state_dict": {k: v for k, v in state.items() if k[:4] == "back"}}, path)
    with pytest.raises(CheckpointError, match="a backbone alone"):
        start_detector(settings, CLASSES, str(path))
    torch.save(timm.create_model("resnet18").state_dict(), path)
    with pytest.raises(CheckpointError, match=r"belong to model\.backbone\.weights"):
        start_detector(settings, CLASSES, str(path))


def test_a_run_starts_and_resumes_without_the_file(tmp_path: Path) -> None:
    """Beside a backbone's weights that are not there, and are not asked for."""
    coco = write_coco_set(tmp_path / "set")
    file = tmp_path / "detector.py"
    file.write_text(detector_text(coco) + "\nmodel['backbone']['weights'] = 'none.pth'\n")
    config = load_detector_config(file)
    weights = tmp_path / "start.pth"
    start = {**config.model, "backbone": {**config.model["backbone"], "weights": None}}
    torch.save({"state_dict": trained(build_detector(start, CLASSES)).state_dict()}, weights)
    options = [f"load_from={weights}", "optimizer.lr=1e-9"]
    config = load_detector_config(file, options)
    assert config.run.load_from == str(weights)
    work_dir = tmp_path / "run"
    train(config, work_dir)
    expected = torch.load(weights)["state_dict"]
    found = torch.load(work_dir / "last.pth", weights_only=True)["state_dict"]
    for name, value in found.items():
        if "running" not in name and "batches" not in name:
            torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)
    weights.unlink()
    (work_dir / "epoch_2.pth").unlink()
    resolved = load_detector_config(work_dir / "config.py")
    assert dataclasses.replace(resolved, source=config.source) == config
    train(resolved, work_dir, resume=work_dir / "epoch_1.pth")
    assert evaluate_checkpoint(resolved, work_dir / "last.pth")
    with pytest.raises(CheckpointError, match=r"start\.pth: no such file"):
        train(resolved, tmp_path / "anew")


def test_what_a_configuration_may_say(tmp_path: Path) -> None:
    file = tmp_path / "detector.py"
    text = detector_text(tmp_path)
    file.write_text(text + "\nload_from = 'https://somewhere/detector.pth'\n")
    with pytest.raises(ConfigError, match=r"detector\.py:\d+: load_from.*download it first"):
        load_detector_config(file)
    file.write_text(text + "\nmodel['backbone']['network']['weights'] = 'timm'\n")
    with pytest.raises(ConfigError, match=r"set model\.backbone\.weights to what"):
        load_detector_config(file)
    for more in ("model['backbone']['weights'] = None", "load_from = 'detector.pth'"):
        file.write_text(text + f"\nmodel['backbone']['network']['weights'] = 'timm'\n{more}\n")
        assert "weights" not in load_detector_config(file).model["backbone"]["network"]
