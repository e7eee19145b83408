"""What the tests of Triton back ends share: where kernels run, and the comparison.

Kernels run on a GPU where there is one. Elsewhere they go through Triton's interpreter, which must
be asked for before Triton is imported: a test file runs itself again in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from breadth import breadth
from convolutions import Case

from kw.warehouse.ops import triton_launch
from kw.warehouse.ops.reference import conv_reference
from kw.warehouse.ops.triton_conv import TritonConv

# Cases of every axis and of pointwise kernels, which are read another way.
FEW = ["1d even kernel, stride, dilation", "2d uneven in every way", "2d pointwise strided"]
FEW += ["2d whole cells"]
INTERPRETED = triton_launch.interpreted()
TRITON = importlib.util.find_spec("triton") is not None
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"


def interpreter_loops():
    """Whether it counts loops: up to Triton 3.6 it cannot from NumPy 2.4 on, which took back that
    an array of one value is a number."""
    *tensors, spec = Case((1,), (2,), (1, 1), batch=1).make()
    x, alpha, cells = (t.detach().float() for t in tensors)
    try:
        TritonConv().backward(x, x, alpha, cells, spec, (False, True, False))
    except Exception as error:
        if "0-dimensional" in str(error):
            return False
        raise
    return True


NO_INTERPRETER = "needs Triton and a GPU or an interpreter that works with this NumPy"
runs_kernels = pytest.mark.skipif(
    not (TRITON and (GPU or (INTERPRETED and interpreter_loops()))), reason=NO_INTERPRETER
)
gpu_only = pytest.mark.skipif(not (TRITON and GPU), reason="needs Triton and a GPU")
can_start_interpreter = pytest.mark.skipif(
    INTERPRETED or sys.platform != "linux", reason="this is that process; or Triton is not built"
)
either_mark = pytest.mark.parametrize("marks", breadth(["not slow", "slow"], ["not slow"]))


def run_in_interpreter(marks, *paths):
    """Tests of files on the CPU, also where there is a GPU. Kernels that are not run are a
    failure: no other test runs them."""
    assert TRITON, "the tests need Triton: pip install triton"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, *paths]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert NO_INTERPRETER not in result.stdout, "Triton's interpreter does not work here"
    assert " passed" in result.stdout


def layout(x, channels_last):
    x = x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


def compare(
    backend, case, channels_last=False, dtype=torch.float32, tolerance=1e-5, cells_dtype=None
):
    """Relative errors against the reference in float64, on inputs rounded to ``dtype``."""
    *tensors, spec = case.make()
    tensors = [t.detach().to(dtype).double().requires_grad_() for t in tensors]
    expected = conv_reference(*tensors, spec)
    weight = torch.randn_like(expected).to(dtype).double()
    expected_gradients = torch.autograd.grad(expected, tensors, weight)

    x, alpha, cells, grad = (t.detach().to(DEVICE, dtype) for t in (*tensors, weight))
    x, grad, alpha = layout(x, channels_last), layout(grad, channels_last), alpha.float()
    cells = cells.to(cells_dtype or dtype)
    actual = backend.forward(x, alpha, cells, spec)
    gradients = backend.backward(grad, x, alpha, cells, spec, (True, True, True))
    dtypes = (dtype, dtype, torch.float32, cells.dtype)
    for name, ours, theirs, kind in zip(
        ("y", "x", "alpha", "cells"),
        (actual, *gradients),
        (expected, *expected_gradients),
        dtypes,
        strict=True,
    ):
        assert (ours.dtype, ours.shape) == (kind, theirs.shape), name
        error = (ours.cpu().double() - theirs).norm()
        wrong = f"{name} is off by {error:.1e} of {theirs.norm():.1e}"
        assert error <= tolerance * theirs.norm(), wrong  # NaN is not below
