"""The methods compared with: against their papers' equations, and as conversions."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from breadth import breadth
from networks import assert_trains, disturb, narrow_resnet
from torch import nn

import kw
from kw.config import ConfigError, config_from_mapping
from kw.peers import CondConv2d, CondLinear, DyConv2d, ODConv2d, mixture
from kw.training import train
from kw.warehouse import KWLayer, find_warehouses, has_temperature, set_backend

ROOT = Path(__file__).parents[1]
METHODS = {"condconv": CondConv2d, "dyconv": DyConv2d, "odconv": ODConv2d}
every_method = pytest.mark.parametrize("method", METHODS)
# With those whose layers are tested in test_fdconv.py and test_kerneldna.py.
every_network = pytest.mark.parametrize("method", [*METHODS, "fdconv", "kerneldna"])
SHAPES = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": (2, 1), "bias": False},
    "grouped": {"kernel_size": (3, 2), "dilation": 2, "groups": 2, "padding": 1},
    "pointwise": {"kernel_size": 1, "stride": 2},
    "depthwise": {"kernel_size": 3, "groups": 6, "out_channels": 6, "padding": 1, "bias": False},
}
every_shape = pytest.mark.parametrize("shape", SHAPES)


def build(method, shape, kernels=3, **factory):
    torch.manual_seed(0)
    settings = {"out_channels": 8, **SHAPES[shape], "kernels": kernels, **factory}
    layer = disturb(METHODS[method](6, **settings))
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer.eval()


def inputs(batch=3, **factory):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 6, 9, 8, generator=generator).to(**factory)


# --- the papers' equations, in float64 --------------------------------------------------------


def linear(fc, x):
    y = torch.einsum("oi,bi->bo", fc.weight, x)
    return y if fc.bias is None else y + fc.bias


def squashed(logits):
    return 1 / (1 + torch.exp(-logits))


def competing(logits):
    powers = torch.exp(logits - logits.amax(1, keepdim=True))
    return powers / powers.sum(1, keepdim=True)


def convolved(x, kernels, layer):
    """Every sample with its own kernel ``[B, O, I / g, h, w]``, as a sum over patches."""
    batch, groups, (height, width) = len(x), layer.groups, layer.kernel_size
    patches = F.unfold(x, (height, width), layer.dilation, layer.padding, layer.stride)
    patches = patches.view(batch, groups, -1, height, width, patches.shape[-1])
    kernels = kernels.view(batch, groups, -1, *kernels.shape[2:])
    y = torch.einsum("bgoihw,bgihwp->bgop", kernels, patches).flatten(1, 2)
    spans = [
        x.shape[2 + axis] + 2 * pad - dilation * (size - 1) - 1
        for axis, (pad, dilation, size) in enumerate(
            zip(layer.spec.padding, layer.dilation, layer.kernel_size, strict=True)
        )
    ]
    return y.unflatten(2, [s // step + 1 for s, step in zip(spans, layer.stride, strict=True)])


def whole_kernels(layer):
    height, width = layer.kernel_size
    return layer.warehouse.cells.view(-1, layer.out_channels, 6 // layer.groups, height, width)


def condconv(layer, x, temperature):
    alpha = squashed(linear(layer.attention.fc, x.mean((2, 3))))
    kernels = torch.einsum("bk,koihw->boihw", alpha, whole_kernels(layer))
    y = convolved(x, kernels, layer)
    return y if layer.bias is None else y + layer.bias[:, None, None]


def dyconv(layer, x, temperature):
    hidden = linear(layer.attention.fc, x.mean((2, 3))).clamp(min=0)
    pi = competing(linear(layer.attention.kernel_fc, hidden) / temperature)
    y = convolved(x, torch.einsum("bk,koihw->boihw", pi, whole_kernels(layer)), layer)
    if layer.bias is None:
        return y
    return y + torch.einsum("bk,ko->bo", pi, layer.bias)[..., None, None]


def odconv(layer, x, temperature):
    """All four attentions on the kernels, as the paper writes it."""
    branch, (height, width) = layer.attention, layer.kernel_size
    norm = branch.norm
    hidden = linear(branch.fc, x.mean((2, 3))) - norm.running_mean
    hidden = hidden / torch.sqrt(norm.running_var + norm.eps) * norm.weight + norm.bias
    hidden = hidden.clamp(min=0)

    def attention(fc, function, size):
        if fc is None:
            return torch.ones(len(x), size, dtype=x.dtype)
        return function(linear(fc, hidden) / temperature)

    cells = layer.warehouse.cells.view(height, width, -1, layer.out_channels, 6 // layer.groups)
    per_kernel = attention(branch.kernel_fc, competing, 1)
    per_position = attention(branch.spatial_fc, squashed, 1).view(-1, height, width)
    per_filter = attention(branch.filter_fc, squashed, layer.out_channels)
    per_channel = attention(branch.channel_fc, squashed, 6)
    # A kernel sees the channels of its group only.
    own = per_channel.view(len(x), layer.groups, -1)
    own = own.repeat_interleave(layer.out_channels // layer.groups, 1)  # [B, O, I / g]
    kernels = torch.einsum(
        "bk,bhw,bo,boi,hwkoi->boihw", per_kernel, per_position, per_filter, own, cells
    )
    y = convolved(x, kernels, layer)
    return y if layer.bias is None else y + layer.bias[:, None, None]


DEFINITIONS = {"condconv": condconv, "dyconv": dyconv, "odconv": odconv}


@pytest.mark.parametrize(("tau", "temperature"), [(0, 1), (0.5, 15.5), (1, 30)])
@pytest.mark.parametrize("kernels", [1, 3])
@every_shape
@every_method
def test_values_and_gradients_are_the_papers(method, shape, kernels, tau, temperature):
    layer = build(method, shape, kernels, dtype=torch.float64)
    if method != "condconv":
        kw.set_temperature(layer, tau)
    x = inputs(dtype=torch.float64).requires_grad_()
    leaves = [x, *layer.parameters()]
    expected = DEFINITIONS[method](layer, x, temperature)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    for backend in ("auto", "reference", "grouped"):
        layer.set_backend(backend)
        y = layer(x)
        torch.testing.assert_close(y, expected)
        found, defined = (
            torch.autograd.grad(
                (result * weights).sum(), leaves, retain_graph=True, materialize_grads=True
            )
            for result in (y, expected)
        )
        for mine, theirs in zip(found, defined, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_a_linear_layer_is_a_pointwise_convolution():
    torch.manual_seed(0)
    layer = CondLinear(6, 5, kernels=3)
    nn.init.normal_(layer.bias)
    x = torch.randn(4, 6)
    alpha = squashed(linear(layer.attention.fc, x))
    weight = torch.einsum("bk,koi->boi", alpha, layer.warehouse.cells.view(3, 5, 6))
    torch.testing.assert_close(layer(x), torch.einsum("boi,bi->bo", weight, x) + layer.bias)


def test_batch_norm_of_odconv_trains_on_the_batch():
    layer = build("odconv", "3x3").train()
    x = inputs()
    pooled = layer.attention.fc(x.mean((2, 3)))
    before = layer.attention.norm.running_mean.clone()
    layer(x)
    expected = torch.lerp(before, pooled.mean(0), 0.1)
    torch.testing.assert_close(layer.attention.norm.running_mean, expected)


def test_kernels_start_as_static_ones():
    """Kaiming normal with the fan of one kernel, not of all."""
    for cls in METHODS.values():
        cells = cls(64, 64, 3, kernels=4).warehouse.cells
        assert float(cells.detach().std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("method", ["dyconv", "odconv"])
def test_branches_keep_their_start_whatever_the_order_of_resets(method):
    branch = METHODS[method](64, 64, 3, kernels=4).attention
    for module in branch.modules():  # children after their parents
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    weight = branch.kernel_fc.weight.detach()
    assert float(weight.std()) == pytest.approx((2 / len(weight)) ** 0.5, rel=0.3)
    assert not branch.kernel_fc.bias.any()


# --- temperature ------------------------------------------------------------------------------


@torch.no_grad()
def test_the_temperature_levels_the_coefficients():
    layer = build("dyconv", "3x3", 4)
    pooled = inputs().mean((2, 3)) * 10
    spreads = []
    for tau in (1, 0.5, 0):
        kw.set_temperature(layer, tau)
        pi = layer.attention(pooled, layer.warehouse.temperature)
        torch.testing.assert_close(pi.sum(-1), torch.ones(3, 1))
        spreads.append(float((pi - 0.25).abs().max()))
    assert spreads[0] < 0.1 < spreads[2]
    assert spreads == sorted(spreads)


@pytest.mark.parametrize("method", ["dyconv", "odconv"])
def test_one_call_sets_it_everywhere(method):
    model = kw.peers.convert(narrow_resnet(), method)
    assert has_temperature(model)
    assert kw.get_temperature(model) == 0
    kw.set_temperature(nn.Sequential(model), 0.25)
    assert {float(w.temperature) for w in find_warehouses(model)} == {0.25}
    assert kw.get_temperature(copy.deepcopy(model)) == 0.25


def test_condconv_has_none():
    model = kw.peers.convert(narrow_resnet(), "condconv")
    assert not has_temperature(model)
    assert not [name for name in model.state_dict() if "temperature" in name]
    with pytest.raises(ValueError, match="temperature could be set"):
        kw.set_temperature(model, 0)


# --- conversion -------------------------------------------------------------------------------

SIZES = [  # millions, as published; the unnamed ones follow from the same layouts
    ("resnet18", "condconv", 8, 81.35, 1e-3),
    ("resnet18", "dyconv", 4, 45.47, 2e-4),
    ("resnet18", "odconv", 1, 11.94, 5e-4),
    ("resnet18", "odconv", 4, 44.90, 2e-4),
    ("resnet50", "dyconv", 4, 100.88, 1e-4),
    ("resnet50", "odconv", 1, 28.64, 2e-4),
    ("resnet50", "odconv", 4, 90.67, 1e-4),
    ("resnet50", "fdconv", 64, 25.557 + 3.6, 2e-3),  # published as "+3.6M"
    ("mobilenetv2_100", "odconv", 1, 4.94, 1e-3),
    ("mobilenetv2_100", "odconv", 4, 11.51, 1e-3),
    ("mobilenetv2_050", "odconv", 1, 2.43, 2e-3),
    ("mobilenetv2_050", "odconv", 4, 4.44, 2e-3),
]


@pytest.mark.parametrize(("network", "method", "kernels", "size", "tolerance"), SIZES)
def test_sizes_are_the_published_ones(network, method, kernels, size, tolerance):
    with torch.device("meta"):
        model = kw.peers.convert(timm.create_model(network), method, kernels=kernels)
    assert all(p.is_meta for p in model.parameters())
    params = sum(p.numel() for p in model.parameters())
    assert params / 1e6 == pytest.approx(size, rel=tolerance)


@pytest.mark.parametrize(
    ("network", "method", "some", "static"),
    [
        ("resnet18", "dyconv", "layer2.0.downsample.0", ["conv1", "fc"]),
        ("resnet18", "odconv", "layer1.0.conv1", ["conv1", "layer2.0.downsample.0", "fc"]),
        ("resnet18", "condconv", "fc", ["layer3.0.conv2", "layer4.0.downsample.0"]),
        ("resnet50", "condconv", "layer4.0.conv1", ["layer3.5.conv3", "layer4.0.downsample.0"]),
        ("mobilenetv2_050", "condconv", "blocks.4.1.conv_pw", ["blocks.4.0.conv_pw", "conv_head"]),
        ("mobilenetv2_050", "dyconv", "conv_head", ["conv_stem", "classifier"]),
    ],
)
def test_layouts(network, method, some, static):
    with torch.device("meta"):
        model = kw.peers.convert(timm.create_model(network), method)
    dynamic = {name for name, module in model.named_modules() if isinstance(module, KWLayer)}
    assert some in dynamic
    assert not dynamic & set(static)


@every_network
@pytest.mark.parametrize("network", ["resnet18", "mobilenetv2_050"])
@pytest.mark.parametrize("batch", [1, 2])
def test_networks_train(network, method, batch):
    torch.manual_seed(0)
    model = narrow_resnet() if network == "resnet18" else timm.create_model(network, num_classes=5)
    kernels = 1 if method == "kerneldna" else 2
    assert kw.peers.convert(model, method, kernels=kernels, start="paper") is model
    if has_temperature(model):
        kw.set_temperature(model, 0.5)
    assert_trains(model.eval() if batch == 1 else model, torch.randn(batch, 3, 64, 64))


@every_method
def test_one_sample_trains(method):
    """The branch's BatchNorm has no variance over one sample."""
    layer = build(method, "3x3").train()
    assert_trains(layer, inputs(1))


