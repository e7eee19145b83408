"""Tensors that are not one contraction's are refused by every back end before memory is read."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from convolutions import HALVES, Case
from torch import Tensor

from kw.warehouse.ops import BACKENDS, CONTRACTIONS, ConvSpec, check_backend, dynamic_conv

WRONG = {
    "coefficients in float64": lambda x, alpha, cells: (x, alpha.double(), cells),
    "coefficients in bfloat16": lambda x, alpha, cells: (x, alpha.bfloat16(), cells),
    "integer coefficients": lambda x, alpha, cells: (x, alpha.long(), cells),
    "too few samples of coefficients": lambda x, alpha, cells: (x, alpha[:2], cells),
    "one sample of coefficients": lambda x, alpha, cells: (x, alpha[:1], cells),
    "too many samples of coefficients": lambda x, alpha, cells: (x[:2], alpha, cells),
    "too few mixtures": lambda x, alpha, cells: (x, alpha[:, 1:], cells),
    "flat coefficients": lambda x, alpha, cells: (x, alpha.flatten(1), cells),
    "too few cells": lambda x, alpha, cells: (x, alpha, cells[:-1]),
    "too many cells": lambda x, alpha, cells: (x, alpha, torch.cat([cells, cells])),
    "cells too small": lambda x, alpha, cells: (x, alpha, cells[:, :-1]),
    "cells with axes": lambda x, alpha, cells: (x, alpha, cells[..., None]),
    "cells in float64": lambda x, alpha, cells: (x, alpha, cells.double()),
    "too few input channels": lambda x, alpha, cells: (x[:, 1:], alpha, cells),
    "a spatial axis too few": lambda x, alpha, cells: (x[..., 0], alpha, cells),
    "no batch": lambda x, alpha, cells: (x[0], alpha, cells),
    "integer input": lambda x, alpha, cells: (x.long(), alpha, cells.long()),
    "no samples, coefficients of three": lambda x, alpha, cells: (x[:0], alpha, cells),
    "coefficients elsewhere": lambda x, alpha, cells: (x, alpha.to("meta"), cells),
    "cells elsewhere": lambda x, alpha, cells: (x, alpha, cells.to("meta")),
}
MESSAGE = r"^(the (input|cells|coefficients): expected .*; found \[|the input is torch)"


def tensors() -> tuple[Tensor, Tensor, Tensor, ConvSpec]:
    x, alpha, cells, spec = Case((3, 3), (5, 7), padding=1, settings=HALVES).make()
    return x.detach().float(), alpha.detach().float(), cells.detach().float(), spec


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_refused_at_the_way_in(wrong, backend):
    """Also while gradients are recorded; a valid call on the same values works."""
    *given, spec = tensors()
    for grad in (False, True):
        bad = wrong(*(t.clone().requires_grad_(grad) for t in given))
        with pytest.raises(ValueError, match=MESSAGE):
            dynamic_conv(*bad, spec, backend)


@pytest.mark.parametrize("name", CONTRACTIONS)
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_refused_by_a_back_end_that_is_called_itself(wrong, name):
    *given, spec = tensors()
    bad = wrong(*given)
    grad = torch.zeros(len(bad[0]), spec.out_channels, 5, 7)
    with pytest.raises(ValueError, match=r"expected .*; found"):
        CONTRACTIONS[name].forward(*bad, spec)
    with pytest.raises(ValueError, match=r"expected .*; found"):
        CONTRACTIONS[name].backward(grad, *bad, spec, (True, True, True))


@pytest.mark.parametrize("name", CONTRACTIONS)
@pytest.mark.parametrize(
    "wrong", [lambda g: g[:2], lambda g: g[..., 1:], lambda g: g.double(), lambda g: g.to("meta")]
)
def test_gradient_that_is_not_the_outputs_is_refused(wrong, name):
    *given, spec = tensors()
    grad = wrong(torch.zeros(3, spec.out_channels, 5, 7))
    with pytest.raises(ValueError, match=r"the output.s gradient: expected .*; found"):
        CONTRACTIONS[name].backward(grad, *given, spec, (True, True, True))


def test_refused_while_compiling_and_by_the_operator():
    x, alpha, cells, spec = tensors()
    op = torch.ops.kw.dynamic_conv
    with pytest.raises(ValueError, match="the coefficients: expected"):
        op(x, alpha[:1], cells, spec.encode(), "auto")
    with pytest.raises(ValueError, match="the cells: expected"):
        op(x.to("meta"), alpha.to("meta"), cells[:, 1:].to("meta"), spec.encode(), "auto")
    compiled = torch.compile(dynamic_conv, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="the coefficients: expected"):
        compiled(x, alpha[:1], cells, spec)


@pytest.mark.parametrize("backend", ["native", "auto", "assembled"])
def test_lazily_negated_tensors(backend):
    """A view of conjugated numbers' imaginary part has its sign in no byte."""
    *given, spec = tensors()
    expected = dynamic_conv(*given, spec, "reference")
    negated = [torch.complex(t, -t).conj().imag for t in given]
    assert all(t.is_neg() for t in negated)
    torch.testing.assert_close(dynamic_conv(*negated, spec, backend), expected)


