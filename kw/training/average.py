"""Exponential moving average of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class MovingAverage:
    """Averages parameters after every update and copies buffers, the temperature among them.

    Args:
        network: a copy of the trained network, sharded as it is; it holds the average.
        decay: share of the old average that is kept; none in the first two updates, which lead far
            from the initial weights.
        warmup: keep less of it early on, as ``tf.train.ExponentialMovingAverage`` does: an average
            over about the last ninth of the updates, until ``decay`` is reached.
    """

    def __init__(self, network: nn.Module, decay: float, warmup: bool = False) -> None:
        self.network = network
        self.decay = decay
        self.warmup = warmup

    @torch.no_grad()
    def update(self, trained: nn.Module, updates_before: int) -> None:
        """Take an update's weights in; ``updates_before``: updates of the run before it."""
        averages = [local(parameter) for parameter in self.network.parameters()]
        current = [local(parameter) for parameter in trained.parameters()]
        get_ema_multi_avg_fn(self.kept(updates_before))(averages, current, None)
        self.copy_buffers(trained)

    @torch.no_grad()
    def copy_buffers(self, trained: nn.Module) -> None:
        """Take the trained network's buffers, as they are."""
        for average, buffer in zip(self.network.buffers(), trained.buffers(), strict=True):
            average.copy_(buffer)

    def kept(self, updates_before: int) -> float:
        """The share of the old average that the next update keeps."""
        if self.warmup:
            return min(self.decay, (1 + updates_before) / (10 + updates_before))
        return self.decay if updates_before > 1 else 0.0
