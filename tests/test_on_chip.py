"""The on-chip back end against the reference: values and all three gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from breadth import breadth
from convolutions import CASES, HALVES, WHOLE, Case
from triton_checks import (
    DEVICE,
    FEW,
    INTERPRETED,
    TRITON,
    compare,
    gpu_only,
    runs_kernels,
)

from kw.warehouse import KernelShape, KWConv2d, partition_kernels, set_backend
from kw.warehouse.ops import ConvSpec
from kw.warehouse.ops.backends import selector
from kw.warehouse.ops.contraction import Problem
from kw.warehouse.ops.gpus import GPUS
from kw.warehouse.ops.reference import conv_reference
from kw.warehouse.ops.triton_on_chip import TritonOnChip
from kw.warehouse.ops.triton_tiles import tiles_on_chip

UNGROUPED = {
    name: replace(case, batch=min(case.batch, 2))
    for name, case in CASES.items()
    if case.groups == 1 and name != "2d larger than its input"
}
SEVERAL = {
    "tiles of channels, groups of samples": Case((2, 1), (2, 3), (33, 40), padding=(1, 0), batch=9),
    "tiles of positions, strided": Case((2, 3), (10, 27), (5, 3), (1, 2), (1, 0), (2, 1), batch=1),
    "blocks beyond one tile": Case((1, 1), (3, 3), (36, 68), batch=2, settings=HALVES),
    "whole cells in blocks": Case((2, 2), (4, 4), (18, 20), 2, 1, batch=3, settings=WHOLE | HALVES),
    "two parts of cells": Case((3, 3), (3, 3), (2, 2), padding=1, settings={"cell_num_ratio": 4}),
    "stride beyond kernel": Case((2, 1), (7, 7), (4, 4), stride=3, padding=(1, 0), batch=2),
    "rim of zeros alone": Case((1, 1), (2, 2), (3, 4), stride=5, padding=2, batch=2),
    "dilation shares the stride": Case((3, 3), (9, 8), stride=2, dilation=2, padding=2, batch=1),
}


@runs_kernels
@pytest.mark.parametrize("name", breadth(UNGROUPED, FEW))
def test_equals_reference(name):
    compare(TritonOnChip(), UNGROUPED[name])


@runs_kernels
@pytest.mark.parametrize(
    "name", breadth(SEVERAL, ["tiles of channels, groups of samples", "two parts of cells"])
)
def test_several_programs(name):
    """Several tiles along every side, and those that are not full."""
    compare(TritonOnChip(), SEVERAL[name], channels_last=True)


@runs_kernels
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
@pytest.mark.parametrize("name", breadth(["1d", "2d few cells", "2d pointwise strided"], ["1d"]))
def test_half_precision(name, dtype, tolerance):
    compare(TritonOnChip(), UNGROUPED[name], dtype=dtype, tolerance=tolerance)


@runs_kernels
def test_rounds_as_through_memory():
    """Mixed in float32 and rounded once: the same kernels as those that pass through memory."""
    from kw.warehouse.ops.triton_conv import TritonConv

    *tensors, spec = SEVERAL["blocks beyond one tile"].make()
    x, alpha, cells = (t.detach().to(DEVICE, torch.float16) for t in tensors)
    ours, theirs = (b.forward(x, alpha, cells, spec) for b in (TritonOnChip(), TritonConv()))
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


@runs_kernels
def test_no_samples():
    *tensors, spec = replace(CASES["1d"], batch=0).make()
    x, alpha, cells = (t.detach().to(DEVICE, torch.float32) for t in tensors)
    y = TritonOnChip().forward(x, alpha, cells, spec)
    gradients = TritonOnChip().backward(y, x, alpha, cells, spec, (True, True, True))
    assert y.shape == (0, 6, 7)
    assert [g.shape for g in gradients] == [x.shape, alpha.shape, cells.shape]


@runs_kernels
@pytest.mark.parametrize("wanted", range(3))
def test_only_what_is_wanted(wanted):
    *tensors, spec = CASES["2d pointwise"].make()
    x, alpha, cells = (t.detach().to(DEVICE, torch.float32) for t in tensors)
    backend = TritonOnChip()
    grad = torch.randn_like(backend.forward(x, alpha, cells, spec))
    everything = backend.backward(grad, x, alpha, cells, spec, (True, True, True))
    needs = (wanted == 0, wanted == 1, wanted == 2)
    gradients = backend.backward(grad, x, alpha, cells, spec, needs)
    assert [g is not None for g in gradients] == list(needs)
    assert torch.equal(gradients[wanted], everything[wanted])


@runs_kernels
def test_samples_do_not_meet():
    """What is not a number in one sample stays there, in a group that is not full as well."""
    *tensors, spec = Case((3, 3), (4, 4), padding=1, batch=3).make()
    x, alpha, cells = (t.detach().to(DEVICE, torch.float32) for t in tensors)
    x[1] = torch.nan
    y = TritonOnChip().forward(x, alpha, cells, spec)
    assert [bool(sample.isnan().any()) for sample in y] == [False, True, False]


@runs_kernels
@pytest.mark.parametrize("strange", ["sliced", "expanded"])
def test_input_of_any_strides(strange):
    *tensors, spec = Case((2, 2), (4, 4), batch=2).make()
    x, alpha, cells = (t.detach().to(DEVICE, torch.float32) for t in tensors)
    x = torch.stack([x, x + 1], -1)[..., 0] if strange == "sliced" else x[:1].expand_as(x)
    expected = conv_reference(x.double(), alpha.double(), cells.double(), spec)
    actual = TritonOnChip().forward(x, alpha, cells, spec)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@runs_kernels
def test_forced_on_a_network():
    """Through the layer, autograd and back: as the library's back end."""
    torch.manual_seed(0)
    layer = KWConv2d(4, 6, 3, padding=1, start="paper").to(DEVICE).eval()
    x = torch.randn(3, 4, 5, 5, device=DEVICE)
    results = []
    for name in ("on_chip", "assembled"):
        set_backend(layer, name)
        x.grad = None
        x.requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@runs_kernels
