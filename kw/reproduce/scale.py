"""A scale: how the recipe of every row of a table is made smaller, in one file.

A file of ``configs/scales`` holds rules; its head describes them. The published recipes themselves
are the scale ``full``, which has none.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..config.loading import read_config

__all__ = ["FULL", "Scale", "as_option", "epochs_scaled", "flat", "given_keys", "read_scale"]

_RULE_KEYS = {"when", "set", "data"}
# What recipes count in epochs.
_IN_EPOCHS = ("schedule.warmup_epochs", "schedule.milestones", "temperature_epochs")


@dataclass(frozen=True)
class Rule:
    """One rule of a scale.

    Attributes:
        when: dotted keys of a row's own configuration, or ``task``, and the values, of which each
            must have one.
        settings: dotted keys and values to set.
        data: name of the set that is generated where none is named.
    """

    when: Mapping[str, tuple[Any, ...]]
    settings: Mapping[str, Any]
    data: str | None = None

    def holds(self, settings: Mapping[str, Any]) -> bool:
        """Whether the rule is for a configuration with these dotted keys."""
        return all(settings.get(key) in values for key, values in self.when.items())


@dataclass(frozen=True)
class Scale:
    """How recipes are scaled.

    Attributes:
        name: of its file.
        title: what it does, for a reader of results.
        rules: in the order in which they set keys.
    """

    name: str
    title: str
    rules: tuple[Rule, ...] = ()

    def settings(self, task: str, own: Mapping[str, Any]) -> dict[str, Any]:
        """What the rules set, by dotted key.

        Args:
            task: ``"classification"`` or ``"detection"``.
            own: the row's own configuration, by dotted key.
        """
        known = {**own, "task": task}
        return {
            key: value
            for rule in self.rules
            if rule.holds(known)
            for key, value in rule.settings.items()
        }

    def data(self, task: str) -> str | None:
        """The set that is generated for a task where none is named; None: it has to be there."""
        named = [rule.data for rule in self.rules if rule.data and rule.holds({"task": task})]
        return named[-1] if named else None


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
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"--scale {name}: no such file: {path}; {hint}There are: {', '.join(known)}"
        )
    content = read_config(path).plain()
    rest = {key: value for key, value in content.items() if key not in ("title", "rules")}
    rules = content.get("rules")
    if rest or not isinstance(content.get("title"), str) or not isinstance(rules, list):
        raise ConfigError(f"{path}: expected title and rules, found {', '.join(content)}")
    read = tuple(_rule(rule, f"{path}: rule {n}") for n, rule in enumerate(rules, 1))
    return Scale(path.stem, content["title"], read)


def _rule(content: Any, where: str) -> Rule:
    if not isinstance(content, dict) or not set(content) <= _RULE_KEYS:
        raise ConfigError(f"{where}: expected a mapping with {', '.join(sorted(_RULE_KEYS))}")
    when, settings = content.get("when", {}), content.get("set", {})
    if not isinstance(when, dict) or not isinstance(settings, dict):
        raise ConfigError(f"{where}: expected mappings of dotted keys as when and set")
    values = {key: tuple(v) if isinstance(v, list) else (v,) for key, v in when.items()}
    return Rule(values, settings, content.get("data"))


def epochs_scaled(own: Mapping[str, Any], epochs: int) -> dict[str, Any]:
    """What a recipe counts in epochs, for another number of them.

    Args:
        own: the recipe by dotted key.
        epochs: the new number.

    Returns:
        Warm-up, annealing and milestones that keep their share of the run, by dotted key.
    """
    share = epochs / own["epochs"]
    scaled: dict[str, Any] = {}
    for key in _IN_EPOCHS:
        value = own.get(key)
        if value and share != 1:
            scaled[key] = [v * share for v in value] if isinstance(value, list) else value * share
    return scaled


def as_option(key: str, value: Any) -> str:
    """A setting as ``--cfg-options`` takes it."""
    return f"{key}={json.dumps(value)}"  # YAML's flow style contains JSON


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings by dotted key; an empty one says nothing."""
    return dict(_flat(settings, ""))


def _flat(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def given_keys(options: Iterable[str]) -> dict[str, str]:
    """The dotted keys of ``--cfg-options`` and their values as text."""
    pairs = (option.partition("=") for option in options)
    return {key.strip(): value for key, _, value in pairs}
