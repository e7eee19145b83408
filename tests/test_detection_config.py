"""Configurations of detectors: shipped ones, what is set where, and mistakes answered in one go."""

from __future__ import annotations

import dataclasses
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from breadth import breadth
from coco_set import detector_text, write_coco_set
from torch import nn

pytest.importorskip("mmdet", reason="the detection extra is not installed", exc_type=ImportError)

from mmengine import Config

from kw.config import ConfigError
from kw.data import DataError
from kw.detection import load_detector_config
from kw.detection.detector import build_detector, has_masks, lr_scales
from kw.detection.origins import installed_path
from kw.detection.sets import trained_classes
from kw.warehouse import KWLayer

COCO = Path(__file__).parents[1] / "configs" / "coco"
SHIPPED = sorted(COCO.glob("*.py"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "detector.py"
    path.write_text(detector_text(tmp_path))
    return path


def with_text(path: Path, text: str) -> Path:
    path.write_text(path.read_text() + text)
    return path


QUICK = ("mask_rcnn_convnext_tiny", "faster_rcnn_kw_mobilenetv2_100_1x", "mask_rcnn_resnet50")


@pytest.mark.parametrize(
    "path",
    breadth(SHIPPED, [path for path in SHIPPED if path.stem in QUICK]),
    ids=lambda path: path.stem,
)
def test_shipped_configurations_build(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = load_detector_config(path, ["model.backbone.weights=null"])
    run, backbone = config.run, config.model["backbone"]
    assert (run.epochs, run.total_batch_size, run.batch_size) == (12, 16, 2)
    assert (run.optimizer.name, run.optimizer.lr, run.optimizer.weight_decay) == (
        "adamw",
        1e-4,
        0.05,
    )
    assert run.optimizer.exempt_from_decay == "norm"
    assert run.temperature_epochs == 0
    is_convnext = "convnext" in path.stem
    assert run.schedule.milestones == ([9, 11] if is_convnext else [8, 11])
    assert backbone.get("frozen_stages", -1) == (-1 if is_convnext else 1)
    assert ("kernel_warehouse" in backbone["network"]) == ("kw_" in path.stem)
    head = path.read_text()
    weights = re.search(r'weights="work_dirs/(\w+)/best.pth"', head)
    assert weights is not None
    assert path.stem.endswith(weights[1])
    assert f"configs/coco/{path.name}" in head
    if path.stem.startswith("faster_rcnn_") and "kw_mobilenet" not in path.stem:
        return  # a second building of the same backbone takes seconds
    detector = build_detector(config.model, ["a", "b", "c"])
    assert has_masks(detector) == path.stem.startswith("mask_rcnn")
    assert detector.roi_head.bbox_head.num_classes == 3
    scales = set(lr_scales(detector, run.optimizer.layer_decay).values())
    assert len(scales) == (7 if is_convnext else 0)


def test_the_demo_learns_what_it_is_evaluated_on() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = load_detector_config(COCO.parent / "demo" / "overfit_coco.py")
    data = config.run.data
    assert (data.train_annotations, data.train_images) == (data.val_annotations, data.val_images)
    assert not [step for step in config.train_pipeline if "Random" in step["type"]]
    assert config.model["backbone"].get("weights") is None
    detector = build_detector(config.model, ["a", "b", "c"])
    assert has_masks(detector)
    assert any(isinstance(module, KWLayer) for module in detector.backbone.modules())
    # Few images an update: no statistics over the batch.
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in detector.modules())


def test_a_resolved_configuration_reads_back(file: Path, tmp_path: Path) -> None:
    options = ["optimizer.lr=3e-3", "test_pipeline.1.scale=[64,64]", "train_pipeline.2.prob=0.25"]
    config = load_detector_config(file, options)
    assert config.run.optimizer.lr == 3e-3
    assert config.test_pipeline[1]["scale"] == (64, 64)
    assert config.train_pipeline[2]["prob"] == 0.25
    home = load_detector_config(file, ["data.root=~/coco"])  # as a classifier's
    assert home.run.data.root == str(Path.home() / "coco")
    resolved = tmp_path / "config.py"
    resolved.write_text(config.to_python())
    again = load_detector_config(resolved)
    assert dataclasses.replace(again, source=config.source) == config


def test_the_backbone_is_read_from_its_file(file: Path) -> None:
    """Beside the configuration or in the working directory; single settings can be overridden."""
    network = Path("../imagenet/resnet18/kw_resnet18_4x.yaml")
    with_text(file, f"\nmodel['backbone']['network'] = {str(network)!r}\n")
    beside = file.parent.parent / "imagenet" / "resnet18"
    source = COCO.parent / "imagenet"
    if not beside.exists():
        beside.parent.mkdir(exist_ok=True)
        beside.symlink_to(source / "resnet18")
        (file.parent.parent / "_base_").symlink_to(COCO.parent / "_base_")
    ratio = "model.backbone.network.kernel_warehouse.cell_num_ratio"
    backbone = load_detector_config(file).model["backbone"]
    assert backbone["network"]["kernel_warehouse"]["cell_num_ratio"] == 4
    backbone = load_detector_config(file, [f"{ratio}=2"]).model["backbone"]
    assert backbone["network"]["kernel_warehouse"]["cell_num_ratio"] == 2


MISTAKES: list[tuple[str, list[str], str]] = [
    ("\nepoch = 3\n", [], r"detector\.py:\d+: epoch: expected a known key; did you mean epochs\?"),
    ("\nepochs = 0\n", [], r"detector\.py:\d+: epochs = 0: expected an integer >= 1"),
    ("\ndel epochs\n", ["seed=1"], r"detector\.py: epochs is missing: expected an integer >= 1"),
    ("\nepochs = '3'\n", [], r"epochs = '3': expected an integer"),
    ("\ndata = dict(root='x',\n  worker=1)\n", [], r"detector\.py:\d+: data\.worker = 1.*workers"),
    ("\noptim_wrapper = dict()\n", [], r"optim_wrapper is mmdetection's .* set optimizer, ema"),
    (
        "\nschedule = dict(name='step', milestones=[1, 9])\n",
        [],
        r"schedule\.milestones.*less than epochs",
    ),
    ("\nbatch_size = 3\n", [], "total_batch_size = 4: expected a multiple of batch_size"),
    ("\ndata = dict(classes=['a', 'a'])\n", [], r"data\.classes"),
    ("\n1 / 0\n", [], r"cannot be run: ZeroDivisionError"),
    ("\nmodel = (\n", [], r"detector\.py:\d+: not valid Python"),
    ("\n_base_ = ['none.py']\n", [], r"no such file: .*none\.py"),
    ("\n_base_ = ['detector.py']\n", [], "circle"),
    ("", ["epoch=3"], "--cfg-options: epoch: expected a known key; did you mean epochs"),
    ("", ["epochs=three"], "epochs = 'three'"),
    ("", ["model.backbon.frozen_stages=1"], r"there is no model\.backbon"),
    ("", ["train_pipeline.9.prob=1"], r"there is no train_pipeline\.9"),
    ("", ["epochs"], "expected KEY=VALUE"),
]


@pytest.mark.parametrize(("text", "options", "message"), MISTAKES, ids=[m[2] for m in MISTAKES])
def test_mistakes_are_named(file: Path, text: str, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_detector_config(with_text(file, text), options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["model.neck.in_channels=[8,8,16,32]"],
            r"model\.neck\.in_channels.*expected \[8, 8, 16, 16\]",
        ),
        (["model.type=MaskRCN"], "MaskRCN"),
        (["model.rpn_head.type=Nothing"], "Nothing"),
        (["model.roi_head.bbox_head.chanels=3"], "chanels"),
        (["model.backbone.frozen=3"], "frozen"),
        (["model.neck.init_cfg={type: Pretrained, checkpoint: no.pth}"], "no.pth can not be found"),
    ],
)
def test_a_detector_that_cannot_be_built(file: Path, options: list[str], message: str) -> None:
    config = load_detector_config(file, options)
    with pytest.raises(ConfigError, match=message):
        build_detector(config.model, ["a"])


def test_mmdetections_own_configurations_serve_as_bases(tmp_path: Path) -> None:
    """Their model and transforms are used; a warning names what is not."""
    path = tmp_path / "retinanet.py"
    path.write_text(
        "_base_ = ['mmdet::retinanet/retinanet_r18_fpn_1x_coco.py']\n"
        f"data = dict(root={str(write_coco_set(tmp_path / 'set'))!r})\n"
        "optimizer = dict(lr=1e-3)\nepochs = 1\ntotal_batch_size = 2\nbatch_size = 2\n"
        "model = dict(backbone=dict(init_cfg=None))\n"
    )
    with pytest.warns(UserWarning, match=r"not used.*train_dataloader.*optim_wrapper|not used"):
        config = load_detector_config(path)
    detector: Any = build_detector(config.model, ["a", "b"])
    assert detector.bbox_head.num_classes == 2
    assert not has_masks(detector)


@pytest.mark.parametrize(
    "name",
    ["rtmdet/rtmdet-ins_tiny_8xb32-300e_coco", "mask2former/mask2former_r50_8xb2-lsj-50e_coco"],
)
def test_heads_that_find_boxes_and_masks_alike(name: str) -> None:
    """Of which mmdetection's ``with_mask`` is false, and Mask2Former counts classes as "things"."""
    path = Path(installed_path("mmdet"), ".mim/configs", f"{name}.py")
    model = Config.fromfile(path, lazy_import=False).model.to_dict()
    model["backbone"]["init_cfg"] = None
    detector = build_detector(model, ["a", "b"])
    assert has_masks(detector)
    head = detector.panoptic_head if "mask2former" in name else detector.bbox_head
    assert head.num_classes == 2
    if "mask2former" in name:
        assert head.class_weight == [1, 1, 0.1]
        model["panoptic_head"]["num_stuff_classes"] = 53
        with pytest.raises(ConfigError, match=r"panoptic_head\.num_stuff_classes = 53: expected 0"):
            build_detector(model, ["a", "b"])


@pytest.mark.filterwarnings("ignore:.*not used, from mmdetection")
def test_base_files_whose_variables_have_names_of_a_run(file: Path) -> None:
    """RTMDet's has a string ``checkpoint``, which is no setting of checkpoints."""
    text = "_base_ = ['mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py']\n"
    rest = file.read_text().partition("data = dict(")
    file.write_text(f"{text}data = dict({rest[2]}")
    config = load_detector_config(file, ["checkpoint.keep=7"])
    assert (config.run.checkpoint.keep, config.run.checkpoint.interval) == (7, 1)
    file.write_text(f"{file.read_text()}checkpoint = 'mine'\n")
    with pytest.raises(ConfigError, match=r"detector\.py:\d+: checkpoint = 'mine': expected a map"):
        load_detector_config(file)


def test_shared_branches_are_shared_from_the_start() -> None:
    """Or a checkpoint of DDQ would have names that a new detector does not take."""
    path = Path(installed_path("mmdet"), ".mim/configs/ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py")
    model = Config.fromfile(path, lazy_import=False).model.to_dict()
    model["backbone"]["init_cfg"] = None
    detector = build_detector(model, ["a", "b"])
    assert detector.decoder.aux_reg_branches is detector.bbox_head.aux_reg_branches


def test_a_network_is_looked_for_beside_the_file_that_names_it(file: Path, tmp_path: Path) -> None:
    """Not beside a file elsewhere that inherits from it."""
    text = file.read_text()
    start = text.index("_network = dict(")
    end = text.index("model = dict(", start)
    for folder, classes in (("base", 8), ("mine", 16)):
        (tmp_path / folder).mkdir()
        channels = [classes, 8, 16, 16]
        network = (
            f"model: {{name: resnet18, timm_args: {{channels: {channels}}}, num_classes: 2}}\n"
        )
        network += (
            "data: {root: x, input_size: 32}\nepochs: 1\ntotal_batch_size: 1\nbatch_size: 1\n"
        )
        network += "optimizer: {name: sgd, lr: 0.1}\nschedule: {name: cosine}\n"
        (tmp_path / folder / "network.yaml").write_text(network)
    base = tmp_path / "base" / "detector.py"
    base.write_text(text[:start] + '_network = "network.yaml"\n' + text[end:])
    inherits = tmp_path / "mine" / "detector.py"
    inherits.write_text('_base_ = ["../base/detector.py"]\nepochs = 3\n')
    for path in (base, inherits):
        network = load_detector_config(path).model["backbone"]["network"]
        assert network["timm_args"]["channels"][0] == 8


def test_the_classes_of_a_checkpoint_meet_those_of_the_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kw")
    root = write_coco_set(tmp_path / "set")
    path = tmp_path / "detector.py"
    path.write_text(detector_text(root))
    data = load_detector_config(path, ["data.classes=[red, blue]"]).run.data
    state = {"meta": {"classes": ["green", "red"]}}
    assert trained_classes(state, data, "best.pth") == ["green", "red"]
    assert "objects of blue are left out: best.pth does not detect them" in caplog.text
    assert "data.classes is not used: best.pth detects green, red" in caplog.text
    with pytest.raises(DataError, match=r"has no category yellow, which best\.pth detects"):
        trained_classes({"meta": {"classes": ["red", "yellow"]}}, data, "best.pth")
    assert trained_classes({}, data, "best.pth") == ["red", "blue"]


def test_another_number_of_classes_is_said(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kw")
    option = "model.roi_head.bbox_head.num_classes=5"
    detector = build_detector(load_detector_config(file, [option]).model, ["a", "b", "c"])
    assert detector.roi_head.bbox_head.num_classes == 3
    key = "model.roi_head.bbox_head.num_classes"
    assert caplog.text.count("is not used") == 1
    assert f"{key} = 5 is not used: the data have 3 categories" in caplog.text
