"""``kw.train``: the Python function behind ``kw train``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from .config.names import config_file
from .config.tree import ConfigError, flat_settings
from .hub import is_hub_name


def load_run(path: str | Path, options: Iterable[str] = ()) -> tuple[Any, ModuleType]:
    """A configuration, and the package that can ``train`` and ``evaluate_checkpoint`` it.

    Args:
        path: a file, or a name (:func:`kw.config.names.config_file`).
        options: ``a.b=value`` settings over the file's.

    Raises:
        ConfigError: the configuration is wrong, or is a detector's and mmdetection is missing.
    """
    from .config import load_config

    file = config_file(path)  # its name says which kind it is
    if file.suffix != ".py":
        from . import training

        return load_config(file, options), training
    try:
        from . import detection

        return detection.load_detector_config(file, options), detection
    except ImportError as error:
        raise ConfigError(f"{path}: a detector's configuration: {error}") from error


def is_run(path: str) -> bool:
    """Whether a word of a command line is a run, not a configuration: a work directory, a
    checkpoint, a folder of ``kw pull``, or a model on the hub."""
    return Path(path).is_dir() or path.endswith(".pth") or is_hub_name(path)


def run_of(config: str | Path, checkpoint: str | Path | None = None) -> tuple[str | Path, Path]:
    """A configuration and a checkpoint, from both or from a run alone.

    Args:
        config: a configuration's file or name; without ``checkpoint``, a run (:func:`is_run`),
            whose ``config.yaml`` or ``config.py`` is taken.
        checkpoint: a file, or the work directory whose best one is taken.

    Raises:
        ConfigError: there is no configuration beside the checkpoint.
        CheckpointError: the work directory has none.
    """
    from .training.trained import trained_file

    if checkpoint is not None:
        return config, trained_file(checkpoint)
    file = trained_file(config)
    for name in ("config.yaml",) if is_hub_name(config) else ("config.yaml", "config.py"):
        if (beside := file.parent / name).is_file() and file.suffix in (".pth", ".safetensors"):
            return beside, file
    raise ConfigError(f"{config}: required: CHECKPOINT, or a work directory in the place of CONFIG")


def runs_of(first: str, others: Sequence[str]) -> list[tuple[str | Path, Path]]:
    """Configurations and checkpoints: of several runs, or of one configuration's checkpoints.

    Args:
        first: a configuration, then ``others`` are its checkpoints; or a run, as the others are.
        others: as for :func:`run_of`.

    Raises:
        ConfigError, CheckpointError: as for :func:`run_of`.
    """
    if is_run(first):
        return [run_of(run) for run in (first, *others)]
    return [run_of(first, checkpoint) for checkpoint in others] or [run_of(first)]


def default_folder(config: str | Path) -> Path:
    """``work_dirs/`` and the configuration's name; of a run's own configuration, its folder."""
    path = Path(config)
    is_of_run = path.stem == "config" and (path.parent / "log.jsonl").is_file()
    return path.parent if is_of_run else Path("work_dirs", path.stem)


def train(
    config: str | Path,
    work_dir: str | Path | None = None,
    *,
    resume: bool | str | Path = False,
    launcher: str = "none",
    **keys: Any,
) -> dict[str, float | None]:
    """Train and evaluate: ``kw.train("kw_resnet18_1x", data={"root": "photos"}, epochs=20)``.

    Args:
        config: a configuration file, or the name of one of this project's (``kw config --list``).
        work_dir: where logs, checkpoints and results go; default ``work_dirs/`` and the
            configuration's name, or the folder of the run whose own configuration it is.
        resume: ``True`` continues the newest checkpoint there; a path continues that file.
        launcher: ``"none"``, ``"pytorch"`` (torchrun) or ``"slurm"``.
        **keys: settings that override the file's, groups as mappings, or by dotted key:
            ``**{"optimizer.lr": 0.1}``.

    Returns:
        The last evaluation's figures, see :func:`kw.training.train`.

    Raises:
        ConfigError: a key is unknown or has a wrong value; otherwise as :func:`kw.training.train`.
    """
    # JSON is valid YAML; other values are passed as text, and fail the check of types.
    options = [f"{k}={json.dumps(v, default=str)}" for k, v in flat_settings(keys).items() if k]
    settings, package = load_run(config, options)
    folder = default_folder(config) if work_dir is None else work_dir
    figures: dict[str, float | None] = package.train(
        settings, folder, resume=resume, launcher=launcher
    )
    return figures
