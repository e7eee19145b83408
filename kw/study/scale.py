"""A scale: one file that says how the recipe of every row of a published table is made smaller.

A file of ``configs/scales`` holds rules; its head describes them. The published recipes themselves
are the scale ``full``, which has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..config.loading import read_config
from ..errors import valid_names

_RULE_KEYS = {"when", "set", "data"}
# Settings that recipes count in epochs.
_IN_EPOCHS = ("schedule.warmup_epochs", "schedule.milestones", "temperature_epochs")


@dataclass(frozen=True)
class Scale:
    """How recipes are scaled."""

    name: str  # of its file
    title: str  # what it does, for readers of the results
    rules: tuple[Mapping[str, Any], ...] = ()  # as in the file, in their order

    def settings(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of the rules, by dotted key.

        Args:
            own: the row's own configuration by dotted key, and ``task``: ``"classification"`` or
                ``"detection"``.
        """
        rules = [rule for rule in self.rules if _holds(rule, own)]
        return {key: value for rule in rules for key, value in rule.get("set", {}).items()}

    def data(self, task: str) -> str | None:
        """The set generated for a task where none is named; None if it must exist already."""
        rules = [rule for rule in self.rules if _holds(rule, {"task": task})]
        named = [rule["data"] for rule in rules if rule.get("data")]
        return named[-1] if named else None


def _holds(rule: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Whether each key of ``when`` has the value, or one of the values."""
    return all(
        own.get(key) in (value if isinstance(value, list) else [value])
        for key, value in rule.get("when", {}).items()
    )


FULL = Scale("full", "the shipped configurations as they are")


def read_scale(name: str, folder: Path) -> Scale:
    """A scale by its name, or by the path of its file.

    Args:
        name: ``"full"``, the stem of a file in ``folder``, or a path that ends in ``.yaml``.
        folder: of the scales.

    Raises:
        ConfigError: there is no such scale, or its file is wrong.
    """
    if name == FULL.name:
        return FULL
    path = Path(name) if name.endswith(".yaml") else folder / f"{name}.yaml"
    if not path.is_file():
        known = [FULL.name, *sorted(file.stem for file in folder.glob("*.yaml"))]
        raise ConfigError(f"--scale {name}: no such file: {path}{valid_names(name, known)}")
    content = read_config(path).plain()
    rules = content.get("rules")
    whole = set(content) == {"title", "rules"} and isinstance(content["title"], str)
    if not whole or not isinstance(rules, list):
        raise ConfigError(f"{path}: expected title and rules, found {', '.join(content)}")
    for number, rule in enumerate(rules, 1):
        where = f"{path}: rule {number}"
        if not isinstance(rule, dict) or not set(rule) <= _RULE_KEYS:
            raise ConfigError(f"{where}: expected a mapping with {', '.join(sorted(_RULE_KEYS))}")
        if not all(isinstance(rule.get(key, {}), dict) for key in ("when", "set")):
            raise ConfigError(f"{where}: expected mappings of dotted keys as when and set")
    return Scale(path.stem, content["title"], tuple(rules))


def epochs_scaled(own: Mapping[str, Any], epochs: int) -> dict[str, Any]:
    """Warm-up, annealing and milestones of a recipe at the same share of so many epochs.

    The recipe and the settings that change are by dotted key.
    """
    share = epochs / own["epochs"]
    scaled: dict[str, Any] = {}
    for key in _IN_EPOCHS:
        value = own.get(key)
        if value and share != 1:
            scaled[key] = [v * share for v in value] if isinstance(value, list) else value * share
    return scaled
