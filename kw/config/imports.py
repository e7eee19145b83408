"""``custom_imports``: user modules that register entries for configurations.

Reading a YAML file from others must not run code. A module that it names is imported only where the
user allows it: by ``--import MODULE``, which imports it before the file is read, by
the environment variable ``KW_CUSTOM_IMPORTS`` (``1``, or names with commas between), or by an
``import`` in the user's own program.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable

from ..errors import one_line
from .tree import ConfigError, Entry, show

ALLOW = "KW_CUSTOM_IMPORTS"
GIVEN: list[str] = []
"""The modules of ``--import``, which commands that this process starts are given as well."""


def import_custom(root: Entry) -> None:
    """Import the modules that a tree names.

    Raises:
        ConfigError: one is not allowed, is not found, or fails; or they are no list of names.
    """
    entry = root.value.get("custom_imports")
    names = None if entry is None else entry.plain()
    if entry is None or names is None:
        return
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        where = f"{entry.origin}: custom_imports = {show(names)}"
        raise ConfigError(f"{where}: expected a list of names of modules")
    allowed = [name.strip() for name in os.environ.get(ALLOW, "").split(",")]
    for name in names:
        if name not in sys.modules and "1" not in allowed and name not in allowed:
            raise ConfigError(
                f"{entry.origin}: custom_imports: {name} would run code, and a configuration file "
                f"is data; if you trust that module, add --import {name}, or set {ALLOW}={name}"
            )
    import_modules(names, f"{entry.origin}: custom_imports")


def import_modules(names: Iterable[str], where: str) -> None:
    """Import user modules.

    Raises:
        ConfigError: one is not found, or fails.
    """
    # Last, so that files here cannot shadow installed modules.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{where}: {one_line(error)}; a module of your own must be installed, or lie "
                "in this folder or one of PYTHONPATH"
            ) from error
        except Exception as error:  # whatever the module raises
            raise ConfigError(f"{where}: {name} cannot be imported: {one_line(error)}") from error
