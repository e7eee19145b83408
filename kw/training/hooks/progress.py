"""A progress bar, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ..task import Metrics
from ..trainer import Trainer
from .base import Hook


class ProgressHook(Hook):
    """One bar an epoch: updates, the time that is left of it, and the best score so far."""

    def __init__(self) -> None:
        self._bar: Any = None

    def before_epoch(self, trainer: Trainer) -> None:
        if not (trainer.process.is_main and sys.stderr.isatty()):
            return
        self._bar = tqdm(
            desc=f"epoch {trainer.epoch + 1}/{trainer.config.epochs}",
            total=trainer.updates_per_epoch,
            initial=trainer.updates_of_epoch,
            unit="update",
            leave=False,
            dynamic_ncols=True,
        )
        if trainer.best >= 0:
            self._bar.set_postfix_str(f"best {trainer.task.score} {trainer.best:.3f}")

    def after_update(self, trainer: Trainer, losses: Mapping[str, Tensor]) -> None:
        if self._bar is None:
            return
        self._bar.update()
        if trainer.updates_of_epoch == trainer.updates_per_epoch:
            self._bar.set_postfix_str("ending the epoch: evaluation, checkpoint")

    def after_epoch(self, trainer: Trainer, metrics: Metrics | None) -> None:
        self.close(trainer)

    def close(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
