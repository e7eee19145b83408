"""Library back ends, forward and backward, against autograd through the reference."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from convolutions import CASES, HALVES, Case
from torch import Tensor

from kw.warehouse.ops import ConvSpec, assembly, bmm, depthwise, pointwise
from kw.warehouse.ops.assembled import Assembled
from kw.warehouse.ops.bmm import Bmm, conv_bmm
from kw.warehouse.ops.contraction import Contraction, Problem
from kw.warehouse.ops.depthwise import Depthwise
from kw.warehouse.ops.matmul import _onednn, accumulate, batch_matmul, float32_matmul, matmul
from kw.warehouse.ops.mix_inputs import MixInputs
from kw.warehouse.ops.reference import conv_reference
from kw.warehouse.partition import Partition

CONTRACTIONS: list[Contraction] = [Assembled(), Bmm(), MixInputs(), Depthwise()]
ALL = (True, True, True)
NAMES = ("x", "alpha", "cells")
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def problem_of(x: Tensor, cells: Tensor, spec: ConvSpec, **changes) -> Problem:
    return Problem(spec, len(cells), len(x), tuple(x.shape[2:]), x.dtype, **changes)


def refusal(op: Contraction, case: Case) -> str | None:
    x, _, cells, spec = case.make()
    return op.refusal(problem_of(x, cells, spec))


POSSIBLE = {
    f"{op.name} {name}": (op, case)
    for op in CONTRACTIONS
    for name, case in CASES.items()
    if refusal(op, case) is None
}
every_possible = pytest.mark.parametrize(("op", "case"), POSSIBLE.values(), ids=POSSIBLE)


def expected(x, alpha, cells, spec):
    """``(y, weight of y, gradients)`` by the reference."""
    y = conv_reference(x, alpha, cells, spec)
    torch.manual_seed(1)
    grad = torch.randn_like(y)
    return y.detach(), grad, torch.autograd.grad(y, (x, alpha, cells), grad)


def assert_gradients(actual, wanted, **tolerance):
    for name, ours, theirs in zip(NAMES, actual, wanted, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(
            ours, theirs, **tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@every_possible
def test_values_and_gradients(op, case):
    x, alpha, cells, spec = case.make()
    y, grad, gradients = expected(x, alpha, cells, spec)
    with torch.no_grad():
        torch.testing.assert_close(op.forward(x, alpha, cells, spec), y, **EXACT)
        ours = op.backward(grad, x, alpha, cells, spec, ALL)
    assert_gradients(ours, gradients, **EXACT)


@pytest.mark.parametrize("scratch", [1, 3000])
@every_possible
def test_little_scratch_changes_nothing(op, case, scratch, monkeypatch):
    """Samples one by one, or some at a time; cells in slices, which would be at least 32 rows."""
    monkeypatch.setattr(assembly, "CPU_SCRATCH", scratch)
    monkeypatch.setattr(bmm, "LEAST_ROWS", 1)
    test_values_and_gradients(op, case)


SOME = ("1d even kernel, stride, dilation", "2d", "2d one sample", "2d grouped", "2d depthwise")
SOME += ("2d depthwise multiplier", "2d pointwise", "2d one filter", "2d whole cells", "3d")
some_possible = pytest.mark.parametrize(
    ("op", "case"),
    [
        pytest.param(op, case, id=name)
        for name, (op, case) in POSSIBLE.items()
        if name.partition(" ")[2] in SOME
    ],
)


@pytest.mark.parametrize("needs", [n for n in itertools.product((True, False), repeat=3) if any(n)])
@some_possible
@torch.no_grad()
def test_gradients_that_are_not_wanted(op, case, needs):
    x, alpha, cells, spec = case.make()
    grad = torch.randn(len(x), spec.out_channels, *spec.output_size(x.shape[2:]), dtype=x.dtype)
    wanted = op.backward(grad, x, alpha, cells, spec, ALL)
    actual = op.backward(grad, x, alpha, cells, spec, needs)
    for need, ours, theirs in zip(needs, actual, wanted, strict=True):
        assert (ours is not None) == need
        if need:
            torch.testing.assert_close(ours, theirs, **EXACT)


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS = {
    "channels last": channels_last,
    "sliced": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
}


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("large", [False, True])
@some_possible
def test_tensors_that_are_not_contiguous(op, case, layout, large, monkeypatch):
    """Whether or not images are large enough for calls of their own."""
    for constant in ("_WORTH_A_CALL", "_WORTH_A_CALL_LARGE"):
        monkeypatch.setattr(depthwise, constant, 1 if large else 1 << 30)
    x, alpha, cells, spec = case.make()
    if layout == "expanded":
        x = x[:1].detach().expand(case.batch, *x.shape[1:]).requires_grad_()
    y, grad, gradients = expected(x, alpha, cells, spec)
    if layout == "expanded":
        grad = grad.flatten()[:1].expand(grad.shape)
        gradients = torch.autograd.grad(
            conv_reference(x, alpha, cells, spec), (x, alpha, cells), grad
        )
    else:
        x, grad = (LAYOUTS[layout](t.detach()) for t in (x, grad))
    with torch.no_grad():
        torch.testing.assert_close(op.forward(x, alpha, cells, spec), y, **EXACT)
        assert_gradients(op.backward(grad, x, alpha, cells, spec, ALL), gradients, **EXACT)


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("narrow", ["all", "all but alpha", "x"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@some_possible
def test_narrow_types(op, case, dtype, narrow, monkeypatch):
    """The error relative to the largest value; results in the types of the inputs. Sums of chunks
    do not add to it: one sample, or one row of a cell, at a time."""
    monkeypatch.setattr(assembly, "CPU_SCRATCH", 1)
    monkeypatch.setattr(bmm, "LEAST_ROWS", 1)
    x, alpha, cells, spec = case.make()
    y, grad, gradients = expected(x, alpha, cells, spec)
    x, grad = x.detach().to(dtype), grad.to(dtype)
    alpha = alpha.detach().to(dtype if narrow == "all" else torch.float32)
    cells = cells.detach().to(torch.float32 if narrow == "x" else dtype)
    with torch.no_grad():
        actual = (
            op.forward(x, alpha, cells, spec),
            *op.backward(grad, x, alpha, cells, spec, ALL),
        )
    types = (x.dtype, x.dtype, alpha.dtype, cells.dtype)
    for ours, theirs, kind in zip(actual, (y, *gradients), types, strict=True):
        assert ours.dtype == kind
        error = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert error < TOLERANCE[dtype]


def test_refusals():
    assert {op.name for op, _ in POSSIBLE.values()} == {op.name for op in CONTRACTIONS}
    by_name = {op.name: op for op in CONTRACTIONS}
    for name in ("assembled", "bmm"):
        assert all(refusal(by_name[name], case) is None for case in CASES.values())
    assert refusal(by_name["depthwise"], CASES["2d"]) == "does depthwise layers only"
    assert "6 output channels of a cell do not divide the 3 of each of the 2 groups" in str(
        refusal(by_name["mix_inputs"], CASES["2d grouped one sample"])
    )


CUT = {
    "1d": CASES["1d pointwise"],
    "2d": Case((1, 1), (3, 2), channels=(8, 6), settings=HALVES),
    "strided": replace(CASES["2d pointwise strided"], channels=(16, 12)),
    "few cells": Case((1, 1), (2, 3), (12, 12), settings={"cell_num_ratio": 0.25, **HALVES}),
}


@pytest.fixture
def as_on_gpus(monkeypatch):
    monkeypatch.setattr(pointwise, "_ALWAYS_COPY", ())
    monkeypatch.setattr(pointwise, "_CALL", 0)


@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
@pytest.mark.parametrize("scratch", [1, 300, 1 << 20])
@pytest.mark.parametrize("case", CUT.values(), ids=CUT)
def test_blocks_are_multiplied_where_they_lie(case, scratch, layout, as_on_gpus, monkeypatch):
    """Cells that are cut along input channels, as on GPUs: no kernel is copied."""
    monkeypatch.setattr(assembly, "CPU_SCRATCH", scratch)
    monkeypatch.setattr(bmm, "LEAST_ROWS", 1)
    for copies in ("_group_taps", "_ungroup_taps"):
        monkeypatch.setattr(bmm, copies, None)
    x, alpha, cells, spec = case.make()
    assert spec.partition.grid[2] > 1
    y, grad, gradients = expected(x, alpha, cells, spec)
    x, grad = x.detach(), grad.detach()
    if layout != "contiguous":
        x, grad = LAYOUTS[layout](x), LAYOUTS[layout](grad)
    with torch.no_grad():
        torch.testing.assert_close(Bmm().forward(x, alpha, cells, spec), y, **EXACT)
        ours = Bmm().backward(grad, x, alpha, cells, spec, ALL)
    assert_gradients(ours, gradients, **EXACT)


def test_kernels_are_copied_where_that_reads_less(as_on_gpus, monkeypatch):
    """Activations would be read once a block: two blocks of 16 inputs, 64 outputs."""

    def lies(side: int, cells: int = 2, batch: int = 8, blocks: tuple[int, int] = (2, 2)):
        part = Partition((1, 1), (1, 1), 32, 16, (1, *blocks))
        spec = ConvSpec(part, (1, 1), (0, 0), (1, 1))
        return pointwise.lie(spec, batch, cells, (side, side), "cuda")

    assert lies(7) == (True, True)  # 49 positions < 2 * 32 inputs
    assert lies(8) == (True, False)
    assert lies(12) == (False, False)  # 144 positions > 2 * 64 outputs
    assert lies(7, cells=100) == (False, True)  # more to transpose than to copy
    assert lies(7, blocks=(2, 1)) == (False, False)  # in place as they are
    monkeypatch.setattr(pointwise, "_CALL", 1 << 20)  # too small for more calls
    assert lies(7) == (False, False)


def test_costs_know_what_is_not_copied(as_on_gpus, monkeypatch):
    x, _, cells, spec = CUT["2d"].make()
    for training in (False, True):
        problem = problem_of(x, cells, spec, device="cuda", training=training)
        lying = Bmm().cost(problem)
        with monkeypatch.context() as patch:
            patch.setattr(pointwise, "_ALWAYS_COPY", ("cuda",))
            copied = Bmm().cost(problem)
        assert lying.bytes < copied.bytes
        assert lying.slow_macs < copied.slow_macs
        assert lying.launches > copied.launches
        assert lying.dense_macs == copied.dense_macs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_sums_have_float32_results(dtype):
    """Against float64, on sums that do not cancel: what a result in 16 bit would lose."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(7, 10_000, generator=generator).to(dtype) for _ in range(2))
    exact = a.double() @ b.double().t()

    def error(found: Tensor) -> float:
        return float((found.double() - exact).norm() / exact.norm())

    found = float32_matmul(a, b.t())
    assert found.dtype == torch.float32
    assert error(found) < 1e-6
    assert error(matmul(a, b.t())) > 100 * error(found)


