"""Exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from timm.utils import ModelEmaV3

from ...registry import HOOKS
from ..distributed import average_batch_norm

__all__ = ["EmaHook"]


@HOOKS.register_module()
class EmaHook(Hook):
    """Averages parameters after every update and copies buffers, the temperature among them.

    Args:
        decay: share of the old average that is kept.
    """

    priority = "HIGH"

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def before_run(self, runner: Any) -> None:
        network = runner.task.network
        self._average = ModelEmaV3(network, decay=self.decay, exclude_buffers=True, foreach=True)
        runner.ema = self._average.module

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self._average.update(runner.task.network, step=runner.iter)

    def after_train_epoch(self, runner: Any) -> None:
        average_batch_norm(self._average.module)
