"""Library back ends, forward and backward, against autograd through the reference."""

from __future__ import annotations

import pytest
import torch
from convolutions import CASES
from torch import Tensor

from kw.warehouse.ops import CONTRACTIONS as REGISTERED
from kw.warehouse.ops import ConvSpec, assembly, bmm
from kw.warehouse.ops.contraction import Contraction, Problem
from kw.warehouse.ops.depthwise import Depthwise
from kw.warehouse.ops.mix_inputs import MixInputs
from kw.warehouse.ops.reference import conv_reference

CONTRACTIONS: list[Contraction] = [*REGISTERED.values()]
CONTRACTIONS += [op for op in (Depthwise(), MixInputs()) if op.name not in REGISTERED]
ALL = (True, True, True)
NAMES = ("x", "alpha", "cells")

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_contraction = pytest.mark.parametrize("op", CONTRACTIONS, ids=lambda op: op.name)


def problem_of(x: Tensor, cells: Tensor, spec: ConvSpec, **changes) -> Problem:
    return Problem(spec, len(cells), len(x), tuple(x.shape[2:]), x.dtype, **changes)


def skip_refused(op: Contraction, x: Tensor, cells: Tensor, spec: ConvSpec) -> None:
    if op.refusal(problem_of(x, cells, spec)) is not None:
        pytest.skip("refused")


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


@every_contraction
@every_case
def test_values_and_gradients(case, op):
    x, alpha, cells, spec = case.make()
    skip_refused(op, x, cells, spec)
    y, grad, gradients = expected(x, alpha, cells, spec)
    with torch.no_grad():
        torch.testing.assert_close(op.forward(x, alpha, cells, spec), y, rtol=1e-10, atol=1e-10)
        ours = op.backward(grad, x, alpha, cells, spec, ALL)
    assert_gradients(ours, gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scratch", [1, 3000])
@every_contraction
@every_case
def test_little_scratch_changes_nothing(case, op, scratch, monkeypatch):
    """Samples one by one, or some at a time; cells in slices, which would be at least 32 rows."""
    monkeypatch.setattr(assembly, "CPU_SCRATCH", scratch)
    monkeypatch.setattr(bmm, "LEAST_ROWS", 1)
    test_values_and_gradients(case, op)
