"""Configurations of classification runs: reading, checking and printing them.

::

    config = load_config("configs/imagenet/resnet18/kw_resnet18_1x.yaml", ["seed=1"])
    config.optimizer.lr

The settings are the dataclasses of :mod:`kw.config.schema`. A file is read safely and merged with
its bases (:mod:`kw.config.loading`), then checked as a whole before anything is built
(:mod:`kw.config.checking`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from .checking import check
from .loading import parse_config, read_config
from .names import config_file
from .printing import reference, to_dict, to_yaml
from .schema import Config
from .tree import ConfigError, Origin, entry_from_plain

__all__ = [
    "Config",
    "ConfigError",
    "config_from_mapping",
    "config_from_text",
    "load_config",
    "reference",
    "to_dict",
    "to_yaml",
]


def load_config(
    path: str | os.PathLike[str], options: Iterable[str] = (), *, check_model_name: bool = True
) -> Config:
    """Read and check a configuration file.

    Args:
        path: a YAML file, or the name of one of this project's (``kw config --list`` prints them);
            its ``_base_`` files are read with it.
        options: ``a.b=value`` strings that override the file's settings, the value in YAML's flow
            style.
        check_model_name: look ``model.name`` up in timm, where that is installed; its import takes
            seconds.

    Raises:
        ConfigError: with one line for every problem: file and line, key, value, what was expected
            and the nearest valid name.
    """
    return check(read_config(config_file(path), options), check_model_name)


def config_from_mapping(
    mapping: Mapping[str, Any], source: str = "<mapping>", *, check_model_name: bool = True
) -> Config:
    """Check a configuration that is a mapping already, with the keys of a file but no ``_base_``.

    Args:
        mapping: the settings, nested as in a file.
        source: its name in error messages.
        check_model_name: as in :func:`load_config`, as are the errors.
    """
    return check(entry_from_plain(mapping, Origin(source)), check_model_name)


def config_from_text(text: str, source: str) -> Config:
    """Check a configuration that a checkpoint carries, as :func:`to_yaml` wrote it.

    Args:
        text: YAML, resolved.
        source: its name in error messages; they are those of :func:`load_config`.
    """
    return check(parse_config(text, source))
