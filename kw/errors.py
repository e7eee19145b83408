"""Errors that a user can correct, and the messages that commands print for them.

Every package raises its own kind of :class:`UserError`: ``ConfigError``, ``DataError``,
``CheckpointError`` and so on. This module imports nothing of the project.
"""

from __future__ import annotations

import difflib
import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_logger = logging.getLogger("kw")

EXIT_INTERRUPTED = 75
"""Exit status of a run that was asked to stop and saved its work: EX_TEMPFAIL, try again."""

EXIT_MISSING = 69
"""Exit status after another process of the run was lost: EX_UNAVAILABLE. Launchers restart it."""


class UserError(ValueError):
    """An input of the user is wrong; the message says what, where, and what was expected."""


class OutOfMemory(UserError):
    """Memory ran out on some images; the message names them."""


class Interrupted(Exception):
    """A run was asked to end and has saved its work.

    Attributes:
        checkpoint: the file to resume from.
    """

    def __init__(self, name: str, checkpoint: str) -> None:
        super().__init__(f"{name}: saved {checkpoint}; continue with --resume")
        self.checkpoint = checkpoint


class MissingProcess(Exception):
    """Another process of the run died, hangs or never started; the message names it."""


_REMEDIES = {
    errno.ENOENT: "check the path, relative ones from the folder that the tool was started in",
    errno.EACCES: "check the permissions, or choose another path",
    errno.EPERM: "check the permissions, or choose another path",
    errno.EROFS: "choose a path that can be written",
    errno.EISDIR: "expected a file",
    errno.ENOTDIR: "expected a folder",
    errno.EEXIST: "expected a folder, or another path",
    errno.ENOSPC: "free some space, or choose a path on another disk",
    errno.EDQUOT: "free some space, or choose a path on another disk",
    errno.EFBIG: "choose a path on another disk",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "check the links on the way there",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the network file system",
    errno.EMFILE: "raise the limit (ulimit -n), or lower data.workers",
    errno.ENFILE: "lower data.workers",
    errno.EAGAIN: "the limit of processes is reached (ulimit -u): lower data.workers",
}
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|Cannot allocate memory")
_ONE_VALUE = "Expected more than 1 value per channel when training"
_WORKER_DIED = re.compile(r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) (is killed|exited)")


def say(line: str) -> None:
    """Print a line for the user: by the logger ``kw`` (INFO), or to stderr if that shows nothing.

    A level above INFO of the logger ``kw`` suppresses it. Of several processes only the first
    prints.
    """
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return
    if _logger.hasHandlers() and _logger.isEnabledFor(logging.INFO):
        _logger.info(line)
    elif _logger.level <= logging.INFO:  # the level is not set by the user
        print(line, file=sys.stderr)


def did_you_mean(wrong: object, known: Iterable[str], count: int = 1, quoted: bool = False) -> str:
    """``; did you mean NAME?`` with the names nearest to a wrong one; empty where none is near."""
    near = difflib.get_close_matches(str(wrong), list(known), count)
    names = map(repr, near) if quoted else near
    return f"; did you mean {' or '.join(names)}?" if near else ""


def valid_names(wrong: object, known: Iterable[str]) -> str:
    """The end of a message about a wrong name: the nearest name, if any, and all names."""
    known = list(known)
    return f"{did_you_mean(wrong, known, quoted=True) or ';'} known: {', '.join(known) or 'none'}"


def one_line(error: BaseException) -> str:
    """The message of another library's error in one line, after the name of its class."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


@contextmanager
def writing(path: Path, kind: type[UserError] = UserError) -> Iterator[None]:
    """Write a file inside it: its folder is made, and what prevents either names the file.

    Raises:
        UserError: of this kind, in place of an OSError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise kind(f"{path}: cannot be written: {error.strerror}") from error


def answer(error: BaseException) -> str | None:
    """The message for an error that the user can correct, without traceback; ``None`` for other
    errors, which may be bugs."""
    if isinstance(error, UserError):
        return _own_words(error)
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        where = f"{' -> '.join(names)}: " if names else ""
        return f"{where}{error.strerror}; {_REMEDIES[error.errno]}"
    text = str(error)
    if _is_memory(error):
        return (
            f"out of memory: {_asked_for(error)}; lower batch_size (total_batch_size may stay: "
            "updates are then accumulated), eval_batch_size, data.input_size or the network's size"
        )
    if isinstance(error, RuntimeError) and _WORKER_DIED.search(text):
        return (
            f"{text.splitlines()[0]}; a loader process died, usually for lack of memory: lower "
            "data.workers, or give /dev/shm more room"
        )
    if isinstance(error, ValueError) and _ONE_VALUE in text:
        return (
            f"{text.splitlines()[0]}: a BatchNorm layer gets one image whose map has one position; "
            "set batch_size (images of one process in one forward pass) to 2 or more, or train on "
            "larger images (data.input_size); for a detector, model.backbone.norm_eval=True"
        )
    return None


@contextmanager
def memory_for(images: Callable[[], Iterable[object]]) -> Iterator[None]:
    """Name the images on which memory ran out.

    Args:
        images: a function that returns their files; called only after such an error.

    Raises:
        OutOfMemory: in place of the error of Python or PyTorch.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory with {', '.join(map(str, images()))}: {_asked_for(error)}; lower "
            "eval_batch_size if there are several images, or leave out those that are too large "
            "(data.bad_images.max_pixels)"
        ) from error


def _is_memory(error: BaseException) -> bool:
    # torch.OutOfMemoryError is GPU memory; on the CPU PyTorch raises a plain RuntimeError.
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or bool(_NO_MEMORY.search(str(error))))
    )


def _asked_for(error: BaseException) -> str:
    text = str(error)
    return text.split(". ")[0].splitlines()[0] if text else "no more is left"


def _own_words(error: UserError) -> str:
    """The message without the traceback that PyTorch adds in loader processes."""
    text = str(error)
    if "\nOriginal Traceback (most recent call last):" not in text:
        return text
    kind = type(error)
    return text.rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip()
