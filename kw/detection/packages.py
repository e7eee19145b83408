"""Where installed packages are, for mmengine's configurations, which ask setuptools.

A base file of another package, ``mmdet::_base_/models/mask-rcnn_r50_fpn.py``, makes mmengine import
``pkg_resources``, which current setuptools no longer has. The standard library knows the same.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

__all__ = ["installed_path", "is_installed", "packages_from_metadata"]


@contextmanager
def packages_from_metadata() -> Iterator[None]:
    """Within it mmengine finds packages by the standard library instead of ``pkg_resources``.

    For ``Config.fromfile`` and the functions of ``mmengine.hub``::

        with packages_from_metadata():
            config = Config.fromfile("mask-rcnn.py")

    It replaces two functions of mmengine's modules and puts them back; other threads see them too.
    """
    import mmengine.config.config
    import mmengine.hub.hub
    import mmengine.utils.package_utils as utils

    with (
        patch.object(mmengine.config.config, "is_installed", is_installed),
        patch.object(mmengine.config.config, "get_installed_path", installed_path),
        patch.object(mmengine.hub.hub, "get_installed_path", installed_path),
        patch.object(utils, "is_installed", is_installed),  # hub's install_package asks this one
    ):
        yield


def is_installed(package: str) -> bool:
    """Whether there is a distribution of this name, or else a package or module to import.

    Args:
        package: such as ``mmdet``, or a distribution of another name, ``mmcv-lite``.
    """
    return _distribution(package) is not None or _origin(package) is not None


def installed_path(package: str) -> str:
    """The folder of a package.

    Args:
        package: its name, or that of its distribution.

    Raises:
        importlib.metadata.PackageNotFoundError: there is no such package.
        ValueError: the distribution does not say, or does not have, what it is imported by.
    """
    origin = _origin(package)
    if origin is not None:
        return str(origin.parent)
    distribution = _distribution(package)
    if distribution is None:
        raise importlib.metadata.PackageNotFoundError(package)
    modules = (distribution.read_text("top_level.txt") or "").split()
    origin = _origin(modules[0]) if modules else None
    if origin is None:
        raise ValueError(f"the distribution {package} has no package to import: name the package")
    return str(origin.parent)


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _origin(module: str) -> Path | None:
    """The file of a package or module, without importing it; None for namespaces."""
    if "." in module:  # finding those would import their parents
        return None
    spec = importlib.util.find_spec(module)
    return Path(spec.origin) if spec is not None and spec.origin else None