@every_possible
def test_costs_are_costs(op, case):
    """Both passes cost more than one, twice the samples at least as much, on any device."""
    x, _, cells, spec = case.make()
    for device in ("cpu", "cuda"):
        one = op.cost(problem_of(x, cells, spec, device=device))
        both = op.cost(problem_of(x, cells, spec, device=device, training=True))
        more = op.cost(problem_of(torch.cat([x, x]), cells, spec, device=device))
        for key in ("dense_macs", "slow_macs", "bytes", "launches"):
            first = getattr(one, key)
            assert first >= 0
            assert getattr(both, key) >= first
            assert getattr(more, key) >= first
        assert one.dense_macs + one.slow_macs > 0
        assert min(one.bytes, one.launches) > 0


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_differentiable_form(case):
    x, alpha, cells, spec = case.make()
    y, grad, gradients = expected(x, alpha, cells, spec)
    ours = conv_bmm(x, alpha, cells, spec)
    torch.testing.assert_close(ours, y, **EXACT)
    assert_gradients(torch.autograd.grad(ours, (x, alpha, cells), grad), gradients, **EXACT)


class Exported(torch.nn.Module):
    def __init__(self, spec: ConvSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor, alpha: Tensor, cells: Tensor) -> Tensor:
        return conv_bmm(x, alpha, cells, self.spec)


