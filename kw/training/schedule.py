"""Learning rate and temperature as functions of the optimizer update.

Pure functions of the update's number hold no state: a resumed run cannot differ from one that was
never interrupted, and accumulation cannot stretch them.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

from ..config.run_schema import RunConfig, ScheduleConfig
from ..registry import SCHEDULES
from ..warehouse import annealed_temperature


@dataclass(frozen=True)
class Moment:
    """Where an update stands in its run, for a schedule.

    Attributes:
        progress: share of the updates after the warm-up that are done, in [0, 1).
        epoch: epochs done, with their fractions.
        lr: the configuration's learning rate, that of the end of the warm-up.
        settings: the configuration's ``schedule``.
    """

    progress: float
    epoch: float
    lr: float
    settings: ScheduleConfig


@SCHEDULES.register()
def cosine(moment: Moment) -> float:
    """Half a cosine from the learning rate to ``schedule.final_lr``."""
    final = moment.settings.final_lr
    return final + (moment.lr - final) * (0.5 * (1 + math.cos(math.pi * moment.progress)))


@SCHEDULES.register()
def step(moment: Moment) -> float:
    """Multiplied by ``schedule.gamma`` at each of ``schedule.milestones``, in epochs."""
    passed = bisect.bisect_right(moment.settings.milestones, moment.epoch)
    return moment.lr * moment.settings.gamma**passed


@dataclass(frozen=True)
class Schedule:
    """The schedules of one run."""

    config: RunConfig
    updates_per_epoch: int

    @property
    def total_updates(self) -> int:
        """Updates of the whole run."""
        return self.config.epochs * self.updates_per_epoch

    @property
    def warmup_updates(self) -> int:
        """Updates of the warm-up."""
        schedule = self.config.schedule
        wanted = round(schedule.warmup_epochs * self.updates_per_epoch)
        return max(wanted, min(schedule.warmup_updates, self.total_updates // 10))

    def lr(self, update: int) -> float:
        """Learning rate of an update (from 0): linear warm-up, then ``schedule.name``."""
        base, warmup = self.config.optimizer.lr, self.warmup_updates
        if update < warmup:
            return base * (update + 1) / warmup
        progress = (update - warmup) / max(self.total_updates - warmup, 1)
        epoch = update / self.updates_per_epoch
        return self._shape(Moment(progress, epoch, base, self.config.schedule))

    @cached_property
    def _shape(self) -> Callable[[Moment], float]:
        settings = self.config.schedule
        return partial(SCHEDULES.find(settings.name), **settings.args)

    def temperature(self, update: int) -> float:
        """Attention temperature of an update: from 1 linearly to 0, then 0 (paper: Eq. 5)."""
        return annealed_temperature(update, self.config.temperature_epochs * self.updates_per_epoch)
