"""The folder of files that take time to make again: the compiled library, timings."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """``$KW_CACHE_DIR``; else ``kernelwarehouse`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    A user without a home, as in containers, gets a folder below the temporary one.
    """
    given = os.environ.get("KW_CACHE_DIR")
    if given:
        return Path(given)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "kernelwarehouse"
    try:
        return Path.home() / ".cache" / "kernelwarehouse"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"kernelwarehouse-{os.getuid()}"
