"""What tests of detection begin with: operators bound to mmcv, or all of them skipped.

Operators are called as models call them, by mmcv's wrappers, and compared with definitions in
float64, values and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("mmdet", reason="needs mmdetection", exc_type=ImportError)

from kw.detection.ops import Binding, bind

if bind() is not Binding.BOUND:
    pytest.skip("mmcv brings operators of its own", allow_module_level=True)

import mmcv.ops as operators

__all__ = ["DEVICES", "DTYPES", "compare", "draw", "operators"]

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# How far results may be from float64's, of inputs around one.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = list(TOLERANCE)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def compare(
    operator: Callable[..., Tensor],
    definition: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    device: str,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Both get the same rounded inputs; values, and gradients for random cotangents, agree."""
    rounded = [t.to(dtype).double().requires_grad_() for t in inputs]
    cast = [t.detach().to(device, dtype).requires_grad_() for t in rounded]
    expected, found = definition(*rounded), operator(*cast)
    assert found.dtype == dtype
    assert found.device.type == device
    cotangent = draw(*expected.shape, seed=99).to(dtype)
    wanted = torch.autograd.grad(expected, rounded, cotangent.double())
    gradients = torch.autograd.grad(found, cast, cotangent.to(device))
    for ours, theirs in zip((found, *gradients), (expected, *wanted), strict=True):
        scale = max(theirs.abs().max().item(), 1) if theirs.numel() else 1
        close = {"atol": TOLERANCE[dtype] * scale, "rtol": 0}
        torch.testing.assert_close(ours.detach().cpu().double(), theirs.detach(), **close)
