"""How the settings of :mod:`kw.config.schema` are declared: default, meaning, bounds in one line.

Bounds and meaning are metadata of the dataclass fields; checking and the reference read them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import field
from typing import Any

__all__ = ["setting", "table"]

_REQUIRED = object()


def setting(
    default: Any = _REQUIRED,
    doc: str = "",
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Collection[str] | None = None,
    length: int | None = None,
    example: Any = None,
) -> Any:
    """A field with its meaning and its bounds. Bounds on a list hold for each of its elements.

    Args:
        default: value when the file leaves the key out; without one the key is required. A list
            default is copied for every configuration.
        doc: one line: meaning and unit.
        minimum: smallest value allowed.
        maximum: largest value allowed.
        above: value that the setting must exceed.
        below: value that the setting must stay under.
        choices: the only strings allowed, or the registry (:mod:`kw.registry`) that has them.
        length: number of elements of a list.
        example: a sensible value of a required key, shown where the file leaves it out.
    """
    metadata = {
        "doc": doc,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "below": below,
        "choices": choices,
        "length": length,
        "example": example,
    }
    if default is _REQUIRED:
        return field(metadata=metadata)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def table(factory: type, doc: str) -> Any:
    """A nested group of settings, with its defaults when the file leaves it out."""
    return field(default_factory=factory, metadata={"doc": doc})
