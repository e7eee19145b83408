"""Registers the papers' models with timm, without importing timm.

``import kw`` has to work without timm and to be quick with it, and ``timm.create_model`` has to
know our models whichever of the two is imported first. timm has no plug-in mechanism for models:
where it is not imported yet, a finder on ``sys.meta_path`` waits for its import.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_with_timm() -> None:
    """Make ``timm.create_model("kw_...")`` work: now, or as soon as timm is imported."""
    if "timm" in sys.modules:
        if sys.modules["timm"] is not None:  # None in sys.modules forbids an import
            from . import entrypoints  # noqa: F401
    elif not any(isinstance(finder, _AfterTimm) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTimm())


class _AfterTimm(MetaPathFinder):
    """Finds timm as the other finders do, and registers our models once it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            register_with_timm()

        # On this loader alone: it was made for this spec, and stays what inspect expects it to be.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
