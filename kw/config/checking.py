"""From a tree of values to a :class:`Config`, with checks of types and bounds.

All problems are collected and reported at once. A wrong value is replaced by its default or example
so that the rules between settings (:mod:`kw.config.rules`) can run; their reports about a wrong
setting are dropped.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Generic, TypeVar

from ..errors import did_you_mean
from .describe import UNIONS, allowed, default_of, is_required, key_hints, type_hints
from .imports import import_custom
from .rules import Expect, check_rules, ignored_settings
from .schema import Config
from .tree import OPTIONS, ConfigError, Entry, join, show

C = TypeVar("C")

_BAD = object()
_TESTS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


@dataclasses.dataclass(frozen=True)
class Schema(Generic[C]):
    """The schema of a kind of configuration.

    Attributes:
        cls: its dataclass.
        rules: ``(config, expect)``; states the rules between settings.
        ignored: settings without effect, each with the reason.
    """

    cls: type[C]
    rules: Callable[[C, Expect], None] = lambda config, expect: None
    ignored: Callable[[C], Iterable[tuple[str, str]]] = lambda config: ()


def check(root: Entry, check_model_name: bool = True) -> Config:
    """The configuration of a classifier that a tree describes, see :func:`check_tree`."""

    rules = partial(check_rules, check_model_name=check_model_name)
    config = check_tree(root, Schema(Config, rules, ignored_settings), stacklevel=4)
    if config.data.channels != 3:
        # timm's name for it; networks are built from the settings of the model alone.
        config.model.timm_args["in_chans"] = config.data.channels
    return config


def check_tree(root: Entry, schema: Schema[C], stacklevel: int = 3) -> C:
    """The configuration that a tree describes.

    Warns of settings without effect that the user's own file or options set.

    Args:
        root: the merged tree of a file.
        schema: the kind of configuration.
        stacklevel: of the warnings, as for :func:`warnings.warn`.

    Raises:
        ConfigError: with one line for every problem.
    """
    if "custom_imports" in type_hints(schema.cls):
        import_custom(root)  # before the choices are looked up
    checker = _Checker(root, schema.cls)
    config: C = checker.table(schema.cls, root, "")
    schema.rules(config, partial(checker.rule, config))
    if checker.problems:
        raise ConfigError(*checker.problems)
    for key, reason in schema.ignored(config):
        entry, _ = root.find(key)
        chosen = _get(config, key) != default_of(checker.hints[key][1])
        if chosen and _is_deliberate(entry, root, schema.cls):
            message = f"{entry.origin}: {key} = {show(entry.plain())} has no effect: {reason}"
            warnings.warn(message, stacklevel=stacklevel)
    return config


class _Checker:
    def __init__(self, root: Entry, cls: Any) -> None:
        self.root = root
        self.problems: list[str] = []
        self.wrong: set[str] = set()
        self.hints = key_hints(cls)

    def problem(self, entry: Entry, key: str, message: str) -> Any:
        self.wrong.add(key)
        self.problems.append(f"{entry.origin}: {key}{message}")
        return _BAD

    def expect(self, entry: Entry, key: str, expected: str) -> Any:
        return self.problem(entry, key, f" = {show(entry.plain())}: expected {expected}")

    def rule(self, config: Any, right: bool, expected: str, *keys: str) -> None:
        """A rule between settings; the message about a broken one points to the first key."""
        if right or any(f"{key}.".startswith(f"{bad}.") for key in keys for bad in self.wrong):
            return
        entries = [self.root.find(key) for key in keys]
        values = [f"{key} = {show(_get(config, key))}" for key in keys]
        message = f"{entries[0][0].origin}: {values[0]}: expected {expected}"
        for value, (entry, own) in zip(values[1:], entries[1:], strict=True):
            message += f"{',' if value is not values[1] else ';'} {value}"
            message += f" ({entry.origin if own else 'the default'})"
        self.problems.append(message)

    def table(self, cls: Any, entry: Entry, key: str) -> Any:
        """An instance of a dataclass from a mapping."""
        hints = type_hints(cls)
        for name, child in entry.value.items():
            if name not in hints:
                self._unknown(child, key, name, list(hints))
        values = {}
        for field in dataclasses.fields(cls):
            child_key = join(key, field.name)
            if field.name in entry.value:
                value = self.value(
                    hints[field.name], entry.value[field.name], child_key, field.metadata
                )
                if value is not _BAD:
                    values[field.name] = value
            elif is_required(field):
                if dataclasses.is_dataclass(hints[field.name]):
                    missing = Entry({}, entry.origin)
                    values[field.name] = self.table(hints[field.name], missing, child_key)
                else:
                    self._missing(entry, child_key, hints[field.name], field.metadata)
            if field.name not in values and is_required(field):
                values[field.name] = _stand_in(hints[field.name], field)
        return cls(**values)

    def value(self, hint: Any, entry: Entry, key: str, metadata: Mapping[str, Any]) -> Any:
        """A value converted to its type hint, or _BAD once its problem is noted."""
        expected = allowed(hint, metadata)
        options = typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,)
        if entry.value is None and type(None) in options:
            return None
        # No union in the schema has two members for one kind of YAML node.
        by_node = {_node(option): option for option in options if option is not type(None)}
        given = next((node for node in (dict, list) if isinstance(entry.value, node)), None)
        hint = by_node.get(given, next(iter(by_node.values())))
        if _node(hint) is list:
            return self._list(hint, entry, key, metadata, expected)
        if _node(hint) is dict:
            if given is not dict:
                return self.expect(entry, key, expected)
            if dataclasses.is_dataclass(hint):
                return self.table(hint, entry, key)
            return self._mapping(typing.get_args(hint)[1], entry, key)
        value = _scalar(hint, entry.value)
        if value is not _BAD and _within(value, metadata):
            return value
        if isinstance(entry.value, float) and not math.isfinite(entry.value):
            expected = expected.replace("a number", "a finite number")
        if metadata.get("choices") is not None and isinstance(entry.value, str):
            expected += did_you_mean(entry.value, metadata["choices"], quoted=True)
        return self.expect(entry, key, expected)

    def _mapping(self, item_hint: Any, entry: Entry, key: str) -> Any:
        values = {}
        for name, child in entry.value.items():
            if item_hint is not Any:
                values[name] = self.value(item_hint, child, join(key, name), {})
                continue
            values[name] = child.plain()
            if not _is_plain(values[name]):
                expected = "plain values: text, finite numbers, true, false, null, lists, mappings"
                values[name] = self.expect(child, join(key, name), expected)
        return _BAD if any(value is _BAD for value in values.values()) else values

    def _list(
        self, hint: Any, entry: Entry, key: str, metadata: Mapping[str, Any], expected: str
    ) -> Any:
        if isinstance(entry.value, dict):
            return self.expect(entry, key, f"{expected}, set as a whole")
        items = entry.value if isinstance(entry.value, list) else [_BAD]
        values = [_scalar(typing.get_args(hint)[0], item) for item in items]
        right = all(value is not _BAD and _within(value, metadata) for value in values)
        if not right or metadata["length"] not in (None, len(values)):
            return self.expect(entry, key, expected)
        return values

    def _unknown(self, entry: Entry, key: str, name: str, known: list[str]) -> None:
        wrong, keys = join(key, name if len(name) <= 80 else name[:77] + "..."), self.hints
        siblings = difflib.get_close_matches(name, known, 1)
        siblings = siblings or [other for other in known if other.startswith(name)]
        near = [join(key, other) for other in siblings]
        near = near or [other for other in keys if other.split(".")[-1] == name]
        hint = f"; did you mean {near[0]}?" if near else ""
        if wrong in keys:
            hint = f"; write {name.replace('.', ': {')}: ...{'}' * name.count('.')}"
        valid = f"valid {f'in {key}' if key else 'here'}: {', '.join(known)}"
        value = show(entry.plain())
        self.problem(entry, wrong, f" = {value}: expected a known key{hint} ({valid})")

    def _missing(self, entry: Entry, key: str, hint: Any, metadata: Mapping[str, Any]) -> None:
        example = f"{key}: {metadata['example']}"
        expected = f"expected {allowed(hint, metadata)} ({metadata['doc']}), e.g. {example}"
        self.problem(entry, key, f" is missing: {expected}")


def _node(hint: Any) -> type | None:
    """The YAML node of a type hint: a mapping, a list, or None for a scalar."""
    if dataclasses.is_dataclass(hint):
        return dict
    origin = typing.get_origin(hint)
    return origin if origin in (dict, list) else None


def _scalar(hint: Any, value: Any) -> Any:
    if hint is float and type(value) in (int, float) and _is_finite(value):
        return float(value)
    return value if hint is not float and type(value) is hint else _BAD


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, bool, int) or _scalar(float, value) is not _BAD


def _within(value: Any, metadata: Mapping[str, Any]) -> bool:
    if isinstance(value, str):
        return metadata.get("choices") is None or value in metadata["choices"]
    return all(_TESTS[sign](value, limit) for sign, limit in metadata.get("bounds", ()))


def _stand_in(hint: Any, field: dataclasses.Field[Any]) -> Any:
    if not dataclasses.is_dataclass(hint):
        return field.metadata["example"]
    hints = type_hints(hint)
    required = [f for f in dataclasses.fields(hint) if is_required(f)]
    return typing.cast(Any, hint)(**{f.name: _stand_in(hints[f.name], f) for f in required})


def _get(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _is_deliberate(entry: Entry, root: Entry, cls: Any) -> bool:
    """Whether a user chose this value by hand.

    Inherited settings and those of a resolved configuration do not count: a recipe or a resolved
    file may have settings without effect.
    """
    if entry.origin.source == OPTIONS:
        return True
    is_resolved = all(field.name in root.value for field in dataclasses.fields(cls))
    return entry.origin.source == root.origin.source and not is_resolved
