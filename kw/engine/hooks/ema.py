"""Exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import Hook
from torch import nn

from ...registry import HOOKS
from ..distributed import average_batch_norm
from ..parallel import local

__all__ = ["EmaHook"]


@HOOKS.register_module()
class EmaHook(Hook):
    """Averages parameters after every update and copies buffers, the temperature among them.

    Args:
        decay: share of the old average that is kept; none in the first two updates, which lead far
            from the initial weights.
        average: what holds it, a copy of the network, sharded as it is.
    """

    priority = "HIGH"

    def __init__(self, decay: float, average: nn.Module) -> None:
        self.decay = decay
        self.average = average

    def before_run(self, runner: Any) -> None:
        runner.ema = self.average

    @torch.no_grad()
    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        network = runner.task.network
        averages = [local(parameter) for parameter in self.average.parameters()]
        current = [local(parameter) for parameter in network.parameters()]
        kept = self.decay if runner.iter > 1 else 0.0
        torch._foreach_lerp_(averages, current, weight=1 - kept)
        for average, buffer in zip(self.average.buffers(), network.buffers(), strict=True):
            average.copy_(buffer)

    def after_train_epoch(self, runner: Any) -> None:
        average_batch_norm(self.average)