OUT_OF_MEMORY = """
import resource
import sys
import torch
from torch.nn.functional import conv2d
from kw.warehouse.ops import CONTRACTIONS, ConvSpec, native
from kw.warehouse.ops.assembly import assemble
from kw.warehouse.partition import KernelShape, partition_kernels

def problem(channels, size):
    warehouse = partition_kernels([KernelShape(channels, channels, (3, 3))])
    spec = ConvSpec(warehouse.layers[0], (1, 1), (1, 1), (1, 1))
    x = torch.randn(2, channels, size, size).contiguous(memory_format=torch.channels_last)
    alpha = torch.randn(2, spec.partition.mixtures, warehouse.cells)
    return spec, (x, alpha, torch.randn(warehouse.cells, channels * channels))

def run(spec, tensors, results):
    (x, alpha, cells), (y, dalpha, dcells) = tensors, results
    layer = native._layer(spec, 2, len(cells), tuple(x.shape[2:]))
    calls = ("kw_mix", (x, alpha, cells, y)), ("kw_gradients", (x, y, alpha, cells, dalpha, dcells))
    for name, arguments in calls:
        try:
            native._call(name, layer, arguments, (False, True, True))
        except MemoryError:
            print(name, "ran out of memory")

channels, size = map(int, sys.argv[1:])
torch.set_num_threads(2)
small = problem(4, 6)
run(*small, [torch.empty_like(t) for t in small[1]])  # the threads and the library are there now
large = problem(channels, size)
results = [torch.zeros_like(t) for t in large[1]]
pages = int(open("/proc/self/statm").read().split()[0])
limit, most = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), most))
run(*large, results)
resource.setrlimit(resource.RLIMIT_AS, (limit, most))
run(*large, results)
spec, (x, alpha, cells) = large
y = torch.cat([conv2d(a, k, padding=1) for a, k in zip(x.split(1), assemble(alpha, cells, spec))])
torch.testing.assert_close(results[0], y, rtol=1e-3, atol=1e-2)
print("done")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory as Linux does")
@pytest.mark.parametrize(
    ("shape", "failing"),
    [((4, 1000), ["kw_mix", "kw_gradients"]), ((1024, 6), ["kw_mix"])],
    ids=["tables", "threads' own"],
)
def test_native_without_memory_raises_and_goes_on(shape, failing):
    """The caller's thread makes tables, each thread of OpenMP its own scratch memory."""
    _, _, cells, spec = tensors()
    try:
        check_backend("native", spec, cells)
    except ValueError as error:
        pytest.skip(str(error))
    script = [sys.executable, "-c", OUT_OF_MEMORY, *map(str, shape)]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [*(f"{name} ran out of memory" for name in failing), "done"]