@torch.no_grad()
@every_method
@pytest.mark.parametrize("batch", [1, 3])
def test_back_ends_agree_on_a_network(method, batch):
    model = kw.peers.convert(narrow_resnet(), method, kernels=3, start="paper").eval()
    x = torch.randn(batch, 3, 32, 32)
    expected = model(x)
    for backend in ("reference", "grouped"):
        set_backend(model, backend)
        torch.testing.assert_close(model(x), expected)


@torch.no_grad()
@every_method
def test_samples_do_not_meet(method):
    layer, x = build(method, "3x3"), inputs()
    alone = torch.cat([layer(x[b : b + 1]) for b in range(len(x))])
    torch.testing.assert_close(layer(x), alone)


@torch.no_grad()
@every_network
def test_copies_and_files(method):
    model = disturb(kw.peers.convert(narrow_resnet(), method, start="paper")).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for parameter in model.parameters():
            assert not any(parameter is other for other in twin.parameters())
        assert torch.equal(twin(x), expected)
    with torch.device("meta"):
        other = kw.peers.convert(narrow_resnet(), method)
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other.eval()(x), expected)


@every_method
@pytest.mark.parametrize("shape", ["3x3", "pointwise"])
def test_autocast(method, shape):
    layer, x = build(method, shape), inputs()
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y.float(), expected, atol=0.1, rtol=0.1)
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


