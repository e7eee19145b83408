"""Starts and ends the loggers of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...config import ConfigError
from ...config.loading import parse_config
from ..loggers import Board, LoggedRun, build_loggers
from .base import Hook

if TYPE_CHECKING:
    from ..trainer import Trainer

__all__ = ["LoggerHook"]


class LoggerHook(Hook):
    """Gives the main process ``trainer.board``, and a resumed run the external runs that it had.

    Args:
        config: ``loggers`` of the configuration.

    Raises:
        ConfigError: the package of one is not installed.
    """

    is_shared = True  # the main process's is everyone's

    def __init__(self, config: Mapping[str, Mapping[str, Any]]) -> None:
        self._loggers = build_loggers(config)
        self._finished = False

    def state_dict(self) -> dict[str, Any]:
        """The runs' names at the services, by logger."""
        return {name: each.run_id for name, each in self._loggers.items() if each.run_id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, run_id in state.items():
            if name in self._loggers:
                self._loggers[name].run_id = run_id

    def before_training(self, trainer: Trainer) -> None:
        if not trainer.process.is_main:
            return
        name, text = trainer.task.config_name, trainer.task.config_text
        try:
            settings = parse_config(text, "").plain()
        except ConfigError:  # a detector's, which is Python
            settings = {"config": text}
        trainer.board = Board(self._loggers)
        trainer.board.start(LoggedRun(trainer.work_dir, settings, name, text, trainer.update))

    def after_training(self, trainer: Trainer) -> None:
        self._finished = True

    def close(self, trainer: Trainer) -> None:
        if trainer.board is not None:
            trainer.board.close(self._finished)
