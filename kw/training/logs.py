"""A run's text log: the lines of the logger ``kw``, to the console and to a file."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from tqdm import tqdm

from .distributed import Process, from_first
from .presence import log_to

logger = logging.getLogger("kw")
_FORMAT = logging.Formatter(
    "%(asctime)s - %(levelname)s - %(message)s", datefmt="%Y/%m/%d %H:%M:%S"
)
_handlers: list[logging.Handler] = []
_level: int | None = None  # of the logger before, where it was changed


class _Console(logging.StreamHandler):  # type: ignore[type-arg]  # Python 3.10 takes none
    """Lines above a progress bar, where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except Exception:  # as logging's own handlers do
            self.handleError(record)


class _File(logging.FileHandler):
    """A file that is made, with its folder, for the first line."""

    def _open(self):  # type: ignore[no-untyped-def]  # of a type that typeshed alone knows
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()


def open_log(work_dir: Path, process: Process) -> None:
    """Write to ``WORK_DIR/TIME/TIME.log`` from now on, in place of another run's; collective.

    The first process writes; of the others, errors go to the console. The console is left alone
    where the program has set up logging itself.
    """
    close_log()
    stamp = from_first(time.strftime("%Y%m%d_%H%M%S"))
    path = work_dir.absolute() / stamp / f"{stamp}.log"
    log_to(path)
    global _level
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
        _level = logging.NOTSET
    streams = [getattr(each, "stream", None) for each in logging.getLogger().handlers]
    if sys.stdout not in streams and sys.stderr not in streams:
        console = _Console(sys.stdout)
        console.setLevel(logging.INFO if process.is_main else logging.ERROR)
        _handlers.append(console)
    if process.is_main:
        _handlers.append(_File(path, encoding="utf-8", delay=True))
    for handler in _handlers:
        handler.setFormatter(_FORMAT)
        logger.addHandler(handler)


def close_log() -> None:
    """Write to no run's log any more."""
    global _level
    if _level is not None:
        logger.setLevel(_level)
        _level = None
    for handler in _handlers:
        logger.removeHandler(handler)
        handler.close()
    _handlers.clear()
