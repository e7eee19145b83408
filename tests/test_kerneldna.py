"""KernelDNA: against its paper's equations, and what its children keep."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import assert_trains, disturb, narrow_resnet
from test_fdconv import factor, hidden_units, of_groups
from test_peers import SHAPES, convolved, inputs, randomise_norms
from torch import nn

import kw
from kw.peers import DNAConv2d, kerneldna
from kw.pictures import PictureError, dynamic_layers

every_shape = pytest.mark.parametrize("shape", SHAPES)


def family(shape, count=3, **factory):
    """Layers of one shape that share a kernel, all their parameters at random."""
    torch.manual_seed(0)
    settings = {"out_channels": 8, **SHAPES[shape]}
    layers = [nn.Conv2d(6, **settings) for _ in range(count)]
    model = kw.peers.convert(
        nn.Sequential(*layers), "kerneldna", layers=r"\d", start="paper", announce=False
    )
    for child in disturb(model):
        if isinstance(child.attention, kerneldna.Adapter):
            nn.init.normal_(child.attention.spatial)
        if child.bias is not None:
            nn.init.normal_(child.bias)
    return model.to(**factory).eval()


def defined_kerneldna(layer, parent, x):
    branch = layer.attention
    hidden = hidden_units(branch, x.mean((2, 3)))
    kernels = (parent * branch.spatial).expand(len(x), *parent.shape)
    kernels = kernels * of_groups(factor(branch.channel_fc, hidden), layer)[..., None, None]
    if branch.filter_fc is not None:
        kernels = kernels * factor(branch.filter_fc, hidden)[:, :, None, None, None]
    y = convolved(x, kernels, layer)
    return y if layer.bias is None else y + layer.bias[:, None, None]


@every_shape
def test_values_and_gradients_are_kerneldnas(shape):
    model = family(shape, dtype=torch.float64)
    x = inputs(dtype=torch.float64).requires_grad_()
    shared = model[0].warehouse.cells
    parent = shared.view(model[0].partition.kernel_shape)
    assert all(layer.warehouse.cells is shared for layer in model)
    y = [layer(x) for layer in model]
    expected = [convolved(x, parent.expand(len(x), *parent.shape), model[0])]
    if model[0].bias is not None:
        expected[0] = expected[0] + model[0].bias[:, None, None]
    expected += [defined_kerneldna(child, parent, x) for child in model[1:]]
    for mine, theirs in zip(y, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    leaves = [x, *model.parameters()]
    weights = [torch.randn_like(each) for each in y]
    found, defined = (
        torch.autograd.grad(sum((e * w).sum() for e, w in zip(side, weights, strict=True)), leaves)
        for side in (y, expected)
    )
    for mine, theirs in zip(found, defined, strict=True):
        torch.testing.assert_close(mine, theirs)


# --- what is kept -----------------------------------------------------------------------------


def kernel_of(layer):
    """The kernel that a layer uses where its factors do not depend on the input."""
    branch, groups = layer.attention, layer.groups
    kernel = layer.warehouse.cells.view(layer.partition.kernel_shape)
    if not isinstance(branch, kerneldna.Adapter):
        return kernel
    out, in_ = kernel.shape[:2]
    channel = 2 * branch.channel_fc.bias.sigmoid().view(groups, 1, in_)
    kernel = (kernel * branch.spatial).unflatten(0, (groups, -1)) * channel[..., None, None]
    if branch.filter_fc is not None:
        filters = 2 * branch.filter_fc.bias.sigmoid()
        kernel = kernel * filters.view(groups, out // groups, 1, 1, 1)
    return kernel.flatten(0, 1)


@torch.no_grad()
@every_shape
def test_children_that_can_be_kept_are(shape):
    """Kernels that are a parent's times positive factors of channels, filters and positions."""
    torch.manual_seed(0)
    settings = {"out_channels": 8, **SHAPES[shape]}
    static = nn.ModuleList(nn.Conv2d(6, **settings).double() for _ in range(3)).eval()
    parent, groups = static[0].weight, static[0].groups
    out, in_, *kernel = parent.shape
    for child in static[1:]:
        channels = torch.rand(groups, 1, in_, 1, 1, dtype=torch.float64) + 0.5
        filters = torch.rand(groups, out // groups, 1, 1, 1, dtype=torch.float64) + 0.5
        factors = (channels * filters).flatten(0, 1)
        child.weight.copy_(parent * factors * torch.randn(kernel, dtype=torch.float64))
    model = kw.peers.convert(copy.deepcopy(static), "kerneldna", layers=r"\d")
    x = inputs(dtype=torch.float64)
    for before, after in zip(static, model, strict=True):
        torch.testing.assert_close(after(x), before(x), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_share_that_is_kept_is_said_layer_by_layer(caplog):
    static = randomise_norms(narrow_resnet())
    dynamic = copy.deepcopy(static)
    with caplog.at_level("INFO", logger="kw"):
        kw.peers.convert(dynamic, "kerneldna")
    line, shares = caplog.messages
    assert "weights kept in part: between" in line
    said = {}
    for part in shares.removeprefix("kept of every layer's kernel: ").split(", "):
        name, share = part.removesuffix("%").rsplit(" ", 1)
        said[name] = float(share)
    layers = {n: m for n, m in dynamic.named_modules() if isinstance(m, DNAConv2d)}
    assert said.keys() == layers.keys()
    for name, layer in layers.items():
        wanted = static.get_submodule(name).weight
        error = (wanted - kernel_of(layer)).square().sum() / wanted.square().sum()
        assert said[name] == pytest.approx(100 * float(1 - error), abs=0.06)
        if isinstance(layer.attention, kerneldna.Adapter):  # none is where a sigmoid has no slope
            for head in (layer.attention.channel_fc, layer.attention.filter_fc):
                assert 0.009 < head.bias.sigmoid().min() <= head.bias.sigmoid().max() < 0.91
    assert {said[name] for name in ("layer1.0.conv2", "layer4.0.conv2")} == {100}


@torch.no_grad()
def test_a_fit_is_no_worse_than_any_nearby():
    torch.manual_seed(0)
    wanted, parent = torch.randn(2, 8, 6, 3, 3, dtype=torch.float64)
    fitted = kerneldna._fit(wanted, parent, 1, False)

    def error(factors):
        return float((wanted - parent * kerneldna._spread(*factors, 1)).square().sum())

    least = error(fitted)
    assert least < wanted.square().sum()
    channel, filters, spatial = fitted
    for _ in range(50):
        near = spatial + 0.01 * torch.randn_like(spatial)
        assert error((channel, filters, near)) >= least


# --- who shares -------------------------------------------------------------------------------


def parents(**settings):
    model = kw.peers.convert(narrow_resnet(), "kerneldna", start="paper", **settings)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, DNAConv2d)}
    return {n: m.warehouse.name for n, m in layers.items()}


