"""Where a run's figures and pictures go: TensorBoard, Weights & Biases, MLflow, trackio, your own.

The packages are imported when a run begins that asks for them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ConfigError
from ..config.tree import flat_settings
from ..registry import LOGGERS


@dataclass(frozen=True)
class LoggedRun:
    """A run that begins or goes on.

    Attributes:
        work_dir: its folder, whose name is the run's.
        settings: the resolved configuration.
        config_name: name of the configuration's file.
        config_text: its text.
        update: updates done before.
    """

    work_dir: Path
    settings: dict[str, Any]
    config_name: str
    config_text: str
    update: int


class Logger:
    """Subclass it, write the methods that are needed, and register the class in ``LOGGERS``.

    The configuration's arguments go to ``__init__``, in all processes; the other methods are called
    in the main process alone.

    Attributes:
        package: what has to be installed.
        run_id: what the service calls the run; set it in :meth:`start`. Checkpoints carry it, and
            a resumed run has it before :meth:`start`.
    """

    package: str | None = None
    run_id: str | None = None

    def start(self, run: LoggedRun) -> None:
        """Once, before the first update."""

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        """Finite figures by name, ``train/loss`` for instance, after so many updates."""

    def image(self, name: str, pixels: np.ndarray, update: int) -> None:
        """A picture, uint8 ``[H, W, 3]``."""

    def close(self, finished: bool) -> None:
        """At the end; ``finished``: no error and no signal ended the run."""


def build_loggers(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Logger]:
    """The loggers of a configuration.

    Raises:
        ConfigError: the package of one is not installed.
    """
    found = {}
    for name, args in config.items():
        entry = LOGGERS.find(name)
        package = getattr(entry, "package", None)
        if package and package not in sys.modules and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"loggers.{name}: the package {package} is not installed: pip install {package}"
            )
        found[name] = entry(**args)
    return found


@LOGGERS.register("tensorboard")
class TensorBoard(Logger):
    """Events in the work directory, ``tensorboard/``."""

    def start(self, run: LoggedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = str(run.work_dir / "tensorboard")
        # What a run makes again is hidden, also one that was killed before its first checkpoint.
        self._writer = SummaryWriter(folder, purge_step=run.update + 1)

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, update)

    def image(self, name: str, pixels: np.ndarray, update: int) -> None:
        self._writer.add_image(name, pixels, update, dataformats="HWC")

    def close(self, finished: bool) -> None:
        self._writer.close()


@LOGGERS.register("wandb")
class Wandb(Logger):
    """Weights & Biases. The figures' axis is ``update``, since its own steps cannot go back to a
    checkpoint.

    Args:
        project: name of the project.
        **args: further arguments of ``wandb.init``.
    """

    package = "wandb"

    def __init__(self, project: str, **args: Any) -> None:
        self._args = {"project": project, **args}

    def start(self, run: LoggedRun) -> None:
        import wandb

        self._image = wandb.Image
        ours: dict[str, Any] = {
            "name": run.work_dir.name,
            "dir": str(run.work_dir),
            "config": run.settings,
        }
        if self.run_id is not None:
            ours |= {"id": self.run_id, "resume": "allow", "allow_val_change": True}
        self._run = wandb.init(**{**ours, **self._args})
        self.run_id = self._run.id
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        self._run.log({**values, "update": update})

    def image(self, name: str, pixels: np.ndarray, update: int) -> None:
        self._run.log({name: self._image(pixels), "update": update})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


@LOGGERS.register("mlflow")
class MLflow(Logger):
    """MLflow: metrics, the configuration as parameters and as a file, pictures as artifacts.

    Args:
        experiment: its name.
        tracking_uri: where the records are; ``None`` leaves it to MLflow and its environment.
        **args: further arguments of ``mlflow.start_run``.
    """

    package = "mlflow"

    def __init__(self, experiment: str, tracking_uri: str | None = None, **args: Any) -> None:
        self._experiment, self._uri, self._args = experiment, tracking_uri, args

    def start(self, run: LoggedRun) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        if self._uri is not None:
            mlflow.set_tracking_uri(self._uri)
        mlflow.set_experiment(self._experiment)
        begins = self.run_id is None
        ours = {"run_name": run.work_dir.name} if begins else {"run_id": self.run_id}
        self.run_id = mlflow.start_run(**{**ours, **self._args}).info.run_id
        if begins:  # parameters cannot change
            mlflow.log_params(flat_settings(run.settings))
            mlflow.log_text(run.config_text, run.config_name)

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        self._mlflow.log_metrics(dict(values), step=update)

    def image(self, name: str, pixels: np.ndarray, update: int) -> None:
        self._mlflow.log_image(pixels, f"{name}/{update}.png")

    def close(self, finished: bool) -> None:
        self._mlflow.end_run("FINISHED" if finished else "FAILED")


@LOGGERS.register("trackio")
class Trackio(Logger):
    """trackio, which finds a run again by its name.

    Args:
        project: name of the project.
        **args: further arguments of ``trackio.init``.
    """

    package = "trackio"

    def __init__(self, project: str, **args: Any) -> None:
        self._args = {"project": project, **args}

    def start(self, run: LoggedRun) -> None:
        import trackio

        self._trackio: Any = trackio
        given = {"config": run.settings, **self._args}
        if self.run_id is not None:  # the name that it got, where another run had the one asked for
            given |= {"name": self.run_id, "resume": "allow"}
        self.run_id = trackio.init(**given).name

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        self._trackio.log(dict(values), step=update)

    def image(self, name: str, pixels: np.ndarray, update: int) -> None:
        self._trackio.log({name: self._trackio.Image(pixels)}, step=update)

    def close(self, finished: bool) -> None:
        self._trackio.finish()
