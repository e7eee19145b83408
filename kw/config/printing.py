"""Configurations as text: a resolved one as YAML, and the reference of all settings."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import yaml

from .describe import allowed, default_of, is_required, key_hints, members
from .loading import SCALARS
from .run_schema import RunConfig
from .schema import Config
from .tree import show


class _Dumper(yaml.SafeDumper):
    # The reader refuses aliases.
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.Node:
    scalars = not any(isinstance(value, (list, dict)) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=scalars)


_Dumper.yaml_implicit_resolvers = {}
for _tag, _pattern in SCALARS:
    _Dumper.add_implicit_resolver(_tag, _pattern, None)
_Dumper.add_representer(list, _represent_list)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """A configuration as dictionaries, lists and scalars, every setting in it."""
    return dataclasses.asdict(config)


def to_yaml(config: RunConfig) -> str:
    """A configuration as one YAML text with every setting; reading it gives an equal one."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def reference(cls: type[RunConfig] = Config) -> str:
    """Every setting as a Markdown table: key, values allowed, default, meaning."""
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, (hint, field) in key_hints(cls).items():
        value = allowed(hint, field.metadata)
        if members(hint):
            value = re.sub(r" \(.*\)", "", value)  # its settings have their own rows
        cells = [f"`{key}`", value, _default_text(field), field.metadata["doc"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default_text(field: dataclasses.Field[Any]) -> str:
    if is_required(field):
        return "required"
    value = default_of(field)
    if dataclasses.is_dataclass(value):
        return "as below"
    as_yaml = yaml.dump(value, Dumper=_Dumper).splitlines()[0]
    return f"`{show(value) if isinstance(value, (list, dict)) else as_yaml}`"