def test_layers_of_a_shape_share_with_the_first():
    found = parents()
    assert found["layer1.1.conv2"] == found["layer1.0.conv2"] == "layer1.0.conv2"
    assert found["layer3.1.conv2"] == "layer2.0.conv2"  # stages of equal width
    assert found["layer4.1.conv1"] == "layer4.0.conv2"
    assert "conv1" not in found
    assert "layer4.0.conv1" not in found  # no other of its shape


def test_more_parents_take_runs_of_layers():
    found = parents(kernels=2)
    assert found["layer1.1.conv2"] == found["layer1.1.conv1"] == "layer1.1.conv1"
    assert "layer1.0.conv2" not in found  # a run of one is static
    with pytest.raises(ValueError, match="no two layers of one shape share a kernel"):
        parents(kernels=9)


def test_a_kernel_is_one_parameter_and_one_entry():
    model = kw.peers.convert(narrow_resnet(), "kerneldna")
    names = [name for name in model.state_dict() if name.endswith("warehouse.weight")]
    assert names == [n for n, _ in model.named_parameters() if n.endswith("warehouse.weight")]
    assert len(names) == len({m.warehouse for m in model.modules() if isinstance(m, DNAConv2d)})


def test_autocast_and_training():
    model = kw.peers.convert(narrow_resnet(), "kerneldna", start="paper")
    x = torch.randn(2, 3, 33, 41)
    assert_trains(model, x.contiguous(memory_format=torch.channels_last))
    with torch.autocast("cpu", torch.bfloat16):
        y = model.eval()(x)
    torch.testing.assert_close(y.float(), model(x), atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (narrow_resnet, {"layers": "layer4.0.conv1"}, "no other of its shape.*'layers'"),
        (narrow_resnet, {"layers": "fc"}, "'fc' is a Linear.*only nn.Conv2d"),
        (narrow_resnet, {"kernels": 0}, "kernels is 0"),
        (narrow_resnet, {"reduction": -1}, "reduction is -1"),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1).half()
            ),
            {},
            "'1' and others of its shape lie on several devices",
        ),
    ],
)
def test_mistakes_leave_the_model_alone(model, arguments, message):
    network = model()
    before = list(network.named_modules())
    with pytest.raises(ValueError, match=message):
        kw.peers.convert(network, "kerneldna", **arguments)
    assert list(network.named_modules()) == before


def test_a_layer_alone_is_refused():
    with pytest.raises(ValueError, match=r"give it as 'warehouse', or convert"):
        DNAConv2d(4, 4, 3)
    layer = family("3x3")[1]
    with pytest.raises(ValueError, match=r"DNAConv2d, which has one way.*set 'auto'"):
        layer.set_backend("grouped")


@pytest.mark.parametrize("method", ["fdconv", "kerneldna"])
def test_pictures_of_mixtures_are_refused(method):
    model = kw.peers.convert(narrow_resnet(), method)
    with pytest.raises(PictureError, match="one of FDConv or KernelDNA: it has no coefficients"):
        dynamic_layers(model)
