"""What the command-line tools share: options, and answers to a user's mistakes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from .benchmark.conditions import BenchmarkError
from .config import ConfigError, load_config
from .data import DataError
from .engine import CheckpointError, NonFiniteError
from .engine.interruption import EXIT_STATUS, Interrupted
from .models.released_weights import ReleasedError

__all__ = ["add_config_options", "add_options", "load_run", "run_tool"]

USER_ERRORS = (
    BenchmarkError,
    ConfigError,
    DataError,
    CheckpointError,
    NonFiniteError,
    ReleasedError,
)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """``CONFIG`` and ``--cfg-options``."""
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="configuration file: YAML for a classifier, Python for a detector",
    )
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """``--cfg-options``."""
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="settings in place of the file's, e.g. data.root=/data/imagenet epochs=100",
    )


def load_run(path: str, options: Iterable[str]) -> tuple[Any, ModuleType]:
    """A configuration, and the package that can ``train`` and ``evaluate_checkpoint`` it.

    Raises:
        ConfigError: the configuration is wrong, or is a detector's and mmdetection is missing.
    """
    if Path(path).suffix != ".py":
        from . import engine

        return load_config(path, options), engine
    try:
        from . import detection

        return detection.load_detector_config(path, options), detection
    except ImportError as error:
        raise ConfigError(f"{path}: a detector's configuration: {error}") from error


def run_tool(main: Callable[[], None]) -> None:
    """Run a tool; a user's mistake is one message on stderr and exit status 2.

    A run that was told to end and saved its work leaves with status 75.
    """
    try:
        main()
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        sys.exit(EXIT_STATUS)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
