"""How images ``[B, C, *space]`` lie in memory: contiguous, or channels last."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def lies_channels_last(x: Tensor) -> bool:
    """Whether ``[B, C, *space]`` lies in memory as ``[B, *space, C]`` and not as it is written."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def channels_last(x: Tensor) -> Tensor:
    """The image with its channels last in memory; copied where they are not."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def laid_out(x: Tensor, last: bool) -> Tensor:
    """The image with its channels last in memory, or contiguous; copied where it lies otherwise."""
    return channels_last(x) if last else x.contiguous()


def empty(
    like: Tensor, channels: int, size: Sequence[int], last: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """A new image of as many samples, of another number of channels and another size."""
    shape = (like.shape[0], *size, channels) if last else (like.shape[0], channels, *size)
    image = like.new_empty(shape, dtype=dtype)
    return image.movedim(-1, 1) if last else image
