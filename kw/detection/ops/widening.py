"""The type in which the operators compute: float32 or wider; results are rounded once.

In float16 and bfloat16 the coordinates of boxes are rounded to whole pixels, and some compiled
operators do not take these types.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

__all__ = ["gradients", "widen"]


def widen(*tensors: Tensor) -> list[Tensor]:
    """The tensors, detached, in the widest of their types and float32."""
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    return [t.detach().to(dtype) for t in tensors]


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> tuple[Tensor, ...]:
    """The derivatives of a function by its inputs, all of them wide: it is computed again."""
    *leaves, wide = widen(*inputs, grad)
    with torch.enable_grad():
        output = function(*(leaf.requires_grad_() for leaf in leaves))
    return torch.autograd.grad(output, leaves, wide)
