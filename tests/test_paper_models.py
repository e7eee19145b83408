"""The papers' networks: sizes to the last parameter, warehouses, and that they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from kw import convert, set_temperature
from kw.models.paper_models import PAPER_MODELS
from kw.warehouse import PLANS, KWLayer

FIXTURE = Path(__file__).parent / "fixtures/released_models.json"
# name -> {"parameters": count, "warehouses": [[cells, out, in, [outputs of fc2 ...]], ...]}
CHECKPOINTS = json.loads(FIXTURE.read_text())["models"]
DEIT_MILLIONS = {"kw_deit_tiny_1x": 6.43, "kw_deit_tiny_4x": 21.55, "kw_deit_small_1x": 24.36}


def build(name: str, **settings: Any) -> nn.Module:
    if name not in PAPER_MODELS:
        return timm.create_model(name, **settings)
    released = PAPER_MODELS[name]
    static = timm.create_model(released.backbone, **settings)
    return convert(static, released.plan, start="paper", **released.settings)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_released_checkpoint(name: str) -> None:
    """Parameters, and number, order and shape of warehouses and of the layers in each."""
    with torch.device("meta"):
        model = build(name)
    assert parameters(model) == CHECKPOINTS[name]["parameters"]
    warehouses = []
    for warehouse in getattr(model, "warehouses", {}).values():
        cells, (out, inputs, *kernel) = warehouse.partition.cells, warehouse.partition.cell_shape
        assert set(kernel) == {1}
        assert warehouse.cells.shape == (cells, out * inputs)
        layers = [model.get_submodule(shape.name) for shape in warehouse.shapes]
        assert all(layer.warehouse is warehouse for layer in layers)
        logits = [layer.attention.fc2.out_features for layer in layers]
        warehouses.append([cells, out, inputs, logits])
    assert warehouses == CHECKPOINTS[name]["warehouses"]


def test_every_released_model_is_held_to_something() -> None:
    assert set(PAPER_MODELS) == {n for n in CHECKPOINTS if n.startswith("kw_")} | set(DEIT_MILLIONS)
    assert {released.plan for released in PAPER_MODELS.values()} == set(PLANS)


@pytest.mark.parametrize("name", DEIT_MILLIONS)
def test_deit_has_the_reported_size(name: str) -> None:
    """The layout is ours; the papers' sizes, to two digits, are all that is known of theirs."""
    with torch.device("meta"):
        model = build(name)
    assert abs(parameters(model) / 1e6 - DEIT_MILLIONS[name]) < 0.06
    static = {"patch_embed.proj", "head", *(f"blocks.{i}.attn.proj" for i in range(12))}
    kept = {n for n, m in model.named_modules() if type(m) in (nn.Conv2d, nn.Linear)}
    assert static == {name for name in kept if ".attention." not in name}


# One model a plan, the smallest, and the low-rank attention.
RUN = [
    "kw_resnet18_1d4x",
    "kw_resnet50_1d2x",
    "kw_mobilenetv2_050_1d2x",
    "kw_mobilenetv2_050_1x",
    "kw_mobilenetv2_050_4x",
    "kw_convnext_tiny_1x",
    "kw_deit_tiny_1x",
]


@pytest.mark.parametrize("name", RUN)
def test_forward_at_a_small_size(name: str) -> None:
    torch.manual_seed(0)
    settings = {"img_size": 32} if "deit" in name else {}
    model = build(name, num_classes=7, **settings).eval()
    set_temperature(model, 0.5)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        logits = model(images)
        alone = model(images[1:])
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    # Kernels belong to samples: what else is in the batch does not matter.
    torch.testing.assert_close(logits[1:], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["kw_mobilenetv2_050_1d2x", "kw_resnet18_1d4x"])
def test_backbone_without_classifier(name: str) -> None:
    with torch.device("meta"):
        model = build(name, num_classes=0)
    assert "classifier" not in model.warehouses
    assert any(isinstance(module, KWLayer) for module in model.modules())