@pytest.mark.parametrize("name", ["2d uneven in every way", "2d grouped", "2d pointwise", "3d"])
def test_differentiable_form_exports_with_any_batch(name):
    x, alpha, cells, spec = CASES[name].make()
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(
        Exported(spec), (x, alpha, cells), dynamic_shapes=(batch, batch, None)
    )
    many = [t.detach().repeat(3, *[1] * (t.dim() - 1)) for t in (x, alpha)]
    torch.testing.assert_close(
        program.module()(*many, cells), conv_reference(*many, cells, spec), **EXACT
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 5), (1, 1, 1), (2, 3, 5), (70, 33, 65)], ids=str)
def test_products(shape, dtype):
    """In any memory layout, small and large enough for oneDNN."""
    rows, inner, columns = shape
    torch.manual_seed(0)
    a, b = torch.randn(4, rows, inner).to(dtype), torch.randn(4, inner, columns).to(dtype)
    tolerance = {"rtol": 0, "atol": {torch.bfloat16: 0.2}.get(dtype, 1e-4)}
    expected = (a.double() @ b.double()).to(dtype)
    forms = (
        lambda t: t,
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.cat([t, t], 2)[..., : t.shape[2]],
        lambda t: torch.stack([t, t], 3)[..., 0],
    )
    for left, right in itertools.product(forms, forms):
        torch.testing.assert_close(batch_matmul(left(a), right(b)), expected, **tolerance)
        torch.testing.assert_close(matmul(left(a)[0], right(b)[0]), expected[0], **tolerance)
        total = torch.ones(rows, 2 * columns, dtype=torch.promote_types(dtype, torch.float32))
        accumulate(total[:, :columns], left(a)[0], right(b)[0])
        torch.testing.assert_close(total[:, :columns].to(dtype), expected[0] + 1, **tolerance)
        assert (total[:, columns:] == 1).all()


@pytest.mark.parametrize("default", [torch.device("meta"), torch.float64], ids=str)
def test_products_do_not_depend_on_torchs_defaults(default):
    there = _onednn() is not None
    _onednn.cache_clear()
    is_type = isinstance(default, torch.dtype)
    (torch.set_default_dtype if is_type else torch.set_default_device)(default)
    try:
        assert (_onednn() is not None) == there
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        _onednn.cache_clear()
