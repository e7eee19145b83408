"""A configuration before it is checked: plain values, each with its origin.

Reading (:mod:`kw.config.loading`) builds this tree and checking (:mod:`kw.config.checking`) reads
it, so that every error can name the file and the line to change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from ..errors import UserError

MOST = 12  # problems that a message lists
OPTIONS = "--cfg-options"


class ConfigError(UserError):
    """An error of the user in a configuration.

    Attributes:
        problems: one line a problem, each with the place, the key, the value and what was expected.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        shown = [*self.problems[:MOST]]
        if len(self.problems) > MOST:
            shown.append(f"... and {len(self.problems) - MOST} more")
        return "\n".join(shown)


@dataclass(frozen=True)
class Origin:
    """Where a value was written.

    Attributes:
        source: file name as the user would write it, or ``--cfg-options``.
        line: line in that file, from 1; None where there are no lines.
    """

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Entry:
    """A value and its origin.

    Attributes:
        value: ``dict[str, Entry]`` for a mapping, else a scalar or a list of plain values.
        origin: where it was written; for a merged mapping, the latest file that wrote into it,
            options left out.
        complete: the mapping said ``_delete_: true``: it replaces what it inherits.
    """

    value: Any
    origin: Origin
    complete: bool = False

    def find(self, key: str) -> tuple[Entry, bool]:
        """The entry at a dotted key or, where nothing was written, its nearest ancestor's.

        Returns:
            the entry, and whether it is the key's own.
        """
        entry = self
        for name in key.split("."):
            if not isinstance(entry.value, dict) or name not in entry.value:
                return entry, False
            entry = entry.value[name]
        return entry, True

    def plain(self) -> Any:
        """The value without its origins."""
        if isinstance(self.value, dict):
            return {name: child.plain() for name, child in self.value.items()}
        return self.value


def entry_from_plain(value: Any, origin: Origin, key: str = "") -> Entry:
    """The tree of a Python value, all of it with one origin. Tuples count as lists.

    Raises:
        ConfigError: a mapping has a key that is no string.
    """
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise ConfigError(f"{origin}: {join(key, name)}: keys are strings, found {name!r}")
        children = {k: entry_from_plain(v, origin, join(key, k)) for k, v in value.items()}
        return Entry(children, origin)
    if isinstance(value, (list, tuple)):
        return Entry([entry_from_plain(item, origin, key).plain() for item in value], origin)
    return Entry(value, origin)


def merge(under: Entry, over: Entry) -> Entry:
    """``over`` merged onto ``under``: mappings merge key by key, everything else is replaced."""
    if over.complete or not (isinstance(over.value, dict) and isinstance(under.value, dict)):
        return over
    children = dict(under.value)
    for name, child in over.value.items():
        children[name] = merge(children[name], child) if name in children else child
    origin = under.origin if over.origin.source == OPTIONS else over.origin
    return Entry(children, origin, under.complete)


def flat_settings(settings: Any, key: str = "") -> dict[str, Any]:
    """Nested settings by dotted key; an empty mapping stays one."""
    if not isinstance(settings, Mapping) or not settings:
        return {key: settings}
    parts = (flat_settings(value, join(key, name)) for name, value in settings.items())
    return {name: value for part in parts for name, value in part.items()}


def rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """Settings from the inside out: what ``change`` makes of each mapping and each value in it."""
    if isinstance(value, dict):
        return change({key: rebuilt(each, change) for key, each in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(rebuilt(each, change) for each in value)
    return change(value)


def join(key: str, name: object) -> str:
    """The dotted key of ``name`` inside ``key``."""
    return f"{key}.{name}" if key else str(name)


def show(value: Any) -> str:
    """A value as error messages quote it: as in YAML, at most 80 characters."""
    text = _show(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _show(value: Any) -> str:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_show(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_show, value)) + "]"
    return repr(value)