def test_coefficients_of_any_strides():
    """As the fused kernel leaves them, where neither cells nor samples are padded."""
    case = Case((2, 2), (3, 3), (4, 4), batch=8, settings={"cell_num_ratio": 4})
    *tensors, spec = case.make()
    x, alpha, cells = (t.detach().to(DEVICE, torch.float32) for t in tensors)
    assert len(cells) == tiles_on_chip(9, len(cells), 4).all_cells
    backend, other = TritonOnChip(), alpha.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    y = backend.forward(x, alpha, cells, spec)
    assert torch.equal(backend.forward(x, other, cells, spec), y)
    needs = (True, False, False)
    into = [backend.backward(y, x, each, cells, spec, needs)[0] for each in (alpha, other)]
    assert torch.equal(*into)


LATE = {
    "3x3": Case((3, 3), (7, 7), (512, 512), padding=1, batch=20),
    "strided": Case((3, 3), (14, 14), (256, 512), 2, 1, batch=8),
    "pointwise": Case((1, 1), (7, 7), (2048, 512), batch=9, settings={"cell_inplane_ratio": 0.25}),
    "many cells": Case((3, 3), (7, 7), (256, 256), 1, 1, batch=8, settings={"cell_num_ratio": 8}),
}


@gpu_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("case", LATE.values(), ids=LATE)
def test_late_layers(case, channels_last, dtype):
    compare(TritonOnChip(), case, channels_last, dtype, 1e-2)


@gpu_only
def test_is_captured_by_a_graph():
    """Launches alone: nothing waits for the device, and a replay gives the same bits."""
    *tensors, spec = LATE["3x3"].make()
    x, alpha, cells = (t.detach().to("cuda", torch.bfloat16) for t in tensors)
    backend = TritonOnChip()
    expected = backend.forward(x, alpha, cells, spec)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = backend.forward(x, alpha, cells, spec)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


# --- what needs no kernel -----------------------------------------------------------------------


H200 = GPUS["h200"].profile()
MEASURED = replace(H200, factors={"on_chip": (1.0, 1.0)})


