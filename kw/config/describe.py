"""The schema in words and by key, for error messages and the reference."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from .tree import join

UNIONS = (typing.Union, types.UnionType)
# Kept, because they are compiled from texts.
type_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)
_NUMBERS = {int: "an integer", float: "a number"}


def allowed(hint: Any, metadata: Mapping[str, Any]) -> str:
    """The values that a setting may take, in words, e.g. ``a number > 0 or null``."""
    if typing.get_origin(hint) in UNIONS:
        options = [h for h in typing.get_args(hint) if h is not type(None)]
        null = ["null"] if len(options) < len(typing.get_args(hint)) else []
        return " or ".join([allowed(option, metadata) for option in options] + null)
    bounds = [f"{sign} {_plain(limit)}" for sign, limit in metadata.get("bounds", ())]
    limits = " " + " and ".join(bounds) if bounds else ""
    if hint in _NUMBERS:
        return _NUMBERS[hint] + limits
    if hint is bool:
        return "true or false"
    if hint is str:
        choices = metadata.get("choices")
        return "a string" if choices is None else f"one of {', '.join(map(repr, choices))}"
    if typing.get_origin(hint) is list:
        length = f"{metadata['length']} " if metadata["length"] else ""
        items = "strings" if typing.get_args(hint)[0] is str else "numbers"
        return f"a list of {length}{items}" + (f", each{limits}" if limits else "")
    if typing.get_origin(hint) is dict:
        inner = typing.get_args(hint)[1]
        of = " of names to settings" if dataclasses.is_dataclass(inner) else ""
        return f"a mapping{of}"
    return f"a mapping of settings ({', '.join(field.name for field in dataclasses.fields(hint))})"


def _plain(bound: float) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)


def members(hint: Any) -> tuple[str, Any] | None:
    """The group of settings inside a type hint: suffix of its key, and dataclass."""
    for option in typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,):
        if dataclasses.is_dataclass(option):
            return "", option
        if typing.get_origin(option) is dict and dataclasses.is_dataclass(
            inner := typing.get_args(option)[1]
        ):
            return ".<name>", inner
    return None


def key_hints(cls: Any, key: str = "") -> dict[str, tuple[Any, dataclasses.Field[Any]]]:
    """Type hint and field of every setting, by dotted key; groups come before their members."""
    found = {}
    hints = type_hints(cls)
    for field in dataclasses.fields(cls):
        child_key = join(key, field.name)
        found[child_key] = (hints[field.name], field)
        if group := members(hints[field.name]):
            suffix, inner = group
            found.update(key_hints(inner, child_key + suffix))
    return found


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether a file must set this."""
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The value of a setting that a file leaves out."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
