"""This project's configurations, by name: in a checkout, or in the installed package."""

from __future__ import annotations

import os
import re
from fnmatch import fnmatch
from pathlib import Path

from ..errors import did_you_mean
from .tree import ConfigError

# Folders of configurations, and prefixes of their names: several have a kw_resnet18_1x.
_RUNS = {
    "imagenet": "",
    "coco": "",
    "demo": "demo_",
    "finetune": "finetune_",
    "recipes": "recipes_",
}

_STUDY = re.compile(r"^(rows|seeds):", re.M)


def configs() -> Path:
    """The folder of this project's configurations, in a checkout or in the installed package."""
    package = Path(__file__).parents[1]
    packed = package / "configs"
    return packed if packed.is_dir() else package.parent / "configs"


def config_names(pattern: str = "*") -> dict[str, Path]:
    """The configurations that can be trained by name, and their files.

    Args:
        pattern: as of file names, for instance ``"*resnet50*"``.
    """
    found: dict[str, Path] = {}
    for file in sorted([*configs().rglob("*.yaml"), *configs().rglob("*.py")]):
        inside = file.relative_to(configs()).parts
        is_hidden = any(part.startswith(".") for part in inside)
        # Bases, scales and studies (which have rows and seeds) are no configurations of a run, nor
        # are hidden files: macOS's on disks of other systems, Jupyter's copies.
        if is_hidden or inside[0] not in _RUNS or _STUDY.search(file.read_text("utf-8")):
            continue
        name = f"{_RUNS[inside[0]]}{file.stem}"
        if fnmatch(name, pattern):
            found[name] = file
    return found


def name_of_config(path: str | os.PathLike[str]) -> str:
    """What a configuration is called: its file, or its folder where it is a run's ``config``."""
    path = Path(path).absolute()
    return path.parent.name if path.stem == "config" else path.stem


def shipped(name: str | os.PathLike[str]) -> Path | None:
    """This project's configuration of a name, or of a path ``configs/...``, if it has one."""
    path = Path(name)
    if path.parts[:1] == ("configs",):
        ours = configs().parent / path
        return ours if ours.is_file() else None
    return None if path.suffix or len(path.parts) > 1 else config_names().get(str(name))


def config_file(name: str | os.PathLike[str]) -> Path:
    """A configuration's file, by its path or by the name of one of this project's. A path
    ``configs/...`` that is not there is this project's too.

    Raises:
        ConfigError: neither is there; the message has the nearest name.
    """
    path = Path(name)
    is_file = os.path.isfile(name)
    if not is_file and (ours := shipped(name)):
        return ours
    if path.suffix or is_file or len(path.parts) > 1:
        return path  # reading it checks whether it is one
    hint = did_you_mean(name, config_names(), 3)
    raise ConfigError(
        f"{name}: no such file, nor a configuration of that name{hint} (kw config --list)"
    )
