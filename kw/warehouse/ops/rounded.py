"""Cells rounded to 16 bit under autocast: once for the layers of a warehouse, not once for each.

A warehouse may have four times the parameters of its layers. Rounded by every layer, ResNet50 with
4x cells would write and keep a copy of its warehouses for each of their layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .device import is_capturing


class RoundedCells:
    """The latest rounded copy of one warehouse's cells.

    The copy serves the layers that ask one after another. A layer that asks again begins another
    pass and gets a new copy, so that none is older than the pass under way, however the cells were
    changed in between. So does a layer in another type or stream, or after a change of the cells.
    While a CUDA graph is captured, nothing is shared.
    """

    def __init__(self) -> None:
        # One value, since other threads may replace it at any moment: state, copy, users.
        self._latest: tuple[tuple[Any, ...], Tensor, set[int]] | None = None

    @torch.no_grad()
    def get(self, cells: Tensor, dtype: torch.dtype, user: int) -> Tensor:
        """The cells in a type of 16 bit, without a gradient; ``user`` is the number of the layer
        that asks."""
        if is_capturing(cells.device.type):  # a graph reads no memory that another one owns
            return cells.detach().to(dtype)
        state, latest = _state(cells, dtype), self._latest
        if latest is None or state != latest[0] or user in latest[2]:
            self._latest = latest = state, cells.detach().to(dtype), set()
        latest[2].add(user)
        return latest[1]


def _state(cells: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    """What a copy depends on, beside the values."""
    stream = torch.cuda.current_stream(cells.device).stream_id if cells.is_cuda else 0
    version = 0 if cells.is_inference() else cells._version
    return dtype, cells.data_ptr(), version, stream, torch.is_inference_mode_enabled()
