"""mmdetection's own configurations, shrunken: one training step and one prediction of each.

Widths, depths and numbers of proposals are reduced; what the models are made of is not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detection_setup import DEVICES
from mmengine import Config
from torch import Tensor, nn

from kw.detection.origins import installed_path

DEVICE = DEVICES[-1]
CONFIGS = Path(installed_path("mmdet"), ".mim", "configs")
CLASSES = 3
WIDTH = 32
SIZES = [(65, 91), (70, 83), (47, 64)]  # odd; the last image has no objects

MODELS = [
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py",
    "retinanet/retinanet_r50_fpn_1x_coco.py",
    "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
    "atss/atss_r50_fpn_1x_coco.py",
    "detr/detr_r50_8xb2-150e_coco.py",
    "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
    "dino/dino-4scale_r50_8xb2-12e_coco.py",
    "dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py",
    "dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py",
    "faster_rcnn/faster-rcnn_r50_fpn_soft-nms_1x_coco.py",
]

# What a configuration says, and what the tests make of it.
SMALLER: dict[str, dict[Any, Any]] = {
    "num_classes": {80: CLASSES},
    "fc_out_channels": {1024: WIDTH},
    "feedforward_channels": {1024: WIDTH, 2048: WIDTH},
    "num_layers": {6: 2},
    "num_queries": {100: 10, 300: 10, 900: 20},
    "num_dn_queries": {100: 4},
    "num_convs": {4: 1},
    "stacked_convs": {4: 1},
    "nms_pre": {1000: 50, 2000: 50},
    "max_per_img": {100: 10, 300: 10, 1000: 50, 2000: 50},
    "num": {256: 32, 512: 32},
    "score_thr": {0.05: 0.0},  # networks that have not learned are sure of nothing
    "frozen_stages": {1: -1},
}


def shrink(node: Any, widths: list[int], width: int) -> None:
    """Make a model's configuration small, in place; ``widths`` are the backbone's stages'."""
    if isinstance(node, list | tuple):
        for value in node:
            shrink(value, widths, width)
    if not isinstance(node, dict):
        return
    for key, value in list(node.items()):
        if key == "in_channels" and isinstance(value, list | tuple):
            node[key] = widths[-len(value) :]
        elif key == "init_cfg" or (key == "pretrained" and value):
            node[key] = None
        elif key in ("in_channels", "out_channels", "feat_channels", "conv_out_channels"):
            node[key] = {256: width, 2048: widths[-1]}.get(value, value)
        elif key == "num_feats":
            node[key] = width // 2
        elif key == "embed_dims":
            node[key] = width
        elif isinstance(value, int | float) and key in SMALLER:
            node[key] = SMALLER[key].get(value, value)
        else:
            shrink(value, widths, width)


def build(name: str) -> nn.Module:
    """A small network."""
    from mmdet.registry import MODELS as registry
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    torch.manual_seed(0)
    model = Config.fromfile(str(CONFIGS / name)).model
    bottleneck = "dcn" in model.backbone  # basic blocks know no deformable convolution
    base = 8 if bottleneck else 16
    width = 256 if "dino" in name else WIDTH  # DINO's decoder has no other
    shrink(model, [base * 2**i * (4 if bottleneck else 1) for i in range(4)], width)
    if "encoder" in model:  # transformers' heads have the width as a default
        model.bbox_head.embed_dims = width
    model.backbone.update(depth=50 if bottleneck else 18, base_channels=base)
    network = registry.build(model)
    network.init_weights()  # some parameters are not even zero before
    return network.to(DEVICE)


def batch(seed: int = 0) -> dict[str, list[Any]]:
    """Noise with boxes and masks: of polygons, of pixels, and none at all."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks, PolygonMasks
    from mmengine.structures import InstanceData

    rng = np.random.default_rng(seed)
    images, samples = [], []
    for i, (height, width) in enumerate(SIZES):
        count = (3, 2, 0)[i]
        corners = rng.uniform(0, 0.5, (count, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(0.3, 0.5, (count, 2))], 1)
        boxes *= [width, height, width, height]
        if i == 0:
            outlines = [[np.array([x1, y1, x2, y1, x2, y2])] for x1, y1, x2, y2 in boxes]
            masks = PolygonMasks(outlines, height, width)
        else:
            pixels = rng.integers(0, 2, (count, height, width), dtype=np.uint8)
            masks = BitmapMasks(pixels, height, width)
        shape = {"img_shape": (height, width), "ori_shape": (height, width)}
        sample = DetDataSample(metainfo={**shape, "scale_factor": (1.0, 1.0), "img_id": i})
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor(boxes, dtype=torch.float32),
            labels=torch.tensor(rng.integers(0, CLASSES, count)),
            masks=masks,
        )
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0))
        images.append(torch.tensor(rng.integers(0, 256, (3, height, width), dtype=np.uint8)))
        samples.append(sample)
    return {"inputs": images, "data_samples": samples}


def train_step(model: nn.Module) -> dict[str, Tensor]:
    """One step of gradient descent; everything must stay finite."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    data = model.data_preprocessor(batch(), True)
    loss, log = model.parse_losses(model(**data, mode="loss"))
    assert loss.isfinite(), log
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert model.backbone.conv1.weight.grad.any()
    optimizer.step()
    return log


@pytest.mark.parametrize("name", MODELS, ids=lambda name: Path(name).stem)
def test_models_learn_and_predict(name: str) -> None:
    model = build(name)
    log = train_step(model)
    assert len(log) > 2
    model.eval()
    with torch.inference_mode():
        results = model.test_step(batch(seed=1))
    assert len(results) == len(SIZES)
    for result, (height, width) in zip(results, SIZES, strict=True):
        found = result.pred_instances
        assert len(found)
        assert found.bboxes.isfinite().all()
        assert (found.bboxes >= 0).all()
        assert (found.bboxes <= found.bboxes.new_tensor([width, height, width, height])).all()
        assert (found.labels < CLASSES).all()
        if "mask" in name:
            assert found.masks.shape == (len(found), height, width)


@pytest.mark.parametrize("name", MODELS, ids=lambda name: Path(name).stem)
def test_models_learn_under_autocast(name: str) -> None:
    model = build(name)
    with torch.autocast(DEVICE, torch.bfloat16):
        train_step(model)
