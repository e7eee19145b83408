"""In which settings a run differs from another, of those that may change its result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..config.tree import show
from .scale import flat

__all__ = ["conflict", "deviations"]

# The machine's concern, or that of the log; prefixes of dotted keys.
_NEUTRAL = (
    "data.root",
    "data.workers",
    "data.check",
    "log_interval",
    "checkpoint.",
    "eval_batch_size",
    "compile",
    "channels_last",
    "contraction.backend",
    "contraction.planner",
)
_WEIGHTS = "model.backbone.weights"
_ABSENT = object()


def deviations(shipped: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    """What a run's recipe differs in from the shipped one, as ``key old -> new``; seeds apart.

    Args:
        shipped: the row's configuration, as nested mappings.
        run: the resolved configuration of a run of it.
    """
    return [text for key, text in _differences(shipped, run) if key != "seed"]


def conflict(begun: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What keeps a run that was begun with some settings from going on with others."""
    return [text for _, text in _differences(begun, now)]


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    before, after = flat(one), flat(other)
    for key in dict.fromkeys((*before, *after)):
        old, new = before.get(key, _ABSENT), after.get(key, _ABSENT)
        if key == _WEIGHTS and (old in (None, _ABSENT)) == (new in (None, _ABSENT)):
            continue  # from another folder
        if key.startswith(_NEUTRAL) or _plain(old) == _plain(new):
            continue
        yield key, f"{key} {_shown(old)} -> {_shown(new)}"


def _plain(value: Any) -> Any:
    """Tuples as lists: a resolved configuration may have lost the difference."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "unset"
    if isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        return f"{len(value)} steps"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)) and all(isinstance(item, float) for item in value):
        return f"[{', '.join(map(_shown, value))}]"
    return show(_plain(value))
