"""The authors' checkpoints: translated whole or refused, and their outputs kept.

The released files are made from their key lists with random values; what such a network gives is
computed by ``released_reference.py``, which knows the authors' names alone.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from make_released_keys import FIXTURE
from released_reference import Reference, State
from test_tools import ROOT, call
from torch import Tensor, nn

import kw
from kw.config import config_from_mapping
from kw.engine import load_checkpoint
from kw.models import RELEASED, build_network
from kw.models.released_weights import FAMILIES, ReleasedError, read_released, translate

KEYS: dict[str, dict[str, Any]] = json.loads(lzma.decompress(FIXTURE.read_bytes()))
TOLERANCE = 1e-4  # of the largest value


def config_of(released: str) -> dict[str, Any]:
    """The network of a released configuration: kw1d2x_resnet18 is our kw_resnet18_1d2x."""
    ratio, _, backbone = released.removeprefix("kw").rpartition("x_")
    model: dict[str, Any] = {"name": backbone}
    if ratio:
        ours = RELEASED[f"kw_{backbone}_{ratio}x"]
        assert ours.backbone == backbone
        model["kernel_warehouse"] = {"plan": ours.plan, **ours.settings}
    return {
        "model": model,
        "data": {"root": "none"},
        "optimizer": {"lr": 0.1},
        "epochs": 1,
        "total_batch_size": 1,
        "batch_size": 1,
    }


# One of every family and every way of sharing, the smaller where several are alike.
COMPUTED = [
    "resnet50",
    "mobilenetv2_050",
    "convnext_tiny",
    "kw1x_resnet18",
    "kw1d4x_resnet18",
    "kw2x_resnet18",
    "kw1d2x_resnet50",
    "kw1x_mobilenetv2_100",
    "kw1d2x_mobilenetv2_050",
    "kw4x_mobilenetv2_050",
    "kw1x_convnext_tiny",
]


@cache
def meta_network(released: str) -> tuple[nn.Module, str]:
    """A network without data, and timm's name of its backbone."""
    model = config_from_mapping(config_of(released)).model
    with torch.device("meta"):
        return build_network(model), model.name


def empty_state(released: str) -> State:
    shapes = KEYS[released]["state"]
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def random_state(released: str, seed: int = 0) -> State:
    """Values of which none is zero, none like another, and no branch without effect."""
    torch.manual_seed(seed)
    state = {}
    for name, shape in KEYS[released]["state"].items():
        value = torch.randn(shape)
        if name.endswith("num_batches_tracked"):
            value = torch.tensor(7)
        elif name.endswith("running_var"):
            value = 1 + value.abs()
        elif name.startswith("warehouse_manager"):
            # Mixed with coefficients of about 1 / n, in a kernel of some 8 cells' input channels.
            value *= (shape[0] / (8 * shape[2])) ** 0.5
        elif len(shape) > 1 and not name.endswith("gamma"):
            value *= value[0].numel() ** -0.5
        else:
            value = 0.1 * value + (1 if name.endswith(("weight", "gamma")) else 0)
        state[name] = value
    return state


def assert_agrees(actual: Tensor, expected: Tensor, what: str) -> None:
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error < TOLERANCE, f"{what}: {error:.1e} of the largest value"


def test_fixture_is_complete():
    assert len(KEYS) == 20
    assert sum(name.startswith("kw") for name in KEYS) == 15


@pytest.mark.parametrize("released", KEYS)
def test_every_released_state_fits_strictly(released):
    network, backbone = meta_network(released)
    assert sum(p.numel() for p in network.parameters()) == KEYS[released]["parameters"]
    state = translate(empty_state(released), network, backbone, released)
    assert list(state) == list(network.state_dict())
    network.load_state_dict(state, strict=True, assign=True)


@pytest.mark.parametrize("released", COMPUTED)
@torch.no_grad()
def test_outputs_are_the_authors(released):
    """Logits, and what every layer gives, at the temperatures of training and evaluation."""
    names = KEYS[released]["warehouse_names"]
    _, backbone = meta_network(released)
    family = next(f for f in FAMILIES.values() if f.fits(backbone))
    network = kw.build_model(config_of(released)).eval()
    outputs: State = {}
    for name, module in network.named_modules():
        module.register_forward_hook(lambda _, __, y, name=name: outputs.update({name: y}))
    state = random_state(released)
    images = torch.randn(2, 3, 64, 64)
    for tau in (0.0, 0.3, 1.0) if names else (0.0,):
        Reference(state, names, tau, calibrate=True).forward(images)
        reference = Reference(state, names, tau)
        expected = reference.forward(images)
        assert (expected[0] - expected[1]).abs().mean() > 0.02  # images differ
        network.load_state_dict(translate(state, network, backbone, released))
        if names:
            kw.set_temperature(network, tau)
        assert_agrees(network(images), expected, f"logits at tau {tau}")
        for name, y in reference.outputs.items():
            ours = outputs[family.rename(f"{name}.")[:-1]]
            # A linear layer takes and gives channels last; theirs is a convolution here.
            ours = ours.movedim(-1, 1) if ours.dim() == 4 and ours.shape != y.shape else ours
            assert_agrees(ours.reshape(y.shape), y, f"{name} at tau {tau}")