@every_method
def test_hooks_are_kept(method):
    model, seen = narrow_resnet(), []
    handle = model.layer4[1].conv2.register_forward_hook(lambda *_: seen.append("after"))
    kw.peers.convert(model, method, layers=r"layer4\.1\.conv2").eval()
    model(torch.randn(1, 3, 32, 32))
    handle.remove()
    model(torch.randn(1, 3, 32, 32))
    assert seen == ["after"]


@every_method
def test_place_mode_and_bias_are_kept(method):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)).double().eval()
    nn.init.normal_(model[1].bias)
    bias = model[1].bias.detach().clone()
    kw.peers.convert(model, method, layers="1", kernels=4)
    assert type(model[0]) is nn.Conv2d
    assert not model[1].training
    assert not model[1].attention.training
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    kept = model[1].bias.detach()
    assert kept.shape == ((4, 6) if method == "dyconv" else (6,))
    assert (kept == bias).all()


# --- the start --------------------------------------------------------------------------------


STATIC = {
    **{
        f"conv {name}": (lambda s=s: nn.Conv2d(6, **{"out_channels": 8, **s}))
        for name, s in SHAPES.items()
    },
    "linear": lambda: nn.Linear(6, 8),
}
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
every_mode = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


def randomise_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


@torch.no_grad()
def assert_same(static, dynamic, x, training=False):
    """The same outputs at every temperature, relative to the largest."""
    for tau in (0, 0.5, 1) if has_temperature(dynamic) else (None,):
        if tau is not None:
            kw.set_temperature(dynamic, tau)
        # Copies, since training moves the statistics.
        expected, found = (copy.deepcopy(m).train(training)(x) for m in (static, dynamic))
        assert found.dtype == expected.dtype
        assert (found - expected).abs().max() <= TOLERANCES[x.dtype] * expected.abs().max()


