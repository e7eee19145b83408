"""Learning rate and temperature, set before every update."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook

from ...registry import HOOKS
from ...warehouse import has_temperature, set_temperature

__all__ = ["ScheduleHook"]


@HOOKS.register_module()
class ScheduleHook(Hook):
    """Sets what :class:`kw.engine.schedule.Schedule` says, before the update that it is for.

    A parameter group's rate is the schedule's times its ``lr_scale``.
    """

    priority = "VERY_HIGH"

    def __init__(self) -> None:
        self._temperature: float | None = None

    def before_train(self, runner: Any) -> None:
        self._anneals = has_temperature(runner.task.network)
        schedule = runner.schedule
        runner.logger.info(
            f"{schedule.total_updates} updates, {schedule.updates_per_epoch} an epoch; "
            f"{schedule.warmup_updates} of them warm up"
        )

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        lr = runner.schedule.lr(runner.iter)
        for group in runner.optim_wrapper.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        tau = runner.schedule.temperature(runner.iter)
        if self._anneals and tau != self._temperature:
            set_temperature(runner.task.network, tau)
            self._temperature = tau
