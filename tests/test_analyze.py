"""What networks cost: by hand for small ones, and the known figures of the papers' networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tools import call
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kw.config import ConfigError, config_from_mapping, load_config
from kw.models import PAPER_MODELS, build_network
from kw.models.complexity import analyze, count_macs
from kw.warehouse import set_backend

# Multiply-adds in 10^9 and the assembled kernels in 10^6 bytes of float32, for one image of 224 x
# 224: static network, assembly, kernels.
KNOWN = {
    "resnet18": (1.81, 0, 0),
    "kw_resnet18_1d4x": (1.81, 0.385, 45),
    "kw_resnet18_1d2x": (1.81, 0.77, 45),
    "kw_resnet18_1x": (1.81, 0.385, 45),
    "kw_resnet18_4x": (1.81, 1.54, 45),
    "resnet50": (4.09, 0, 0),
    "kw_resnet50_1d2x": (4.09, 4.07, 94),
    "kw_resnet50_1x": (4.09, 2.04, 94),
    "kw_resnet50_4x": (4.09, 8.14, 94),
    "convnext_tiny": (4.46, 0, 0),
    "kw_convnext_tiny_1x": (4.46, 1.23, 111),
}


def small(size: int = 32, **model: Any) -> dict[str, Any]:
    """A configuration: of a ResNet of one block a stage, with 8, 8, 16 and 16 channels."""
    network = {
        "name": "resnet18",
        "num_classes": 10,
        "timm_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
    }
    return {
        "model": {**network, **model},
        "data": {"root": "none", "input_size": size},
        "optimizer": {"lr": 0.1},
        "epochs": 1,
        "total_batch_size": 1,
        "batch_size": 1,
    }


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), (6, 10, 8), 8 * 3 * 9 * 20),
        (nn.Conv2d(6, 6, 3, dilation=2, groups=6), (6, 10, 8), 6 * 9 * 24),
        (nn.Conv1d(4, 5, 3), (4, 9), 5 * 4 * 3 * 7),
        (nn.Linear(6, 8), (5, 6), 8 * 6 * 5),
        (nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2)), (6, 10, 8), 0),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_multiply_adds_by_hand(module, shape, macs, batch):
    assert count_macs(module.to("meta"), torch.empty(batch, *shape, device="meta")) == batch * macs


def test_static_network_by_hand():
    cost = analyze(config_from_mapping(small()))
    stem = 64 * 3 * 49 * 16**2
    stages = [
        (8 * 64 * 9 + 8 * 8 * 9 + 8 * 64) * 8**2,
        (8 * 8 * 9 + 8 * 8 * 9 + 8 * 8) * 4**2,
        (16 * 8 * 9 + 16 * 16 * 9 + 16 * 8) * 2**2,
        16 * 16 * 9 + 16 * 16 * 9 + 16 * 16,
    ]
    assert cost.macs_static == stem + sum(stages) + 16 * 10
    assert (cost.macs_assembly, cost.macs_attention, cost.kernel_bytes) == (0, 0, 0)
    assert cost.warehouses == []


def test_converted_network_by_hand():
    """Cells of 8 x 8, 8 x 8, 16 x 16 and 16 x 16; two for every mixture."""
    warehouse = {"plan": "resnet18", "cell_num_ratio": 2}
    cost = analyze(config_from_mapping(small(kernel_warehouse=warehouse)))
    static = analyze(config_from_mapping(small()))
    # A stage's own 3x3 convolutions and shortcut; the next one's first 3x3 and shortcut.
    mixtures = [(72, 9, 8, 9, 1), (9, 18, 2), (9, 9, 1), (9,)]
    inputs = [(64, 8, 64, 8, 8), (8, 8, 8), (16, 16, 16), (16,)]
    sizes = (64, 64, 256, 256)
    total = [sum(m) for m in mixtures]
    assert [w.mixtures for w in cost.warehouses] == total
    assert [w.cells for w in cost.warehouses] == [2 * m for m in total]
    shapes = [[8, 8, 1, 1], [8, 8, 1, 1], [16, 16, 1, 1], [16, 16, 1, 1]]
    assert [w.cell_shape for w in cost.warehouses] == shapes
    handed_over = [f"layer{stage}.0.downsample.0" for stage in (2, 3, 4)]
    assert [w.layers[-1] for w in cost.warehouses] == [*handed_over, "layer4.0.conv2"]
    assert cost.macs_static == static.macs_static
    assert cost.kernel_bytes == 4 * sum(m * s for m, s in zip(total, sizes, strict=True))
    assert cost.macs_assembly == sum(2 * m * m * s for m, s in zip(total, sizes, strict=True))
    hidden = 16
    assert cost.macs_attention == sum(
        hidden * i + hidden * m * (2 * n + 1)
        for stage_m, stage_i, n in zip(mixtures, inputs, total, strict=True)
        for m, i in zip(stage_m, stage_i, strict=True)
    )
    kernels = cost.kernel_bytes // 4
    assert cost.params > static.params + kernels  # twice the kernels, and the attention


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cell_num_ratio": 0.5, "cell_inplane_ratio": 0.5, "cell_outplane_ratio": 0.5}
        | {"nonlocal_basis_ratio": 0.0625},
    ],
)
def test_parts_sum_to_what_a_forward_pass_does(settings):
    """The converted network, counted in operation by PyTorch, for one image."""
    config = config_from_mapping(small(64, kernel_warehouse={"plan": "resnet18", **settings}))
    network = build_network(config.model).eval()
    set_backend(network, "grouped")
    cost = analyze(config)
    counted = count_macs(network, torch.zeros(1, 3, 64, 64))
    assert counted == cost.macs_static + cost.macs_assembly + cost.macs_attention
    assert cost.params == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", KNOWN)
def test_known_figures(name):
    """To the last digit that is given."""
    model: dict[str, Any] = {"name": name}
    if name in PAPER_MODELS:
        released = PAPER_MODELS[name]
        warehouse = {"plan": released.plan, **released.settings}
        model = {"name": released.backbone, "kernel_warehouse": warehouse}
    cost = analyze(config_from_mapping(small(224, num_classes=1000, timm_args={}, **model)))
    static, assembly, kernels = KNOWN[name]
    assert cost.macs_static / 1e9 == pytest.approx(static, abs=0.005)
    assert cost.macs_assembly / 1e9 == pytest.approx(assembly, abs=0.005)
    assert cost.kernel_bytes / 1e6 == pytest.approx(kernels, abs=0.5)
    assert cost.macs_attention < 0.01 * cost.macs_static


def test_products_of_queries_and_keys_count():
    """DeiT-Tiny: 12 blocks of 197 tokens of 192 channels."""
    deit = small(224, name="deit_tiny_patch16_224", timm_args={})
    tokens, width = 197, 192
    block = 12 * width**2 * tokens + 2 * tokens**2 * width
    patches = 196 * 768 * width
    assert analyze(config_from_mapping(deit)).macs_static == 12 * block + patches + width * 10


def test_refused_image_size_is_named():
    deit = small(200, name="deit_tiny_patch16_224", timm_args={})
    with pytest.raises(ConfigError, match=r"data\.input_size 200.*deit_tiny_patch16_224"):
        analyze(config_from_mapping(deit))


def test_tool(tmp_path: Path):
    configs = [f"configs/demo/{name}.yaml" for name in ("resnet18", "kw_resnet18_1x")]
    file = tmp_path / "new" / "costs.json"
    size = ["--cfg-options", "data.input_size=64"]
    table = call("tools/analyze.py", *configs, "--json", file, *size).stdout
    static, converted = json.loads(file.read_text())
    assert [row["config"] for row in (static, converted)] == configs
    assert [row["model"] for row in (static, converted)] == ["resnet18", "kw_resnet18_1x"]
    assert static["warehouses"] == []
    assert set(converted["warehouses"][0]) == {"name", "cells", "cell_shape", "mixtures", "layers"}
    assert converted["macs_static"] == static["macs_static"]
    assert f"{converted['params'] / 1e6:.2f}M" in table
    for warehouse in converted["warehouses"]:
        assert f"| {warehouse['name']}" in table


def test_tool_checks_every_file_first(tool, capsys, tmp_path: Path):
    with pytest.raises(SystemExit, match="2"):
        tool("tools/analyze.py", "configs/demo/resnet18.yaml", tmp_path / "no.yaml")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert "no such file" in printed.err


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("training", [False, True])
def test_torchs_counter_sees_dynamic_convolutions(device: str, training: bool) -> None:
    """Forward and backward, whatever back end does them; the static network's come three times."""
    options = ["data.input_size=64", "model.timm_args.channels=[32,64,128,256]"]
    config = load_config("configs/imagenet/resnet18/kw_resnet18_4x.yaml", options)
    cost = analyze(config)
    with torch.device(device):
        network = build_network(config.model).train(training)
        images = torch.randn(2, 3, 64, 64)
    with FlopCounterMode(display=False) as counter:
        if training:
            network(images).sum().backward()
        else:
            with torch.no_grad():
                network(images)
    # All but the input's gradient of the first layer, which nobody asks for.
    first = 2 * 64 * 3 * 49 * 32 * 32
    attention = cost.macs_attention
    expected = cost.macs_static + cost.macs_assembly + attention
    if training:
        expected = 3 * cost.macs_static + 4 * cost.macs_assembly + 3 * attention
    macs = counter.get_total_flops() / 2
    assert macs == pytest.approx(2 * expected - training * first, rel=2e-3)
