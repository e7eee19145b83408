"""FDConv: against its paper's equations, and what it keeps."""

from __future__ import annotations

import copy
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from networks import assert_trains, disturb, narrow_resnet
from test_peers import (
    SHAPES,
    STATIC,
    assert_same,
    convolved,
    inputs,
    linear,
    randomise_norms,
    squashed,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import kw
from kw.peers import FDConv2d, assembled, fdconv
from kw.peers.spectrum import BANDS, _fixed_basis, frequency_groups, hartley, low_passes

every_shape = pytest.mark.parametrize("shape", SHAPES)


def frequencies(count):
    return torch.from_numpy(np.fft.fftfreq(count))


def factor(fc, hidden):
    return 2 * squashed(linear(fc, hidden))


def hidden_units(branch, pooled):
    norm = branch.norm
    hidden = linear(branch.fc, pooled) - norm.running_mean
    hidden = hidden / torch.sqrt(norm.running_var + norm.eps) * norm.weight + norm.bias
    return hidden.clamp(min=0)


def of_groups(factors, layer):
    """Factors of input channels ``[B, I]`` as every filter reads them, ``[B, O, I / g]``."""
    own = factors.view(len(factors), layer.groups, -1)
    return own.repeat_interleave(layer.out_channels // layer.groups, 1)


def disjoint_weights(layer):
    """``W_i``, ``[n, O, I / g, h, w]``: inverse transforms of the groups, one at a time."""
    out, in_, height, width = layer.partition.kernel_shape
    rows, columns, number = out * height, in_ * width, layer.warehouse.kernels
    real = layer.warehouse.cells.view(rows, columns)
    across = torch.arange(rows)[:, None], torch.arange(columns)
    opposite = real[-across[0] % rows, -across[1] % columns]
    spectrum = torch.complex((real + opposite) / 2, (opposite - real) / 2)
    group = torch.full((rows, columns), -1)
    stored = layer.group[..., 0]
    for u in range(rows):
        for v in range(columns):
            kept = v < stored.shape[1]
            group[u, v] = stored[u, v] if kept else stored[-u % rows, -v % columns]
    weights = []
    for i in range(number):
        own = torch.where(group == i, spectrum, 0)
        u, v = (torch.arange(size, dtype=torch.float64) for size in (rows, columns))
        left = torch.exp(2j * torch.pi * torch.outer(u, u) / rows)
        right = torch.exp(2j * torch.pi * torch.outer(v, v) / columns)
        matrix = left @ own @ right / (rows * columns) ** 0.5
        assert matrix.imag.abs().max() < 1e-12
        weights.append(matrix.real.view(out, height, in_, width).transpose(1, 2))
    return torch.stack(weights)


def by_bands(x, maps):
    """``sum_b A_b . X_b`` by masks on the Fourier transform."""
    height, width = x.shape[2:]
    size = torch.maximum(frequencies(height).abs()[:, None], frequencies(width).abs())
    limits = [0, *(1 / band for band in BANDS), 1]
    spectrum, total = torch.fft.fft2(x), 0
    for band, (low, high) in enumerate(pairwise(limits)):
        part = torch.fft.ifft2(spectrum * ((size >= low) & (size < high))).real
        total = total + maps[:, band, None] * part
    return total


def defined_fdconv(layer, x):
    branch, pooled = layer.attention, x.mean((2, 3))
    height, width = layer.kernel_size
    hidden = hidden_units(branch, pooled)
    kernels = torch.einsum(
        "bn,noihw->boihw", factor(branch.kernel_fc, hidden), disjoint_weights(layer)
    )
    lines = F.conv1d(
        pooled.view(len(x), layer.groups, -1),
        branch.local.weight,
        branch.local.bias,
        padding=branch.local.weight.shape[2] // 2,
        groups=layer.groups,
    )
    dense = 2 * squashed(lines.view(len(x), layer.out_channels, height, width, -1))
    kernels = kernels * dense.permute(0, 1, 4, 2, 3)
    if branch.spatial_fc is not None:
        kernels = kernels * factor(branch.spatial_fc, hidden).view(-1, 1, 1, height, width)
    kernels = kernels * of_groups(factor(branch.channel_fc, hidden), layer)[..., None, None]
    if branch.filter_fc is not None:
        kernels = kernels * factor(branch.filter_fc, hidden)[:, :, None, None, None]
    if layer.bands is not None:
        conv = layer.bands.conv
        x = by_bands(x, 2 * squashed(F.conv2d(x, conv.weight, conv.bias, padding=1)))
    y = convolved(x, kernels, layer)
    return y if layer.bias is None else y + layer.bias[:, None, None]


def build(shape, kernels=5, **factory):
    torch.manual_seed(0)
    settings = {"out_channels": 8, **SHAPES[shape], "kernels": kernels, **factory}
    layer = disturb(FDConv2d(6, **settings))
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer.eval()


@pytest.mark.parametrize("scratch", [1, 1 << 20], ids=["a sample at a time", "all samples"])
@every_shape
def test_values_and_gradients_are_fdconvs(shape, scratch, monkeypatch):
    monkeypatch.setitem(assembled._SCRATCH, "cpu", scratch)
    layer = build(shape, dtype=torch.float64)
    x = inputs(dtype=torch.float64).requires_grad_()
    leaves = [x, *layer.parameters()]
    expected = defined_fdconv(layer, x)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    for last in (False, True):
        y = layer(x.contiguous(memory_format=torch.channels_last) if last else x)
        torch.testing.assert_close(y, expected)
        found, defined = (
            torch.autograd.grad((result * weights).sum(), leaves, retain_graph=True)
            for result in (y, expected)
        )
        for mine, theirs in zip(found, defined, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("rows", "columns", "number"), [(6, 9, 7), (8, 4, 3), (1, 5, 3), (12, 12, 64)]
)
def test_groups_are_disjoint_equal_and_ordered(rows, columns, number):
    group = frequency_groups(rows, columns, number)
    assert torch.equal(group[..., 0], group[..., 1])
    norm = frequencies(rows)[:, None].square() + frequencies(columns)[: group.shape[1]].square()
    tops = [
        (float(norm[group[..., 0] == i].min()), float(norm[group[..., 0] == i].max()))
        for i in range(number)
    ]
    for (_, before), (after, _) in pairwise(tops):
        assert before <= after + 1e-12
    if columns > 2:  # the two frequencies of a real matrix are in one group
        for u in range(rows):
            assert group[u, 0, 0] == group[-u % rows, 0, 0]


@pytest.mark.parametrize(
    ("channels", "length"), [(1, 1), (6, 1), (16, 3), (64, 3), (256, 5), (512, 5), (2048, 7)]
)
def test_the_local_branch_is_as_long_as_eca_nets(channels, length):
    assert fdconv.local_length(channels) == length


def test_groups_of_one_frequency_are_refused():
    assert len(frequency_groups(4, 4, 10).unique()) == 10
    with pytest.raises(ValueError, match="kernels is 11, but the kernel has 10 frequencies"):
        frequency_groups(4, 4, 11)
    with pytest.raises(ValueError, match=r"layer 'small'.*smaller 'kernels'.*'layers'"):
        FDConv2d(2, 2, 1, name="small")


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 7), (16, 5), (33, 20), (56, 56)])
def test_low_passes_are_masks_on_the_spectrum(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    height, width = (frequencies(n).abs() for n in size)
    spectrum = torch.fft.fft2(x)
    for limit, low in zip(BANDS, low_passes(x), strict=True):
        mask = (height[:, None] < 1 / limit) & (width < 1 / limit)
        torch.testing.assert_close(low, torch.fft.ifft2(spectrum * mask).real)


def test_the_transform_is_its_own_inverse_and_keeps_lengths():
    x = torch.randn(6, 9, dtype=torch.float64)
    torch.testing.assert_close(hartley(hartley(x)), x)
    torch.testing.assert_close(hartley(x).square().sum(), x.square().sum())


# --- what it keeps ----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layer", [name for name in STATIC if name != "linear"])
def test_a_layer_begins_as_the_static_one(layer, dtype, training):
    torch.manual_seed(0)
    static = nn.Sequential(STATIC[layer]()).to(dtype)
    dynamic = kw.peers.convert(copy.deepcopy(static), "fdconv", layers="0", kernels=5)
    assert_same(static, dynamic, inputs(dtype=dtype), training)


@pytest.mark.parametrize("network", ["resnet18", "mobilenetv2_050"])
def test_a_network_begins_as_the_static_one(network):
    static = narrow_resnet() if network == "resnet18" else timm.create_model(network, num_classes=5)
    static = randomise_norms(static)
    dynamic = kw.peers.convert(copy.deepcopy(static), "fdconv")
    assert_same(static, dynamic, torch.randn(2, 3, 57, 41))
    for module in dynamic.modules():  # no head is stuck: gradients reach every factor
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    assert_trains(dynamic, torch.randn(2, 3, 57, 41))
    heads = [p.grad for n, p in dynamic.named_parameters() if "_fc.weight" in n or "local.w" in n]
    assert all(gradient.any() for gradient in heads)


# --- ways of use ------------------------------------------------------------------------------


def test_batch_norm_trains_on_the_batch():
    layer = build("3x3").train()
    x = inputs()
    before = layer.attention.norm.running_mean.clone()
    hidden = layer.attention.fc(x.mean((2, 3)))
    layer(x)
    expected = torch.lerp(before, hidden.mean(0), 0.1)
    torch.testing.assert_close(layer.attention.norm.running_mean, expected)


@torch.no_grad()
def test_samples_do_not_meet():
    layer, x = build("grouped"), inputs()
    alone = torch.cat([layer(x[b : b + 1]) for b in range(len(x))])
    torch.testing.assert_close(layer(x), alone)


@pytest.mark.parametrize("shape", ["3x3", "pointwise"])
def test_autocast(shape):
    layer, x = build(shape), inputs()
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, atol=0.1, rtol=0.1)
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_large_channels_last_images_are_convolved_one_by_one(monkeypatch):
    monkeypatch.setattr(assembled, "_LEAST_ONEDNN", 0)
    layer, x = build("3x3", dtype=torch.float64), inputs(dtype=torch.float64)
    found = []
    for form in (torch.contiguous_format, torch.channels_last):
        y = layer(x.contiguous(memory_format=form))
        found.append((y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradients_of_gradients():
    layer = build("strided", kernels=2, dtype=torch.float64)
    x = inputs(2, dtype=torch.float64)[:, :, :4, :3].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(layer, x, fast_mode=True)


def test_a_layer_trains_after_inference():
    layer = build("3x3", kernels=2, dtype=torch.float64)
    x = torch.randn(2, 6, 23, 19, dtype=torch.float64)  # a size that no other test has
    with torch.inference_mode():
        expected = layer(x)
    y = layer(x.requires_grad_())
    y.sum().backward()
    torch.testing.assert_close(y.detach(), expected)


@pytest.mark.parametrize("loads", [True, False])
def test_groups_are_there_after_the_meta_device(loads):
    layer = build("3x3")
    with torch.device("meta" if loads else "cpu"):
        empty = FDConv2d(6, 8, 3, padding=1, kernels=5).eval()
    empty.to("meta").to_empty(device="cpu")
    empty.group.fill_(0)  # what the memory holds
    if loads:
        empty.load_state_dict(layer.state_dict())
        torch.testing.assert_close(empty(inputs(2)), layer(inputs(2)))
    else:
        empty(inputs(2))
    assert torch.equal(empty.group, layer.group)


def test_multiply_adds_of_a_kernel():
    """8 x 16 x 3 x 3 values: the 1-D convolution, as torch counts it, three factors, and a real
    transform of 5/4 N log2 N."""
    layer = FDConv2d(16, 8, 3, kernels=4).eval()
    with FlopCounterMode(display=False) as counted:
        layer.attention.local(torch.randn(1, 1, 16))
    lines = counted.get_total_flops() / 2
    assert lines == 1152 * 3
    assert layer.assembly_macs == lines + 3 * 1152 + 14_644  # 1.25 * 1152 * 10.17
    assert FDConv2d(16, 8, 1, kernels=4).assembly_macs == 128 * (3 + 3) + 1120  # 1.25 * 128 * 7


def test_no_images_give_no_outputs():
    layer = build("3x3")
    y = layer(inputs(0).requires_grad_())
    assert y.shape == (0, 8, 9, 8)
    y.sum().backward()


def test_what_other_layers_take_is_refused():
    layer = build("3x3")
    with pytest.raises(ValueError, match=r"FDConv2d, which has one way.*set 'auto'"):
        layer.set_backend("bmm")
    with pytest.raises(ValueError, match=r"FDConv2d, which has one way.*set 'auto'"):
        kw.warehouse.set_backend(nn.Sequential(layer), "bmm")
    with pytest.raises(ValueError, match="temperature could be set"):
        kw.set_temperature(layer, 0)
    with pytest.raises(ValueError, match="FDConv2d takes"):
        layer(torch.randn(6, 8, 8))


def test_a_pass_of_shapes_alone_leaves_nothing():
    layer = FDConv2d(8, 8, 3)
    _fixed_basis.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer(torch.zeros(2, 8, 7, 9))
    assert type(layer(torch.zeros(2, 8, 7, 9))) is torch.Tensor


def test_selectively_checkpointed():
    """It does the same again in the backward pass, though the first pass has kept its waves."""

    def policy(context, op, *args, **kwargs):
        kept = str(op).startswith(("aten.mm", "aten.mul", "aten.convolution"))
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    layer, x = FDConv2d(8, 8, 3, padding=1).eval(), torch.randn(2, 8, 7, 9)
    _fixed_basis.cache_clear()
    found = []
    for run in (partial(checkpoint, layer, use_reentrant=False, context_fn=contexts), layer):
        layer.zero_grad()
        run(x).square().sum().backward()
        found.append([p.grad.clone() for p in layer.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * theirs.abs().max().item())