# Layers of all of these, below: of networks, one kind suffices.
one_dtype = pytest.mark.parametrize("dtype", breadth(TOLERANCES, [torch.float32]))


@every_mode
@one_dtype
@pytest.mark.parametrize("kernels", breadth([1, 4], [4]))
@every_method
def test_a_network_begins_as_the_static_one(method, kernels, dtype, training):
    static = randomise_norms(narrow_resnet()).to(dtype)
    dynamic = kw.peers.convert(copy.deepcopy(static), method, kernels=kernels)
    assert_same(static, dynamic, torch.randn(4, 3, 64, 64, dtype=dtype), training)


@one_dtype
@every_method
def test_a_network_of_depthwise_layers_begins_as_the_static_one(method, dtype):
    torch.manual_seed(0)
    static = randomise_norms(timm.create_model("mobilenetv2_050", num_classes=5)).to(dtype)
    dynamic = kw.peers.convert(copy.deepcopy(static), method, kernels=2)
    assert_same(static, dynamic, torch.randn(2, 3, 32, 32, dtype=dtype))


@every_mode
@every_dtype
@pytest.mark.parametrize("kernels", [1, 3])
@pytest.mark.parametrize(
    ("method", "layer"),
    [(m, name) for m in METHODS for name in STATIC if name != "linear" or m == "condconv"],
)
def test_a_layer_begins_as_the_static_one(method, layer, kernels, dtype, training):
    torch.manual_seed(0)
    static = nn.Sequential(STATIC[layer]()).to(dtype)
    dynamic = kw.peers.convert(copy.deepcopy(static), method, layers="0", kernels=kernels)
    x = inputs(dtype=dtype)
    assert_same(static, dynamic, x.mean((2, 3)) if layer == "linear" else x, training)


