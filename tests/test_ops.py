"""Contraction back ends against the readable reference, and the layers against plain convolutions.

The reference itself is held to kernels that are put together here, by the block's formula.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from convolutions import CASES, Case
from torch import Tensor, nn

from kw import set_temperature
from kw.warehouse import KWConv1d, KWConv2d, KWConv3d, KWLinear
from kw.warehouse.layers import KWConvNd
from kw.warehouse.ops import (
    BACKENDS,
    CONTRACTIONS,
    YARDSTICKS,
    ConvSpec,
    assemble,
    check_backend,
    dynamic_conv,
)
from kw.warehouse.ops.reference import assemble_reference

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
LAYER = {1: KWConv1d, 2: KWConv2d, 3: KWConv3d}

everywhere = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def kernel_by_formula(alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
    """One sample's kernel: element (o, i, s) belongs to mixture (s * GO + o / c) * GI + i / c'."""
    part = spec.partition
    spatial, out_blocks, in_blocks = part.grid
    mixed = alpha @ cells  # [m, cell]
    mixed = mixed.view(len(alpha), part.cell_out, part.cell_in, -1)
    kernel = torch.zeros(part.kernel_shape, dtype=cells.dtype).flatten(2)
    for o, i, s in itertools.product(*map(range, kernel.shape)):
        block, inside = (s, 0) if spatial > 1 or kernel.shape[2] == 1 else (0, s)
        go, gi = o // part.cell_out, i // part.cell_in
        mixture = (block * out_blocks + go) * in_blocks + gi
        kernel[o, i, s] = mixed[mixture, o % part.cell_out, i % part.cell_in, inside]
    return kernel.view(part.kernel_shape)


@everywhere
def test_assembly_follows_the_formula(case):
    _, alpha, cells, spec = case.make()
    with torch.no_grad():
        expected = torch.stack([kernel_by_formula(a, cells, spec) for a in alpha])
        one_by_one = torch.stack([assemble_reference(a, cells, spec) for a in alpha])
        torch.testing.assert_close(one_by_one, expected)
        torch.testing.assert_close(assemble(alpha, cells, spec), expected)


@everywhere
def test_reference_is_a_convolution_per_sample(case):
    x, alpha, cells, spec = case.make()
    with torch.no_grad():
        expected = torch.stack(
            [
                CONV[len(case.kernel)](
                    x[b],
                    kernel_by_formula(alpha[b], cells, spec),
                    stride=case.stride,
                    padding=case.padding,
                    dilation=case.dilation,
                    groups=case.groups,
                )
                for b in range(case.batch)
            ]
        )
        torch.testing.assert_close(YARDSTICKS["reference"](x, alpha, cells, spec), expected)


def skip_refused(backend: str, spec: ConvSpec, cells: Tensor) -> None:
    """Skip what a back end does not claim to do; that it says so is tested where it says it."""
    if backend in CONTRACTIONS:
        try:
            check_backend(backend, spec, cells)
        except ValueError as error:
            pytest.skip(str(error))


@pytest.mark.parametrize("backend", ["grouped", "auto"])
@everywhere
def test_backend_equals_reference(case, backend):
    """Values, and gradients of the input, the coefficients and the cells.

    The selector's back ends are held to the reference one by one in test_contractions.py.
    """
    *tensors, spec = case.make()
    expected = dynamic_conv(*tensors, spec, "reference")
    weight = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), tensors)
    actual = dynamic_conv(*tensors, spec, backend)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad((actual * weight).sum(), tensors)
    for name, ours, theirs in zip(
        ("x", "alpha", "cells"), gradients, expected_gradients, strict=True
    ):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["channels last", "sliced", "expanded"])
def test_input_that_is_not_contiguous(backend, layout):
    case = Case((3, 3), (5, 7), padding=1)
    x, alpha, cells, spec = case.make()
    skip_refused(backend, spec, cells)
    strange = {
        "channels last": lambda: x.to(memory_format=torch.channels_last),
        "sliced": lambda: torch.stack([x, x + 1], -1)[..., 0],
        "expanded": lambda: x[:1].expand(3, -1, -1, -1),
    }[layout]()
    assert not strange.is_contiguous()
    expected = dynamic_conv(strange.contiguous(), alpha, cells, spec, "reference")
    torch.testing.assert_close(dynamic_conv(strange, alpha, cells, spec, backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    case = Case((2, 1), (3, 2), (2, 2), stride=(2, 1), padding=(1, 0), batch=2)
    *tensors, spec = case.make()
    skip_refused(backend, spec, tensors[2])
    function = lambda x, alpha, cells: dynamic_conv(x, alpha, cells, spec, backend)  # noqa: E731
    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("backend", ["groupd", "cudnn", ""])
def test_unknown_backend_is_refused(backend):
    *tensors, spec = CASES["2d"].make()
    for refuse in (
        lambda: dynamic_conv(*tensors, spec, backend),
        lambda: KWConv2d(4, 4, 3).set_backend(backend),
    ):
        with pytest.raises(ValueError, match=f"{backend!r} is unknown") as error:
            refuse()
        assert all(name in str(error.value) for name in ("auto", *BACKENDS))
    if backend == "groupd":
        assert "did you mean 'grouped'" in str(error.value)


def test_impossible_backend_is_refused_and_leaves_the_layer_alone():
    layer = KWConv2d(4, 4, 3)
    with pytest.raises(ValueError, match="back end 'depthwise' "):
        layer.set_backend("depthwise")
    assert layer.backend == "auto"


# --- layers against torch.nn.functional ---------------------------------------------------------


def static_twin(layer: KWConvNd, static: nn.Module, x: Tensor) -> Tensor:
    """What ``static`` gives for every sample with the kernel that ``layer`` assembles for it."""
    tau = layer.warehouse.temperature
    alpha = layer.attention(x.mean(tuple(range(2, x.dim()))), tau)
    outputs = []
    for b in range(len(x)):
        kernel = kernel_by_formula(alpha[b], layer.warehouse.cells, layer.spec)
        static.weight.copy_(kernel)
        static.bias.copy_(layer.bias)
        outputs.append(static(x[b : b + 1]))
    return torch.cat(outputs)


PADDINGS = [
    (dims, mode, padding, kernel)
    for dims in (1, 2, 3)
    for mode in ("zeros", "reflect", "replicate", "circular")
    for padding, kernel in (("same", 4), ("same", 3), ("valid", 3), (2, 3))
]


@pytest.mark.parametrize(("dims", "mode", "padding", "kernel"), PADDINGS)
@torch.no_grad()
def test_padding(dims, mode, padding, kernel):
    """As ``nn.Conv``: modes, 'valid', and 'same' with even kernels, where one side gets more."""
    torch.manual_seed(0)
    factory = {"dtype": torch.float64}
    args = (2, 4, kernel, 1, padding, 2 if padding == "same" else 1)
    layer = LAYER[dims](*args, padding_mode=mode, start="paper", **factory).eval()
    layer.bias.normal_()
    static = getattr(nn, f"Conv{dims}d")(*args, padding_mode=mode, **factory)
    set_temperature(layer, 0.3)
    x = torch.randn(2, 2, *(7, 9, 8)[:dims], **factory)
    torch.testing.assert_close(layer(x), static_twin(layer, static, x))


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@torch.no_grad()
def test_uneven_padding_per_axis(mode):
    """The order of axes: height pads 2, width 0; strided and dilated too."""
    torch.manual_seed(0)
    args = (4, 4, (3, 2), (2, 1), (2, 0), (1, 2), 2)
    layer = KWConv2d(*args, padding_mode=mode, start="paper", dtype=torch.float64).eval()
    static = nn.Conv2d(*args, padding_mode=mode, dtype=torch.float64)
    x = torch.randn(3, 4, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), static_twin(layer, static, x))


def test_same_with_stride_is_refused():
    with pytest.raises(ValueError, match="stride 1 only"):
        KWConv2d(4, 4, 3, stride=2, padding="same")


def test_unknown_padding_is_refused():
    with pytest.raises(ValueError, match=r"'full' is unknown.*'same' or 'valid'"):
        KWConv2d(4, 4, 3, padding="full")
    with pytest.raises(ValueError, match=r"'mirror' is unknown.*'reflect'"):
        KWConv2d(4, 4, 3, padding_mode="mirror")


@pytest.mark.parametrize("shape", [(3, 6), (3, 5, 6), (3, 2, 5, 6)])
@torch.no_grad()
def test_linear_over_any_number_of_token_axes(shape):
    torch.manual_seed(0)
    settings = {"cell_num_ratio": 4, "cell_inplane_ratio": 0.5, "start": "paper"}
    layer = KWLinear(6, 4, dtype=torch.float64, **settings).eval()
    layer.bias.normal_()
    set_temperature(layer, 0.3)
    x = torch.randn(shape, dtype=torch.float64)
    pooled = x.reshape(3, -1, 6).mean(1)
    alpha = layer.attention(pooled, layer.warehouse.temperature)
    expected = [
        F.linear(x[b], kernel_by_formula(alpha[b], layer.warehouse.cells, layer.spec)[..., 0])
        for b in range(3)
    ]
    torch.testing.assert_close(layer(x), torch.stack(expected) + layer.bias)
