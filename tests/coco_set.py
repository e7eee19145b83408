"""A set in COCO's format for tests: coloured rectangles on noise, a class for each colour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 40), "blue": (40, 60, 230)}


def write_coco_set(root: Path, train: int = 8, val: int = 5, seed: int = 0) -> Path:
    """Images of different sizes and aspects; the last of each split has no object.

    Category ids have gaps and do not follow the order of the file, as they may.
    """
    rng = np.random.default_rng(seed)
    categories = [{"id": i, "name": n} for i, n in ((7, "blue"), (2, "red"), (4, "green"))]
    for split, count in (("train", train), ("val", val)):
        (root / split).mkdir(parents=True)
        images: list[dict[str, Any]] = []
        objects: list[dict[str, Any]] = []
        for i in range(count):
            width, height = (96, 64) if i % 2 else (64, 80)
            pixels = rng.normal(90, 20, (height, width, 3)).clip(0, 255).astype(np.uint8)
            name = f"{split}_{i}.png"
            images.append({"id": 100 + i, "file_name": name, "width": width, "height": height})
            for _ in range(0 if i == count - 1 else 1 + i % 3):
                w, h = (int(v) for v in rng.integers(16, 40, 2))
                x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
                category = categories[int(rng.integers(3))]
                pixels[y : y + h, x : x + w] = COLOURS[str(category["name"])]
                objects.append(
                    {
                        "id": 1 + len(objects),
                        "image_id": 100 + i,
                        "category_id": category["id"],
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": 0,
                        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                    }
                )
            Image.fromarray(pixels).save(root / split / name)
        (root / "annotations").mkdir(exist_ok=True)
        content = {"images": images, "annotations": objects, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def detector_text(root: Path) -> str:
    """A Mask R-CNN so small that an epoch takes a second, on the set under ``root``."""
    return f"""
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py"]
_network = dict(
    name="resnet18",
    timm_args=dict(channels=[8, 8, 16, 16], layers=[1, 1, 1, 1]),
    kernel_warehouse=dict(plan="resnet18", start="paper"),
)
model = dict(
    data_preprocessor=dict(pad_size_divisor=16),
    backbone=dict(_delete_=True, type="kw.Backbone", network=_network, frozen_stages=0),
    neck=dict(in_channels=[8, 8, 16, 16], out_channels=16, num_outs=4),
    rpn_head=dict(
        in_channels=16,
        feat_channels=16,
        anchor_generator=dict(scales=[6], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32),
        mask_roi_extractor=dict(out_channels=16, roi_layer=dict(output_size=7)),
        mask_head=dict(num_convs=1, in_channels=16, conv_out_channels=16),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=100, max_per_img=40),
        rcnn=dict(sampler=dict(num=32), mask_size=14),
    ),
    test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=40), rcnn=dict(max_per_img=10)),
)
data = dict(
    root={str(root)!r},
    train_annotations="annotations/instances_train.json",
    train_images="train",
    val_annotations="annotations/instances_val.json",
    val_images="val",
    workers=0,
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomChoiceResize", scales=[(96, 96), (112, 112)], keep_ratio=True),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(96, 96), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "ori_shape", "img_shape", "scale_factor")),
]
epochs = 2
total_batch_size = 4
batch_size = 2
log_interval = 1
optimizer = dict(name="adamw", lr=1e-3, weight_decay=0.05, exempt_from_decay="norm")
schedule = dict(name="step", milestones=[1])
"""
