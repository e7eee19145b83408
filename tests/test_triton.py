"""The Triton back end against the reference: values and all three gradients."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton_checks
from breadth import breadth
from convolutions import CASES, HALVES, WHOLE, Case
from triton_checks import (
    DEVICE,
    FEW,
    INTERPRETED,
    TRITON,
    can_start_interpreter,
    either_mark,
    gpu_only,
    run_in_interpreter,
    runs_kernels,
)

from kw.warehouse.ops import ConvSpec, triton_conv, triton_launch, triton_on_chip
from kw.warehouse.ops.contraction import Problem
from kw.warehouse.ops.reference import conv_reference
from kw.warehouse.ops.triton_conv import TritonConv
from kw.warehouse.ops.triton_depthwise import TritonDepthwise
from kw.warehouse.ops.triton_tiles import Tiles, tiles_of_convolution, tiles_of_gradient
from kw.warehouse.partition import Partition

# The interpreter is slow: two samples at most, and not the case of forty-nine taps.
UNGROUPED = {
    name: replace(case, batch=min(case.batch, 2))
    for name, case in CASES.items()
    if case.groups == 1 and name != "2d larger than its input"
}
SMALL = {
    "uneven": Case((3, 2), (5, 6), (18, 20), (2, 1), (2, 0), (1, 2), 1, 2, HALVES),
    "whole cells": Case((2, 2), (5, 4), (18, 20), batch=2, settings={**WHOLE, **HALVES}),
    "stride beyond kernel": Case((2, 1), (7, 7), (20, 18), stride=3, padding=(1, 0), batch=2),
    "dilation shares the stride": Case((3, 3), (9, 8), stride=2, dilation=2, padding=2, batch=1),
    "as many taps as bits": Case((32,), (40,), (4, 6), padding=3, batch=1),
    "aligned pointwise": Case((1, 1), (4, 8), (32, 16), batch=2, settings=HALVES),
}
SMALLEST_TILES = Tiles(16, 16, 16, 4, 2)


def compare(case, scratch, channels_last=False, **settings):
    triton_checks.compare(TritonConv(scratch), case, channels_last, **settings)


@runs_kernels
@pytest.mark.parametrize("name", breadth(UNGROUPED, FEW))
def test_equals_reference(name):
    compare(UNGROUPED[name], scratch=1 << 28)


@runs_kernels
@pytest.mark.parametrize(
    "name", breadth(SMALL, ["uneven", "stride beyond kernel", "aligned pointwise"])
)
def test_many_tiles_and_chunks(name, monkeypatch):
    case = SMALL[name]
    """Several tiles along every side, several chunks of rows and of samples."""
    for name in ("tiles_of_convolution", "tiles_of_gradient"):
        monkeypatch.setattr(triton_launch, name, lambda *_: SMALLEST_TILES)
    monkeypatch.setattr(triton_conv, "LEAST_ROWS", 4)
    spec = case.make()[-1]
    scratch = 4 * math.prod(spec.partition.kernel_shape) // 3
    assert len(TritonConv(scratch)._chunks(spec, case.batch, 4)[1]) > 1
    compare(case, scratch, channels_last=True)
    if case.kernel == (1, 1):  # read as it lies; others are brought into the one layout
        compare(case, scratch, channels_last=False)


@runs_kernels
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
@pytest.mark.parametrize("name", breadth(["1d", "2d few cells", "2d pointwise strided"], ["1d"]))
def test_half_precision(name, dtype, tolerance):
    """Kernels, their gradients and results are rounded, 2^-9 each in bfloat16; sums are not."""
    for scratch in (1 << 28, 64):
        compare(UNGROUPED[name], scratch, dtype=dtype, tolerance=tolerance)


@runs_kernels
@pytest.mark.parametrize("scratch", [1 << 28, 64])
def test_kernels_assembled_in_float32(scratch):
    """Cells of float32 under an input of 16 bit: their gradient is float32 too."""
    settings = {"dtype": torch.bfloat16, "cells_dtype": torch.float32, "tolerance": 1e-2}
    compare(UNGROUPED["2d few cells"], scratch, **settings)


@runs_kernels
def test_gradients_of_coefficients_are_summed_in_float32(monkeypatch):
    """Sums that do not cancel, in 16 bit, against float64: the error before and after. In float16,
    since the interpreter cuts float32 off where it rounds to bfloat16."""
    *tensors, spec = Case((1, 1), (4, 4), (64, 64), batch=2).make()
    x, alpha, cells = (t.detach().abs().div(8).to(DEVICE, torch.float16) for t in tensors)
    grad = torch.rand_like(x)
    dw = grad.double().flatten(2) @ x.double().flatten(2).mT  # [B, O, I]
    exact = dw.flatten(1).unsqueeze(1) @ cells.double().t()

    def error():
        needs = (False, True, False)
        found = TritonConv().backward(grad, x, alpha.float(), cells, spec, needs)[1]
        return float((found.double() - exact).norm() / exact.norm())

    after = error()
    monkeypatch.setattr(triton_conv, "float32_matmul", triton_conv.matmul)
    before = error()
    assert after < 1e-4
    assert before > 5 * after


@runs_kernels
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("cell", [(24, 8), (8, 24), (3, 16), (16, 5)])
def test_narrow_cells(cell, last):
    """Cells whose rows are no multiple of 16 values, cut along both sides."""
    part = Partition((1, 1), (1, 1), *cell, (1, 3, 2))
    spec = ConvSpec(part, (1, 1), (0, 0), (1, 1))

    class Narrow(Case):
        def make(self):
            torch.manual_seed(0)
            shapes = (2, 2 * cell[1], 4, 4), (2, 6, 4), (4, cell[0] * cell[1])
            return *(torch.randn(s, dtype=torch.float64) for s in shapes), spec

    compare(Narrow((1, 1), (4, 4)), scratch=1 << 28, channels_last=last)


@pytest.mark.parametrize("strides", [(24, 48, 0), (16, 32), (7, 14), (1,), (0, 0)])
def test_strides_in_units(strides):
    unit, counts = triton_launch.in_units(*strides)
    assert [unit * count for count in counts] == list(strides)
    assert unit in (1, 2, 4, 8, 16)
    assert unit == 16 or any((s // unit) % 2 for s in strides)


@runs_kernels
def test_no_samples():
    *tensors, spec = replace(CASES["1d"], batch=0).make()
    x, alpha, cells = (t.detach().to(DEVICE, torch.float32) for t in tensors)
    y = TritonConv().forward(x, alpha, cells, spec)
    gradients = TritonConv().backward(y, x, alpha, cells, spec, (True, True, True))
    assert y.shape == (0, 6, 7)
    assert [g.shape for g in gradients] == [x.shape, alpha.shape, cells.shape]
    assert not gradients[2].any()


@runs_kernels
@pytest.mark.parametrize("wanted", range(3))
def test_only_what_is_wanted(wanted):
    *tensors, spec = CASES["2d pointwise"].make()
    x, alpha, cells = (t.detach().to(DEVICE, torch.float32) for t in tensors)
    backend = TritonConv()
    grad = torch.randn_like(backend.forward(x, alpha, cells, spec))
    everything = backend.backward(grad, x, alpha, cells, spec, (True, True, True))
    needs = (wanted == 0, wanted == 1, wanted == 2)
    gradients = backend.backward(grad, x, alpha, cells, spec, needs)
    assert [g is not None for g in gradients] == list(needs)
    assert torch.equal(gradients[wanted], everything[wanted])


@runs_kernels
@pytest.mark.parametrize("strange", ["sliced", "expanded"])
def test_input_of_any_strides(strange):
    *tensors, spec = Case((2, 2), (4, 4), batch=2).make()
    x, alpha, cells = (t.detach().to(DEVICE, torch.float32) for t in tensors)
    x = torch.stack([x, x + 1], -1)[..., 0] if strange == "sliced" else x[:1].expand_as(x)
    expected = conv_reference(x.double(), alpha.double(), cells.double(), spec)
    actual = TritonConv().forward(x, alpha, cells, spec)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


LARGE = {
    "late": Case((3, 3), (7, 7), (512, 512), padding=1, batch=16),
    "early": Case((3, 3), (56, 56), (64, 64), padding=1, batch=4, settings={"cell_num_ratio": 4}),
    "strided": Case((3, 3), (28, 28), (128, 256), 2, 1, batch=4, settings=HALVES),
    "pointwise": Case((1, 1), (14, 14), (1024, 256), batch=8),
    "uneven": Case((3, 3), (13, 17), (96, 160), padding=1, batch=5, settings=WHOLE),
}


@gpu_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
def test_layers_of_networks(case, channels_last, dtype):
    tolerance = 1e-2 if dtype is torch.bfloat16 else 1e-5
    for scratch in (1 << 28, 1 << 23):
        compare(case, scratch, channels_last, dtype=dtype, tolerance=tolerance)


@gpu_only
def test_is_captured_by_a_graph():
    """Launches alone: nothing waits for the device, and a replay gives the same bits."""
    *tensors, spec = LARGE["uneven"].make()
    x, alpha, cells = (t.detach().to("cuda", torch.bfloat16) for t in tensors)
    backend = TritonConv(1 << 20)
    expected = backend.forward(x, alpha, cells, spec)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = backend.forward(x, alpha, cells, spec)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


# --- what needs no kernel -----------------------------------------------------------------------


def problem(case=CASES["2d"], **changes):
    *_, spec = case.make()
    settings = {"dtype": torch.float32, "device": "cuda", **changes}
    return Problem(spec, cells=54, batch=128, size=case.size, **settings)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on CPU tensors")
def test_refuses_other_devices():
    assert TritonConv().refusal(problem(device="cpu")) == "runs on CUDA devices, not on 'cpu'"


def test_refuses_what_it_cannot_do():
    refusal = TritonConv().refusal
    assert "float64" in refusal(problem(dtype=torch.float64))
    assert refusal(problem(CASES["2d grouped"])) == "does ungrouped convolutions only, not 2 groups"


@pytest.mark.parametrize("size", [(1 << 16, 1 << 14), (1 << 24, 1 << 7)])
def test_refuses_offsets_that_32_bits_do_not_hold(size):
    small = problem(CASES["2d"])
    assert small.input_numel * 1000 < 1 << 31
    assert "2^31" in TritonConv().refusal(replace(small, size=size))
    assert "2^31" in triton_on_chip.TritonOnChip().refusal(replace(small, size=size))


@pytest.mark.parametrize("groups", [1, 4])
def test_refuses_more_taps_than_bits(groups):
    """It would read where no tap meets the input."""
    backend = TritonConv() if groups == 1 else TritonDepthwise()
    case = Case((33,), (64,), (4, 4), groups=groups)
    assert backend.refusal(problem(case)).endswith("up to 32 positions along an axis, not of 33")
    if TRITON:
        assert backend.refusal(problem(replace(case, kernel=(32,)))) is None


@pytest.mark.skipif(not TRITON, reason="needs Triton")
def test_accepts_the_rest():
    assert TritonConv().refusal(problem(dtype=torch.bfloat16)) is None


def test_refuses_without_triton(monkeypatch):
    """An import that fails is told as the reason, and is not raised."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "kw.warehouse.ops.triton_kernels", raising=False)
    monkeypatch.delattr("kw.warehouse.ops.triton_kernels", raising=False)
    triton_launch.kernel_module.cache_clear()
    try:
        assert TritonConv().refusal(problem()).startswith("needs Triton, which cannot be imported")
    finally:
        triton_launch.kernel_module.cache_clear()


