"""Small networks that the tests of layers, attention and temperature share."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from kw import convert, set_temperature
from kw.warehouse import (
    KWConv1d,
    KWConv2d,
    KWConv3d,
    KWLinear,
)

# Attention at random: where a static network is kept, coefficients do not depend on the input.
PAPER = {"start": "paper"}
LAYERS = {
    "conv1d": (lambda **kw: KWConv1d(6, 8, 3, padding=1, **PAPER | kw), (4, 6, 9)),
    "conv2d": (lambda **kw: KWConv2d(6, 8, 3, padding=1, groups=2, **PAPER | kw), (4, 6, 7, 5)),
    "conv3d": (lambda **kw: KWConv3d(6, 8, 3, padding=1, **PAPER | kw), (4, 6, 3, 5, 4)),
    "linear": (lambda **kw: KWLinear(6, 8, **PAPER | kw), (4, 5, 6)),
}
every_layer = pytest.mark.parametrize(("build", "shape"), LAYERS.values(), ids=LAYERS)
norms = pytest.mark.parametrize("norm", ["batch", "layer"])


def small(seed=0, **settings):
    """Three layers on two warehouses, with biases that are not zero and attention at random."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 16, 1, stride=2),
    )
    rules = [{"match": "0|2", "warehouse": "spatial"}, {"match": "3", "warehouse": "pointwise"}]
    convert(model, {"rules": rules, **PAPER, **settings})
    set_temperature(model, 0.3)
    return model


def images(batch=3, seed=1, **factory):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 8, 6, generator=generator).to(**factory)


def disturb(model):
    """Normalisation away from its initial state, so that forgetting it shows."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.LayerNorm):
            for name, value in module.state_dict().items():
                if value.is_floating_point():
                    noise = torch.rand(value.shape, generator=generator)
                    value.copy_(noise + 0.5 if name != "bias" else noise)
    return model


def assert_trains(model, x):
    """A backward pass reaches every parameter and leaves finite gradients."""
    model.zero_grad()
    y = model(x)
    y.float().square().mean().backward()
    assert y.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    return y


def narrow_resnet(**settings):
    torch.manual_seed(0)
    return timm.create_model("resnet18", channels=[8, 16, 16, 32], num_classes=5, **settings)


def chain(*layers):
    """A root that is no Sequential, with layers ``a``, ``b``, ..."""
    model = nn.Module()
    for name, layer in zip("abcdef", layers, strict=False):
        model.add_module(name, layer)
    return model


def plan_of(*rules, **rest):
    return {"rules": [{"match": m, "warehouse": w} for m, w in rules], **rest}
