"""Find which mmcv is installed, and give an mmcv without extension the operators of mmdetection.

This imports nothing of mmcv or mmdetection.
"""

from __future__ import annotations

import enum
import importlib.machinery
import importlib.util
import re
import sys
from pathlib import Path

from packaging.version import Version

__all__ = ["EXTENSION", "INSTALL", "Binding", "bind"]

EXTENSION = "mmcv._ext"
INSTALL = "pip install 'kernelwarehouse[detection]'"


class Binding(enum.Enum):
    """The result of :func:`bind`."""

    BOUND = "mmcv's operators are torchvision's and kw's"
    COMPILED = "a compiled mmcv was found and left alone"
    NOT_NEEDED = "this mmcv's operators need no extension"


def bind() -> Binding:
    """Make ``mmcv.ops``, and with it mmdetection, importable; a second call changes nothing.

    Call it before mmdetection is imported. An ``import mmdet.models`` that failed can be repeated.

    Returns:
        What was found and done. With ``BOUND``, ``sys.modules`` has a module ``mmcv._ext``, whose
        missing operators raise NotImplementedError when they are called.

    Raises:
        ImportError: mmcv or mmdetection is not installed, or their versions do not go together.
    """
    mmcv, mmdet = _folder("mmcv"), _folder("mmdet")
    _check_versions(mmcv, mmdet)
    loaded = sys.modules.get(EXTENSION)
    if loaded is not None:
        from .standin import is_standin

        return Binding.BOUND if is_standin(loaded) else Binding.COMPILED
    if importlib.machinery.PathFinder.find_spec(EXTENSION, [str(mmcv)]) is not None:
        return Binding.COMPILED
    if not _needs_extension(mmcv):
        return Binding.NOT_NEEDED
    from .standin import make_standin

    sys.modules[EXTENSION] = make_standin(EXTENSION)
    return Binding.BOUND


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    if spec is None or spec.origin is None or not folders:
        raise ImportError(
            f"kw.detection needs {package}, which is not installed: {INSTALL}", name=package
        )
    return Path(folders[0])


def _needs_extension(mmcv: Path) -> bool:
    """Whether ``mmcv.ops`` loads an extension; that of a fork may not."""
    wrappers = sorted((mmcv / "ops").glob("*.py"))
    if not wrappers:
        raise ImportError(f"mmcv in {mmcv} has no operators (no ops/*.py): {INSTALL}", name="mmcv")
    return any("_ext" in path.read_text(encoding="utf-8") for path in wrappers)


def _check_versions(mmcv: Path, mmdet: Path) -> None:
    """Compare mmcv's version with the bounds that mmdetection asserts when it is imported; both are
    read from files, and nothing is checked where one has none, as in forks."""
    found = _read(mmcv / "version.py", "__version__")
    lowest = _read(mmdet / "__init__.py", "mmcv_minimum_version")
    beyond = _read(mmdet / "__init__.py", "mmcv_maximum_version")
    if found is None or lowest is None or beyond is None:
        return
    if not Version(lowest) <= Version(found) < Version(beyond):
        raise ImportError(
            f"mmdet in {mmdet} takes mmcv >= {lowest}, < {beyond}, found {found} in {mmcv}: "
            f"{INSTALL} has a pair that goes together",
            name="mmcv",
        )


def _read(path: Path, name: str) -> str | None:
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    found = re.search(rf"^{name}\s*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return found.group(1) if found else None
