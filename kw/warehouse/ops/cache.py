"""Where files are kept that cost time to make again: the compiled library, timings."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """``$KW_CACHE_DIR``; else ``kernelwarehouse`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    given = os.environ.get("KW_CACHE_DIR")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kernelwarehouse"
