"""The average of a layer's input over its positions, from which its coefficients follow."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..torch_private import is_traced


def pool(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Global average over positions, in float32 at least: ``[B, I]``."""
    if is_traced():  # XNNPACK averages in this form only
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.to(wide).mean(dims, keepdim=True).flatten(1)
    if 0 in x.shape[dims[0] :]:  # the average would be NaN, and BatchNorm would keep it
        raise ValueError(f"an input of {list(x.shape)} has no positions to compute kernels from")
    result: Tensor = _Pool.apply(x, dims)
    return result


def _mean(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.mean(dims, dtype=torch.promote_types(x.dtype, torch.float32))


class _Pool(torch.autograd.Function):
    """The same average. Its gradient is one value a channel, which is not written out for every
    position: autograd adds it to the convolution's gradient as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        ctx.dims, ctx.shape, ctx.dtype = dims, x.shape, x.dtype
        return _mean(x, dims)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        positions = math.prod(ctx.shape[dim] for dim in ctx.dims)
        each = (grad / positions).to(ctx.dtype)
        for dim in ctx.dims:  # in ascending order
            each = each.unsqueeze(dim)
        return each.expand(ctx.shape), None
