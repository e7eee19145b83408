"""Plans: which layer joins which warehouse, by ordered rules on module names.

A plan is data. The plans of the released networks are in :mod:`kw.warehouse.plans`; a user's plan
is a :class:`Plan` or an equivalent mapping, for instance in a configuration file::

    rules:
      - {match: conv1, static: true}
      - match: layer(?P<stage>\\d)\\..*conv\\d
        warehouse: layer{stage}
        handover: layer[234]\\.0\\.conv1
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .warehouse import WarehouseSettings


def nearest(name: str, known: Iterable[str]) -> str:
    """The valid names nearest to a wrong name, for the end of a message."""
    known = list(known)
    near = difflib.get_close_matches(name, known, cutoff=0.4) or known[:3]
    return f"nearest: {', '.join(map(repr, near))}" if near else "there are none"


@dataclass(frozen=True)
class Rule:
    """One rule: the layers whose whole name matches, and where they go.

    Attributes:
        match: regular expression that the layer's whole name must match.
        warehouse: the warehouse's name; ``{group}`` stands for what a named group of ``match``
            caught. ``None`` leaves the layers static, whatever later rules say.
        handover: regular expression; layers of this rule whose whole name matches it join the
            warehouse that the rule opened before their own (paper: a stage's last cells are shared
            with the first layers of the next).
        settings: settings of this rule's warehouses that differ from the plan's.
        optional: whether the rule may match no layer, e.g. the classifier of a backbone that has
            none; otherwise that is an error.
    """

    match: str
    warehouse: str | None = None
    handover: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False

    def __post_init__(self) -> None:
        for key, pattern in (("match", self.match), ("handover", self.handover)):
            try:
                compiled = re.compile(pattern or "")
            except re.error as error:
                raise ValueError(
                    f"plan: {key} {pattern!r} is no regular expression: {error}"
                ) from None
            if key == "match" and self.warehouse is not None:
                for group in re.findall(r"{(.*?)}", self.warehouse):
                    if group not in compiled.groupindex:
                        raise ValueError(
                            f"plan: warehouse {self.warehouse!r} uses {{{group}}}, but {pattern!r} "
                            f"has no group (?P<{group}>...)"
                        )
        if self.handover is not None and self.warehouse is None:
            raise ValueError(f"plan: rule {self.match!r} has a handover but no warehouse")

    def warehouse_of(self, name: str) -> str | None:
        """The warehouse of a layer by this rule alone; ``None`` where the name does not match."""
        found = re.fullmatch(self.match, name)
        if found is None or self.warehouse is None:
            return None
        absent = [group for group, text in found.groupdict().items() if text is None]
        for group in absent:
            if f"{{{group}}}" in self.warehouse:
                raise ValueError(
                    f"plan: warehouse {self.warehouse!r} uses {{{group}}}, which {self.match!r} "
                    f"does not catch in {name!r}; let the group match always"
                )
        return self.warehouse.format(**found.groupdict())

    @classmethod
    def from_mapping(cls, rule: Mapping[str, Any]) -> Rule:
        """A rule from ``{match, warehouse | static: true, handover, optional, ...settings}``.

        Raises:
            ValueError: an unknown key, or neither or both of ``warehouse`` and ``static``.
        """
        rest = dict(rule)
        match, warehouse = rest.pop("match", None), rest.pop("warehouse", None)
        static, handover = rest.pop("static", False), rest.pop("handover", None)
        optional = rest.pop("optional", False)
        if not isinstance(match, str):
            raise ValueError(
                f"plan: rule {dict(rule)} has no 'match', a regular expression on names"
            )
        for key, text in (("warehouse", warehouse), ("handover", handover)):
            if not isinstance(text, str | None):
                raise ValueError(f"plan: rule {match!r}: {key} is {text!r}, expected a string")
        if not isinstance(static, bool) or static == (warehouse is not None):
            raise ValueError(
                f"plan: rule {match!r} needs either 'warehouse: NAME' or 'static: true'"
            )
        if not isinstance(optional, bool):
            raise ValueError(
                f"plan: rule {match!r}: optional is {optional!r}, expected true or false"
            )
        WarehouseSettings().with_overrides(rest, f"plan rule {match!r}")
        return cls(match, warehouse, handover, rest, optional)

    def to_mapping(self) -> dict[str, Any]:
        """The mapping that :meth:`from_mapping` reads."""
        place = {"static": True} if self.warehouse is None else {"warehouse": self.warehouse}
        handover = {} if self.handover is None else {"handover": self.handover}
        optional = {"optional": True} if self.optional else {}
        return {"match": self.match, **place, **handover, **optional, **self.settings}


@dataclass(frozen=True)
class Plan:
    """Rules in the order in which warehouses are numbered, and settings.

    Attributes:
        rules: a static rule excludes its layers from later rules; two rules that assign one layer
            to warehouses are an error.
        settings: for all warehouses.
        warehouses: settings of single warehouses, by name; they override those of rules and plan.
    """

    rules: tuple[Rule, ...]
    settings: WarehouseSettings = field(default_factory=WarehouseSettings)
    warehouses: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def from_mapping(cls, plan: Mapping[str, Any]) -> Plan:
        """A plan from ``{rules: [...], warehouses: {...}, ...settings}``.

        Raises:
            ValueError: an unknown key or an invalid rule.
        """
        rest = dict(plan)
        rules, warehouses = rest.pop("rules", None), rest.pop("warehouses", None) or {}
        if not isinstance(rules, (list, tuple)) or not rules:
            raise ValueError("plan: 'rules' must be a list of at least one rule")
        if not all(isinstance(rule, Mapping) for rule in rules):
            raise ValueError("plan: every rule must be a mapping, {match: ..., warehouse: ...}")
        _check_single(warehouses)
        settings = WarehouseSettings().with_overrides(rest, "plan")
        return cls(tuple(Rule.from_mapping(rule) for rule in rules), settings, warehouses)

    def to_mapping(self) -> dict[str, Any]:
        """The mapping that :meth:`from_mapping` reads: plain types, which JSON and YAML take."""
        single = {name: dict(own) for name, own in self.warehouses.items()}
        rules = [rule.to_mapping() for rule in self.rules]
        mapping = {**asdict(self.settings), "rules": rules, "warehouses": single}
        plain: dict[str, Any] = json.loads(json.dumps(mapping))  # numpy's floats become Python's
        return plain

    def with_overrides(self, overrides: Mapping[str, Any]) -> Plan:
        """The plan with settings replaced; ``warehouses`` adds to or replaces single warehouses'.

        Raises:
            ValueError: an unknown setting.
        """
        rest = dict(overrides)
        single = {name: dict(own) for name, own in self.warehouses.items()}
        added = rest.pop("warehouses", None) or {}
        _check_single(added)
        for name, own in added.items():
            single[name] = {**single.get(name, {}), **own}
        rules = tuple(
            replace(rule, settings={k: v for k, v in rule.settings.items() if k not in rest})
            for rule in self.rules
        )
        return Plan(rules, self.settings.with_overrides(rest, "convert"), single)

    def settings_of(self, warehouse: str, rule: Rule) -> WarehouseSettings:
        """Settings of one warehouse: its own override its rule's, which override the plan's.

        Raises:
            ValueError: an unknown setting.
        """
        settings = self.settings.with_overrides(rule.settings, f"plan rule {rule.match!r}")
        own = self.warehouses.get(warehouse, {})
        return settings.with_overrides(own, f"plan, warehouse {warehouse!r}")


def _check_single(warehouses: Any) -> None:
    if not isinstance(warehouses, Mapping) or not all(
        isinstance(own, Mapping) for own in warehouses.values()
    ):
        raise ValueError("plan: 'warehouses' must map names of warehouses to their settings")
