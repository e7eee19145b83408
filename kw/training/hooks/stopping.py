"""Early stopping."""

from __future__ import annotations

from typing import Any

from ...registry import HOOKS
from ..logs import logger
from ..task import Metrics, headline
from ..trainer import Trainer
from .base import Hook


@HOOKS.register("early_stopping")
class EarlyStopping(Hook):
    """Ends a run whose score has not risen for some evaluations; ``best.pth`` is the best one.

    Args:
        patience: evaluations without a better score after which the run ends.
        min_delta: what the score must rise by to count as better, in its units.
    """

    is_shared = True  # metrics are reduced over the processes

    def __init__(self, patience: int, min_delta: float = 0.0) -> None:
        self.patience = patience
        self.min_delta = min_delta
        self._best = float("-inf")
        self._without = 0

    def before_training(self, trainer: Trainer) -> None:
        if self._without >= self.patience:
            trainer.stops = True
            logger.warning("early_stopping: the run was stopped before; nothing is trained")

    def after_evaluation(self, trainer: Trainer, metrics: Metrics) -> None:
        score = headline(metrics)[trainer.task.score]
        if score is not None and score > self._best + self.min_delta:
            self._best, self._without = score, 0
            return
        self._without += 1
        if self._without >= self.patience:
            trainer.stops = True
            logger.info(
                f"early_stopping: no better {trainer.task.score} than {self._best:.3f} in "
                f"{self._without} evaluations; the run ends after epoch {trainer.epoch}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "without": self._without}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best, self._without = state["best"], state["without"]
