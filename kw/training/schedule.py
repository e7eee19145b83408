"""Learning rate and temperature as functions of the optimizer update.

Pure functions of the update's number hold no state: a resumed run cannot differ from one that was
never interrupted, and accumulation cannot stretch them.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

from ..config.run_schema import RunConfig
from ..warehouse import annealed_temperature

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """The schedules of one run.

    Attributes:
        config: the run's configuration.
        updates_per_epoch: optimizer updates in an epoch.
    """

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
        """Learning rate of an update (from 0): linear warm-up, then cosine or steps."""
        schedule, base = self.config.schedule, self.config.optimizer.lr
        warmup = self.warmup_updates
        if update < warmup:
            return base * (update + 1) / warmup
        if schedule.name == "cosine":
            progress = (update - warmup) / max(self.total_updates - warmup, 1)
            swing = 0.5 * (1 + math.cos(math.pi * progress))
            return schedule.final_lr + (base - schedule.final_lr) * swing
        passed = bisect.bisect_right(schedule.milestones, update / self.updates_per_epoch)
        return base * schedule.gamma**passed

    def temperature(self, update: int) -> float:
        """Attention temperature of an update: from 1 linearly to 0, then 0 (paper: Eq. 5)."""
        return annealed_temperature(update, self.config.temperature_epochs * self.updates_per_epoch)