def copies(layer):
    """Every block's copies without their mean, ``[m, K, D]``."""
    cells = layer.warehouse.cells.detach().clone()
    cells = cells.view(layer.partition.mixtures, layer.warehouse.kernels, -1)
    return cells - cells.mean(1, keepdim=True)


@pytest.mark.parametrize("is_zero", [False, True])
@every_method
def test_copies_differ_by_noise(method, is_zero):
    """Of a tenth of the kernel's size; of a random kernel's where the static one is zero."""
    layer = nn.Conv2d(32, 64, 3)
    nn.init.normal_(layer.weight, std=0 if is_zero else 0.7)
    layer = kw.peers.convert(nn.Sequential(layer), method, layers="0", kernels=4)[0]
    size = (2 / (64 * 9)) ** 0.5 if is_zero else float(layer.warehouse.cells.detach().std())
    found = float(copies(layer).square().mean().sqrt())
    assert found == pytest.approx(mixture.NOISE * size * 0.75**0.5, rel=0.03)


def steps(method, count):
    """Steps of SGD on a layer of four kernels.

    Returns:
        By how much the four differ in the first gradient of what gives their logits, how the
        inputs change their coefficients in the end, and how far they have moved apart.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 8, 3)).double()
    layer = kw.peers.convert(model, method, layers="0", kernels=4)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    x, target = inputs(8, dtype=torch.float64), torch.randn(8, 8, 7, 6, dtype=torch.float64)
    before, first = copies(layer), None
    for _ in range(count):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        head = layer.attention.fc if method == "condconv" else layer.attention.kernel_fc
        first = head.weight.grad.clone() if first is None else first
        optimizer.step()
    coefficients = layer.attention(layer.pooled(x), layer.warehouse.temperature)
    alpha = coefficients.alpha if method == "odconv" else coefficients
    alpha = alpha.detach().unflatten(-1, (-1, 4))
    alpha = alpha - alpha.mean(-1, keepdim=True)
    gradient, alpha, moved = first - first.mean(0), alpha - alpha.mean(0), copies(layer) - before
    return [float(change.abs().max()) for change in (gradient, alpha, moved)]


@every_method
def test_copies_part(method):
    """From the second step on: in the first, all copies have the same gradient."""
    assert min(steps(method, 2)) > 1e-6
    assert steps(method, 1)[2] < 1e-12


@every_method
def test_exact_copies_would_not(method, monkeypatch):
    monkeypatch.setattr(mixture, "NOISE", 0)
    assert max(steps(method, 2)) < 1e-12


@every_method
def test_the_papers_start_is_that_of_a_layer_on_its_own(method):
    torch.manual_seed(0)
    layer = METHODS[method](6, 8, 3, kernels=3, bias=False)
    model = nn.Sequential(nn.Conv2d(6, 8, 3, bias=False))
    torch.manual_seed(0)
    kw.peers.convert(model, method, layers="0", kernels=3, start="paper")
    for mine, theirs in zip(model[0].parameters(), layer.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("start", ["keep", "paper"])
def test_one_line_says_what_was_done(start, caplog):
    with caplog.at_level("INFO", logger="kw"):
        kw.peers.convert(narrow_resnet(), "dyconv", start=start)
        kw.peers.convert(narrow_resnet(), "dyconv", start=start, announce=False)
    (line,) = caplog.messages
    assert line.startswith("ResNet: 20 layers converted")
    assert "2 layers static (conv1, fc)" in line
    assert "parameters 67,701 -> 243,687" in line
    assert ("weights kept" in line) == (start == "keep")
    assert ("replaced by random ones" in line) == (start == "paper")


@every_network
def test_frozen_layers_that_train_are_said(method, caplog):
    network = narrow_resnet()
    network.layer4.requires_grad_(False)
    with caplog.at_level("INFO", logger="kw"):
        kw.peers.convert(network, method, layers=r"layer[34]\.1\.conv[12]")
    assert caplog.messages[1] == (
        "2 layers were frozen and train now (layer4.1.conv1, layer4.1.conv2); "
        "freeze after the conversion"
    )


# --- mistakes ---------------------------------------------------------------------------------


def twice():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    return model.append(model[1])


class Odd(nn.Conv2d):
    """A subclass, which may compute something else."""


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (narrow_resnet, {"method": "dyconf"}, "'dyconf' is unknown; nearest: 'dyconv'"),
        (narrow_resnet, {"method": "dyconv", "kernel": 4}, "unknown setting 'kernel'.*'kernels'"),
        (narrow_resnet, {"method": "condconv", "reduction": 1}, "unknown setting 'reduction'"),
        (
            narrow_resnet,
            {"method": "dyconv", "start": "kept"},
            "start 'kept' is unknown; choose one of 'keep', 'paper'",
        ),
        (narrow_resnet, {"method": "dyconv", "kernels": 0}, "kernels is 0; expected an integer"),
        (narrow_resnet, {"method": "dyconv", "kernels": 2.5}, "kernels is 2.5"),
        (narrow_resnet, {"method": "odconv", "reduction": 0}, "reduction is 0; expected a number"),
        (narrow_resnet, {"method": "odconv", "layers": "layer9"}, "matches no layer.*'layer"),
        (narrow_resnet, {"method": "odconv", "layers": "("}, "no regular expression"),
        (narrow_resnet, {"method": "dyconv", "layers": "fc"}, "'fc' is a Linear.*only nn.Conv2d"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), {"method": "dyconv"}, "nothing to convert"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), {"method": "condconv"}, "give 'layers'"),
        (twice, {"method": "dyconv"}, "'1' is the same module as '2'"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Odd(4, 4, 3)),
            {"method": "odconv"},
            "layer '1' is a Odd, which cannot be converted",
        ),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
            ),
            {"method": "dyconv"},
            "layer '1' is with a computed weight",
        ),
        (
            lambda: kw.convert(narrow_resnet(), "resnet18"),
            {"method": "dyconv"},
            "has dynamic layers already",
        ),
    ],
)
def test_mistakes_leave_the_model_alone(model, arguments, message):
    network = model()
    before = list(network.named_modules())
    with pytest.raises(ValueError, match=message):
        kw.peers.convert(network, **arguments)
    assert list(network.named_modules()) == before


@every_method
@pytest.mark.parametrize("setting", ["warehouse", "cell_num_ratio"])
def test_settings_of_other_layers_are_refused(method, setting):
    with pytest.raises(ValueError, match=rf"unknown setting '{setting}'; nearest: .*'kernels'"):
        METHODS[method](4, 4, 3, **{setting: None})


def test_an_input_without_batch_is_refused():
    with pytest.raises(ValueError, match="ODConv2d takes"):
        ODConv2d(3, 4, 3)(torch.randn(3, 8, 8))


# --- configurations and runs ------------------------------------------------------------------


SHIPPED = [
    path
    for path in sorted((ROOT / "configs/imagenet").rglob("*.yaml"))
    if re.search("  peer:|attn_layer:", text := path.read_text()) and "M as published" in text
]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_peers_have_the_sizes_of_their_heads(path: Path) -> None:
    published = float(path.read_text().split("# Parameters")[1].split("M as published")[0])
    with torch.device("meta"):
        model = kw.build_model(path)
    params = sum(p.numel() for p in model.parameters())
    assert params / 1e6 == pytest.approx(published, abs=0.0101)


@pytest.mark.parametrize(
    ("method", "epochs", "expected"),
    [("dyconv", 1, [1, 0.5, 0, 0]), ("odconv", 1, [1, 0.5, 0, 0]), ("condconv", 0, None)],
)
def test_the_schedule_drives_them(
    settings: dict[str, Any], tmp_path: Path, method: str, epochs: float, expected: Any
) -> None:
    settings["model"]["peer"] = {"method": method, "kernels": 2}
    del settings["model"]["kernel_warehouse"]
    settings.update(temperature_epochs=epochs, total_batch_size=32)
    train(config_from_mapping(settings), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    found = [line.get("temperature") for line in lines if line["mode"] == "train"]
    assert found == (expected or [None] * 4)
    model = kw.build_model(tmp_path / "config.yaml")
    checkpoint = torch.load(tmp_path / "last.pth", weights_only=True)
    model.load_state_dict(checkpoint["state_dict"])


def test_a_conversion_that_does_not_fit_is_a_mistake_in_the_configuration(
    settings: dict[str, Any],
) -> None:
    settings["model"]["peer"] = {"method": "dyconv", "layers": "stage1"}
    del settings["model"]["kernel_warehouse"]
    with pytest.raises(ConfigError, match=r"model\.peer: layers 'stage1' matches no layer"):
        kw.build_model(settings)


@every_network
def test_what_cannot_be_kept_is_refused(method):
    everything = r"conv\d"

    def model():
        layers = OrderedDict((f"conv{i}", nn.Conv2d(4, 4, 3)) for i in range(3))
        return nn.Sequential(layers)

    broken = model()
    with torch.no_grad():
        broken.conv1.weight[0] = torch.inf
    with pytest.raises(ValueError, match="the weight of layer 'conv1' is not finite"):
        kw.peers.convert(broken, method, layers=everything)
    assert not any(isinstance(module, KWLayer) for module in broken.modules())
    tied = model()
    tied.conv2.weight = tied.conv1.weight
    with pytest.raises(ValueError, match="'conv1' shares its weight with 'conv2'"):
        kw.peers.convert(tied, method, layers=everything)
    with torch.inference_mode(), pytest.raises(ValueError, match="cannot be trained"):
        kw.peers.convert(model(), method, layers=everything)