def problem(channels=512, size=7, kernel=3, cells=27, batch=128, dtype=torch.bfloat16, **rest):
    warehouse = partition_kernels([KernelShape(channels, channels, (kernel, kernel))])
    spec = ConvSpec(warehouse.layers[0], (1, 1), (kernel // 2,) * 2, (1, 1))
    return Problem(spec, cells, batch, (size, size), dtype, device="cuda", **rest)


can_compile = pytest.mark.skipif(
    TritonOnChip().refusal(problem()) is not None, reason="needs a Triton that compiles it"
)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on CPU tensors")
def test_refuses_other_devices():
    reason = TritonOnChip().refusal(replace(problem(), device="cpu"))
    assert reason == "runs on CUDA devices, not on 'cpu'"


@can_compile
def test_refuses_what_it_cannot_do():
    refusal = TritonOnChip().refusal
    assert refusal(problem()) is None
    assert refusal(problem(cells=188)) == "keeps tiles of up to 128 cells on chip, not of 188"
    assert "not in float32 under 16 bit" in refusal(problem(cells_dtype=torch.float32))
    assert "float64" in refusal(problem(dtype=torch.float64))


@pytest.mark.parametrize(
    "changes",
    [{"size": 700}, {"channels": 1, "size": 3000}, {"batch": 1 << 21, "cells": 128}],
    ids=["samples of a program", "in runs of channels", "coefficients"],
)
def test_refuses_offsets_that_32_bits_do_not_hold(changes):
    """A sample and its kernel have fewer than 2^31 values: ``triton`` takes them."""
    large = problem(**changes)
    assert max(large.input_numel, large.kernel_numel) < 1 << 31
    assert "does eight samples" in TritonOnChip().refusal(large)


@pytest.mark.skipif(not TRITON, reason="needs Triton")
def test_refuses_compilers_that_crash(monkeypatch):
    monkeypatch.setattr("kw.warehouse.ops.triton_on_chip._triton", lambda: (3, 2))
    assert TritonOnChip().refusal(problem()) == "needs Triton 3.4, not 3.2"


@pytest.mark.parametrize(
    ("cells", "parts"),
    [(1, (16, 0)), (27, (32, 0)), (47, (32, 16)), (66, (64, 16)), (97, (128, 0))],
)
def test_tiles_hold_all_cells_in_little_memory(cells, parts):
    tiles = tiles_on_chip(49, cells, 2)
    assert (tiles.cells, tiles.more_cells) == parts
    assert tiles.shared(2) <= tiles_on_chip(49, cells, 4).shared(4) <= 227 << 10


def test_cost_counts_padding(monkeypatch):
    """Nine taps take the place of ten, 49 positions of 64, 27 cells of 32."""
    cost = TritonOnChip().cost
    values = 128 * 512 * 512 * 10
    assert cost(problem()).dense_macs == values * (32 + 64)
    assert cost(problem(batch=121)).dense_macs == values * (32 + 64)
    assert cost(problem(size=14)).dense_macs == values * 4 * (32 + 64)
    both = cost(problem(training=True))
    assert both.dense_macs == 2 * values * (32 + 64)
    assert both.waiting_bytes > 3 * 2 * 128 * 512 * 512 * 9  # kernels' gradients, in and out
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    strict = cost(problem(dtype=torch.float32))
    assert strict.slow_macs > cost(problem()).dense_macs  # no tensor cores


@can_compile
def test_is_chosen_for_few_positions_and_cells(monkeypatch):
    """Where a GPU's memory would be waited for, and not where mixing takes longer."""

    def quicker(p):
        found = {each.name: each.seconds for each in selector.predict(p, MEASURED)}
        return found["on_chip"] < found["triton"]

    assert quicker(problem())
    assert quicker(problem(training=True))
    assert not quicker(problem(cells=108))
    assert not quicker(problem(channels=256, size=14))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert not quicker(problem(dtype=torch.float32))


@can_compile
def test_is_not_chosen_where_nobody_has_measured_it():
    found = {each.name: each for each in selector.predict(problem(), H200)}
    assert found["on_chip"].seconds is None
    assert "kw doctor" in found["on_chip"].refusal


# test_triton.py runs this file in the interpreter.
