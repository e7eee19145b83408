"""The folders of installed packages, for mmengine's configurations.

For a base file of another package, ``mmdet::_base_/models/mask-rcnn_r50_fpn.py``, mmengine imports
``pkg_resources``, which current setuptools no longer has. The standard library has the same.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from unittest.mock import patch

__all__ = ["installed_path", "is_installed", "packages_from_metadata"]


@contextlib.contextmanager
def packages_from_metadata() -> Iterator[None]:
    """Inside it, mmengine's ``Config.fromfile`` finds packages without ``pkg_resources``.

    It replaces two functions of mmengine's module for a while, in all threads.
    """
    import mmengine.config.config as module

    with (
        patch.object(module, "is_installed", is_installed),
        patch.object(module, "get_installed_path", installed_path),
    ):
        yield


def is_installed(package: str) -> bool:
    """Whether :func:`installed_path` finds a package."""
    try:
        installed_path(package)
    except PackageNotFoundError:
        return False
    return True


def installed_path(package: str) -> str:
    """The folder of a package, by its name, ``mmcv``, or that of its distribution, ``mmcv-lite``;
    it is not imported. A PackageNotFoundError: there is none."""
    names = [package]
    with contextlib.suppress(PackageNotFoundError):
        names += (distribution(package).read_text("top_level.txt") or "").split()
    for name in names:
        # With a dot in the name, find_spec would import the parent.
        spec = None if "." in name else importlib.util.find_spec(name)
        if spec is not None and spec.origin:
            return str(Path(spec.origin).parent)
    raise PackageNotFoundError(package)
