"""The settings of a detector's run, as types (:mod:`kw.config.schema` explains the declarations).

mmdetection's registries check what mmdetection reads: ``model``, ``train_pipeline`` and
``test_pipeline``.
"""

# ruff: noqa: RUF009 -- setting() and table() return dataclasses.field()
from __future__ import annotations

from dataclasses import dataclass, field

from ..config.checking import Schema
from ..config.fields import setting, table
from ..config.rules import Expect, check_run_rules, ignored_run_settings
from ..config.run_schema import BadImagesConfig, OptimizerConfig, RunConfig


@dataclass
class CocoDataConfig:
    """A data set in COCO's format; file and folder names are relative to ``root``."""

    root: str = setting(doc="folder of the data set", example="data/coco")
    train_annotations: str = setting(
        "annotations/instances_train2017.json", "annotation file of the training images"
    )
    train_images: str = setting("train2017", "folder of the training images")
    val_annotations: str = setting(
        "annotations/instances_val2017.json", "annotation file of the test images"
    )
    val_images: str = setting("val2017", "folder of the test images")
    classes: list[str] | None = setting(
        None, "category names to detect; null = all of the training file, in the order of their ids"
    )
    workers: int = setting(4, "loader processes per device; 0 loads in the process", "[0, 512]")
    keep_empty: bool = setting(False, "train on images without objects as well")
    min_size: int = setting(
        32, "training images with a shorter side are left out, pixels", "[0, 100_000]"
    )
    group_by_aspect: bool = setting(
        True, "put wide images of an update into the same batches, which needs less padding"
    )
    exif_orientation: str = setting(
        "apply",
        "turn images as their EXIF data say, or leave them as stored; annotations must fit",
        choices=("apply", "ignore"),
    )
    max_detections: int | None = setting(
        None,
        "detections of an image that the detector gives, and of a category in it that evaluation "
        "counts; null = the detector's own number, and COCO's 100",
        "[100, 100_000]",
    )
    bad_images: BadImagesConfig = table(BadImagesConfig, "files that cannot be read")
    check: bool = setting(True, "check annotations before training, and before they are tested on")


@dataclass
class LayerDecayConfig:
    """Learning rates that fall from the backbone's last blocks to its stem."""

    rate: float = setting(doc="factor from group to group", bounds="(0, 1]", example=0.95)
    blocks: int = setting(3, "blocks of a stage that make a group", "[1, 1000]")


@dataclass(kw_only=True)
class DetectionOptimizerConfig(OptimizerConfig):
    """The optimizer of a detector."""

    layer_decay: LayerDecayConfig | None = setting(None, "lower rates towards the backbone's stem")


@dataclass
class _Detection:
    # A separate base class, so that the data come first.
    data: CocoDataConfig = field(metadata={"doc": "images and annotations"})


@dataclass(kw_only=True)
class DetectionConfig(RunConfig, _Detection):
    """How a detector is trained."""

    load_from: str | None = setting(
        None,
        "file of a detector, mmdetection's or of this project, to start from with neck and heads; "
        "its backbone in place of model.backbone.weights",
    )
    optimizer: DetectionOptimizerConfig = field(metadata={"doc": "the optimizer"})


def _rules(config: DetectionConfig, expect: Expect) -> None:
    check_run_rules(config, expect)
    classes = config.data.classes
    right = classes is None or 0 < len(classes) == len(set(classes))
    expect(right, "different names; null for all of the file", "data.classes")
    expect("://" not in (config.load_from or ""), "a file: download it first", "load_from")


SCHEMA = Schema(DetectionConfig, _rules, ignored_run_settings)
