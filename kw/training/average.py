"""Exponential moving average of the weights."""

from __future__ import annotations

import torch
from torch import nn

from ..torch_private import lerp_all
from .parallel import local

__all__ = ["MovingAverage"]


class MovingAverage:
    """Averages parameters after every update and copies buffers, the temperature among them.

    Args:
        network: a copy of the trained network, sharded as it is; it holds the average.
        decay: share of the old average that is kept; none in the first two updates, which lead far
            from the initial weights.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = network
        self.decay = decay

    @torch.no_grad()
    def update(self, trained: nn.Module, updates_before: int) -> None:
        """Take an update's weights in; ``updates_before``: updates of the run before it."""
        averages = [local(parameter) for parameter in self.network.parameters()]
        current = [local(parameter) for parameter in trained.parameters()]
        kept = self.decay if updates_before > 1 else 0.0
        lerp_all(averages, current, 1 - kept)
        for average, buffer in zip(self.network.buffers(), trained.buffers(), strict=True):
            average.copy_(buffer)