@pytest.mark.parametrize("scratch", [1, 1 << 16, 1 << 22, 1 << 40])
def test_chunks_cover_everything_within_the_scratch(scratch):
    case = Case((3, 3), (7, 7), (48, 40), batch=6)
    *_, spec = case.make()
    seen = torch.zeros(6, 40, dtype=torch.int)
    chunks = list(itertools.product(*TritonConv(scratch)._chunks(spec, 6, 2)))
    row = 9 * 48 * 2
    for samples, rows in chunks:
        seen[samples, rows] += 1
        size = (samples.stop - samples.start) * (rows.stop - rows.start) * row
        assert size <= scratch or (samples.stop - samples.start, rows.stop - rows.start) <= (1, 16)
    assert (seen == 1).all()
    assert (len(chunks) == 1) == (scratch >= 6 * 40 * row)


@pytest.mark.parametrize("rule", [tiles_of_convolution, tiles_of_gradient])
def test_tiles_fit_into_the_shared_memory_of_small_gpus(rule):
    """Compute capability 8.6, 8.9 and 12.0 have 99 KB; compilers keep all stages but one there."""
    sizes = (16, 24, 32, 64, 96, 192, 384, 1024, 3136)
    for batch, itemsize in itertools.product((1, 4, 16, 32, 64, 128, 1024), (2, 4)):
        for sides in itertools.product(sizes, repeat=3):
            tiles = rule(batch, *sides, itemsize)
            stage = (tiles.rows + tiles.columns) * tiles.inner * itemsize
            assert (tiles.stages - 1) * stage <= 99 << 10, (batch, sides, tiles)


