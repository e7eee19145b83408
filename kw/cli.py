"""What the command-line tools share: options, and answers to a user's mistakes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from .benchmark.conditions import BenchmarkError
from .config import ConfigError
from .data import DataError
from .engine import CheckpointError
from .models.released_weights import ReleasedError

__all__ = ["add_config_options", "add_options", "run_tool"]

USER_ERRORS = (BenchmarkError, ConfigError, DataError, CheckpointError, ReleasedError)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """``CONFIG`` and ``--cfg-options``."""
    parser.add_argument("config", metavar="CONFIG", help="configuration file (YAML)")
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


def run_tool(main: Callable[[], None]) -> None:
    """Run a tool; a user's mistake is one message on stderr and exit status 2."""
    try:
        main()
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
