"""How the settings of :mod:`kw.config.schema` are declared: default, meaning, bounds in one line.

Bounds and meaning are metadata of the dataclass fields; checking and the reference read them.
"""

from __future__ import annotations

import ast
from collections.abc import Collection
from dataclasses import field
from typing import Any

_REQUIRED = object()


def setting(
    default: Any = _REQUIRED,
    doc: str = "",
    bounds: str = "(-inf, inf)",
    *,
    choices: Collection[str] | None = None,
    length: int | None = None,
    example: Any = None,
) -> Any:
    """A field with its meaning and its bounds.

    Args:
        default: value when the file leaves the key out; without one the key is required. A list
            default is copied for every configuration.
        doc: one line: meaning and unit.
        bounds: the numbers allowed, also as elements of a list, as an interval: ``"(0, 1]"`` is
            above 0 and at most 1.
        choices: the only strings allowed, or the registry (:mod:`kw.registry`) that has them.
        length: number of elements of a list.
        example: a sensible value of a required key, shown where the file leaves it out.
    """
    metadata = {
        "doc": doc,
        "bounds": _limits(bounds),
        "choices": choices,
        "length": length,
        "example": example,
    }
    if default is _REQUIRED:
        return field(metadata=metadata)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _limits(interval: str) -> list[tuple[str, Any]]:
    """``"(0, 1]"`` as ``[(">", 0), ("<=", 1)]``; infinite ends are left out."""
    low, high = interval[1:-1].split(", ")
    ends = ({"[": ">=", "(": ">"}[interval[0]], low), ({"]": "<=", ")": "<"}[interval[-1]], high)
    return [(sign, ast.literal_eval(end)) for sign, end in ends if not end.endswith("inf")]


def table(factory: type, doc: str) -> Any:
    """A nested group of settings, with its defaults when the file leaves it out."""
    return field(default_factory=factory, metadata={"doc": doc})
