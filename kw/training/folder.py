"""A run's work directory: one run at a time, and which checkpoint it goes on from."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..config import ConfigError
from .checkpoint import CheckpointError
from .distributed import Process
from .logs import logger
from .presence import set_place
from .saving import checkpoints, newest_whole

__all__ = ["find_checkpoint", "held"]

LOCK = "run.lock"


@contextmanager
def held(work_dir: Path, process: Process) -> Iterator[None]:
    """Keep other runs out of a work directory; a collective call.

    The lock is the operating system's: it goes with the process that holds it, however this ends.

    Raises:
        ConfigError: another run writes there.
        OSError: the folder cannot be made; on all processes.
    """
    set_place("taking hold of the work directory")
    error: Exception | None = None
    handle = None
    if process.is_main:
        try:
            handle = _lock(work_dir)
        except (ConfigError, OSError) as refused:  # the other processes wait for an answer
            error = refused
    _raise_everywhere(error)
    try:
        yield
    finally:
        if handle is not None:
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
            raise ConfigError(
                f"--work-dir {work_dir} is in use by a run ({holder}); wait for it to end, or "
                "choose another folder"
            ) from None
        except OSError as error:
            os.close(handle)
            logger.warning(
                f"{work_dir}: cannot be locked ({error.strerror}): start no other run there"
            )
            return None
        with suppress(OSError):
            if os.fstat(handle).st_ino == path.stat().st_ino:
                break
        os.close(handle)  # its holder took it away meanwhile
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return handle


def find_checkpoint(resume: bool | str | Path, work_dir: Path, process: Process) -> Path | None:
    """The checkpoint to continue from, the same on all processes.

    Args:
        resume: as for :func:`kw.training.train`.
        work_dir: of the run.
        process: this process.

    Raises:
        ConfigError: ``work_dir`` holds a run that is not to be resumed.
        CheckpointError: none of its checkpoints is whole.
    """
    if not isinstance(resume, bool):
        return Path(resume)
    set_place("looking for a checkpoint to go on from")
    # Only the first process looks: others might see another state of a shared disk.
    path, error = _newest(resume, work_dir) if process.is_main else (None, None)
    found: Path | None = _raise_everywhere(error, path)
    return found


def _raise_everywhere(error: Exception | None, value: Any = None) -> Any:
    """The first process's value on all of them, or its error."""
    answer = [value, error]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def _newest(resume: bool, work_dir: Path) -> tuple[Path | None, Exception | None]:
    found = checkpoints(work_dir)
    if not found:
        return None, None
    if not resume:
        message = (
            f"--work-dir {work_dir} holds a run already ({found[-1].name}); continue it with "
            "--resume, or choose another folder"
        )
        return None, ConfigError(message)
    faults: list[str] = []
    path = newest_whole(work_dir, faults.append)
    for fault in faults:
        logger.warning(fault)
    if path is None:
        listed = "\n  ".join(faults)
        return None, CheckpointError(f"no checkpoint of {work_dir} is whole:\n  {listed}")
    return path, None
