"""A run's work directory: locked by one run at a time; the checkpoint to resume from."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from ..config import ConfigError
from ..errors import UserError
from .checkpoint import CheckpointError
from .distributed import Process, from_first
from .logs import logger
from .presence import set_place
from .saving import checkpoints, newest_whole, remaining

LOCK = "run.lock"
_T = TypeVar("_T")


@contextmanager
def held(work_dir: Path, process: Process) -> Iterator[None]:
    """Lock a work directory against other runs; a collective call.

    The operating system holds the lock: it is released when its process ends, in any way.

    Raises:
        ConfigError: another run writes there.
        OSError: the folder cannot be made; on all processes.
    """
    set_place("locking the work directory")
    handle = _on_first(process, lambda: _lock(work_dir))
    try:
        yield
    finally:
        if process.is_main and handle is not None:
            with suppress(OSError):
                (work_dir / LOCK).unlink()
            os.close(handle)


def _lock(work_dir: Path) -> int | None:
    """An open file that holds the lock; ``None`` where the file system has none."""
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # Not flock: the loader's processes would hold on to it after this one was killed.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            os.close(handle)
            remedy = "wait for it to end, or choose another folder"
            if "TORCHELASTIC_RUN_ID" in os.environ:
                remedy += "; processes of one torchrun train together with --launcher pytorch"
            raise ConfigError(
                f"--work-dir {work_dir} is in use by a run ({holder}); {remedy}"
            ) from None
        except OSError as error:
            os.close(handle)
            logger.warning(
                f"{work_dir}: cannot be locked ({error.strerror}); do not start another run there"
            )
            return None
        with suppress(OSError):
            if os.fstat(handle).st_ino == path.stat().st_ino:
                break
        os.close(handle)  # its holder deleted the file meanwhile
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return handle


def find_checkpoint(resume: bool | str | Path, work_dir: Path, process: Process) -> Path | None:
    """The checkpoint to continue from, the same on all processes; ``resume`` as for
    :func:`kw.training.train`.

    Raises:
        ConfigError: ``work_dir`` holds a run that is not to be resumed.
        CheckpointError: all of its checkpoints are damaged.
    """
    if not isinstance(resume, bool):
        path, found = Path(resume), checkpoints(work_dir)
        if path.exists() and any(path.samefile(earlier) for earlier in found[:-1]):
            logger.warning(
                f"{path}: {found[-1].name} stays in {work_dir}, and --resume alone goes on from it "
                "until this run has passed it; move later checkpoints away to leave them behind"
            )
        return path
    set_place("looking for a checkpoint to resume from")
    # Other processes may see another state of a shared disk.
    return _on_first(process, lambda: _newest(resume, work_dir))


def _on_first(process: Process, work: Callable[[], _T]) -> _T:
    """Run ``work`` on the first process; its result or error on all. A collective call."""
    found: Any = None
    if process.is_main:
        try:
            found = work()
        except (UserError, OSError) as error:  # the other processes wait for an answer
            found = error
    found = from_first(found)
    if isinstance(found, Exception):
        raise found
    answer: _T = found
    return answer


def _newest(resume: bool, work_dir: Path) -> Path | None:
    found = remaining(work_dir)
    if not found:
        return None
    if not resume:
        raise ConfigError(
            f"--work-dir {work_dir} holds a run already ({found[-1].name}); continue it with "
            "--resume, or choose another folder"
        )
    faults: list[str] = []
    path = newest_whole(work_dir, faults.append)
    for fault in faults:
        logger.warning(fault)
    if path is None:
        listed = "\n  ".join(faults)
        raise CheckpointError(f"no checkpoint of {work_dir} is intact:\n  {listed}")
    return path
