"""Starts and ends the loggers of a run, and gives them its figures and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ...config import ConfigError
from ...config.loading import parse_config
from ...errors import one_line
from ..loggers import LoggedRun, Logger, build_loggers
from ..logs import logger as log
from ..trainer import Trainer
from .base import Hook


class LoggerHook(Hook):
    """All loggers of a run: ``trainer.board`` in the main process. A resumed run gets the external
    runs that it had. A logger that fails once training has begun is left out from then on, with a
    warning.

    Args:
        config: ``loggers`` of the configuration.

    Raises:
        ConfigError: the package of one is not installed; in :meth:`before_training`, one does not
            start.
    """

    is_shared = True  # the main process's is everyone's

    def __init__(self, config: Mapping[str, Mapping[str, Any]]) -> None:
        self._loggers = build_loggers(config)
        self._running: dict[str, Logger] = {}
        self._finished = False

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        """See :meth:`kw.training.loggers.Logger.scalars`."""
        self._each(lambda logger: logger.scalars(values, update))

    def image(self, name: str, pixels: np.ndarray, update: int) -> None:
        """See :meth:`kw.training.loggers.Logger.image`."""
        self._each(lambda logger: logger.image(name, pixels, update))

    def _each(self, call: Callable[[Logger], None]) -> None:
        for name, each in list(self._running.items()):
            try:
                call(each)
            except Exception as error:  # a service may raise anything
                log.warning(f"loggers.{name}: {one_line(error)}; the run goes on without it")
                del self._running[name]

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
        run = LoggedRun(trainer.work_dir, settings, name, text, trainer.update)
        trainer.board = self
        for key, each in self._loggers.items():
            try:
                each.start(run)
            except Exception as error:  # a service may raise anything
                raise ConfigError(f"loggers.{key} does not start: {one_line(error)}") from error
            self._running[key] = each

    def after_training(self, trainer: Trainer) -> None:
        self._finished = True

    def close(self, trainer: Trainer) -> None:
        self._each(lambda logger: logger.close(self._finished))