def test_cost_counts_what_is_assembled(monkeypatch):
    """Training assembles twice and contracts the kernels' gradient twice."""
    layer = Case((3, 3), (7, 7), (512, 512), padding=1)
    bf16 = torch.bfloat16
    forward, both = (
        TritonConv().cost(problem(layer, dtype=bf16, training=training))
        for training in (False, True)
    )
    kernels = 128 * 512 * 512 * 9
    assert forward.dense_macs == kernels * (54 + 64)  # 49 positions take a tile of 64
    assert both.dense_macs == kernels * (4 * 54 + 3 * 64)
    assert 2 * 2 * kernels < forward.bytes < 2.1 * 2 * kernels
    assert both.launches > forward.launches
    wide = TritonConv().cost(problem(layer, dtype=bf16, cells_dtype=torch.float32))
    assert wide.bytes > forward.bytes
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert TritonConv().cost(problem(layer)).slow_macs == 64 * kernels  # float32, no tensor cores


@pytest.mark.long
@can_start_interpreter
@either_mark
def test_in_the_interpreter(marks):
    """One process for all kernels: most of its time are imports."""
    names = ("test_on_chip.py", "test_triton_depthwise.py", "test_fused_coefficients.py")
    run_in_interpreter(marks, __file__, *(str(Path(__file__).with_name(name)) for name in names))
