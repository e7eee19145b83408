"""What mmengine's reading of Python files lacks: the line that set each key, and packages' folders.

mmengine merges the values of all files without their origins, so the syntax trees are read too. For
a base file of another package, ``mmdet::_base_/models/mask-rcnn_r50_fpn.py``, it imports
``pkg_resources``, which current setuptools no longer has.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ..config import ConfigError
from ..config.tree import Entry, Origin, join

BASE = "_base_"


def read_origins(path: str, chain: tuple[str, ...] = ()) -> dict[str, Origin]:
    """The place where every dotted key of a Python file and its bases was set last; ``chain`` are
    the files that inherit from it. Bases of other packages (``mmdet::...``) are left out.

    Raises:
        ConfigError: a file is missing or not Python, or the bases form a circle.
    """
    steps = [os.path.realpath(step) for step in chain]
    if os.path.realpath(path) in steps:
        raise ConfigError(
            f"{chain[-1]}: {BASE}: inheritance goes in a circle: {' -> '.join((*chain, path))}"
        )
    tree = _parse(path, chain)
    found: dict[str, Origin] = {}
    own: dict[str, Origin] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    own.update(_keys(target.id, statement.value, target.lineno, path))
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == BASE for target in statement.targets
        ):
            for base in _base_names(statement.value, path):
                base_path = os.path.normpath(os.path.join(os.path.dirname(path), base))
                found.update(read_origins(base_path, (*chain, path)))
    own.pop(BASE, None)
    return {**found, **own}


def entry_with_origins(value: Any, key: str, origins: dict[str, Origin], origin: Origin) -> Entry:
    """The tree of a Python value, with the line that set each part. Tuples become lists."""
    origin = origins.get(key, origin)
    if isinstance(value, dict):
        children = {
            str(name): entry_with_origins(child, join(key, name), origins, origin)
            for name, child in value.items()
        }
        return Entry(children, origin)
    return Entry(_as_lists(value), origin)


def _as_lists(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_as_lists(item) for item in value]
    return value


def _parse(path: str, chain: tuple[str, ...]) -> ast.Module:
    where = f"{chain[-1]}: {BASE} = {path!r}" if chain else path
    try:
        return ast.parse(Path(path).read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise ConfigError(f"{where}: no such file: {path}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: expected a Python file, found one that is not text") from None
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ConfigError(f"{path}{line}: not valid Python: {error}") from None


def _keys(key: str, node: ast.expr, line: int, path: str) -> Iterator[tuple[str, Origin]]:
    yield key, Origin(path, line)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        for keyword in node.keywords:
            if keyword.arg is not None:
                child = join(key, keyword.arg)
                yield from _keys(child, keyword.value, keyword.lineno, path)
    if isinstance(node, ast.Dict):
        for name, value in zip(node.keys, node.values, strict=True):
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield from _keys(join(key, name.value), value, name.lineno, path)


def _base_names(node: ast.expr, path: str) -> list[str]:
    """The bases that are local files; mmengine reads the others."""
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)):
        raise ConfigError(
            f"{path}:{node.lineno}: {BASE} = {value!r}: expected a file name or a list of them"
        )
    return [n for n in names if isinstance(n, str) and "::" not in n and "{{" not in n]


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


def _imported_as(distribution: str) -> Iterator[str]:
    """The names by which a distribution's packages are imported: read if asked, for it takes a
    second."""
    owners = packages_distributions()
    yield from (name for name in owners if distribution in owners[name])


def installed_path(package: str) -> str:
    """The folder of a package, by its name, ``mmcv``, or that of its distribution, ``mmcv-lite``;
    it is not imported. A PackageNotFoundError: there is none."""
    for name in chain([package], _imported_as(package)):
        # With a dot in the name, find_spec would import the parent.
        spec = None if "." in name else importlib.util.find_spec(name)
        if spec is not None and spec.origin:
            return str(Path(spec.origin).parent)
    raise PackageNotFoundError(package)
