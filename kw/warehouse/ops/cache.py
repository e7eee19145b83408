"""The folder of files that take time to make again: the compiled library, timings."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path:
    """``$KW_CACHE_DIR``; else ``kernelwarehouse`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    A user without a home, as in containers, gets a folder below the temporary one.
    """
    if given := os.environ.get("KW_CACHE_DIR"):
        return Path(given).absolute()  # libraries without a folder are looked for elsewhere
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "kernelwarehouse"
    try:
        return Path.home() / ".cache" / "kernelwarehouse"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"kernelwarehouse-{os.getuid()}"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a folder or of a file, which is made; other processes wait for it."""
    try:
        import fcntl
    except ImportError:  # not POSIX: processes may do the same work twice
        yield
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
