"""Values of tensors that FSDP2 has sharded (``DTensor``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor``; without the half second of its import."""
    return hasattr(tensor, "device_mesh")


def whole_like(tensor: Tensor) -> Tensor:
    """A tensor of all values, to be filled: the tensor itself, or an empty one if it is sharded."""
    if is_sharded(tensor):
        return torch.empty(tensor.shape, device=tensor.device, dtype=tensor.dtype)
    return tensor.detach()


def placed_like(value: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor, sharded as another of its shape is, if it is; all processes get the first
    one's values, by a collective call, then."""
    if is_sharded(value) or not is_sharded(pattern):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(pattern.device, pattern.dtype)
    spec: Any = pattern
    return distribute_tensor(value, spec.device_mesh, spec.placements)
