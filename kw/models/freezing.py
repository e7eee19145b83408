"""Parameters that do not train, chosen by patterns on their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from ..config import ConfigError
from ..warehouse import KWLayer
from ..warehouse.conversion import say
from ..warehouse.plan import nearest

__all__ = ["freeze", "hold_frozen"]


def freeze(network: nn.Module, patterns: Sequence[str], part: str | None = None) -> None:
    """Freeze the parameters whose whole name, or that of a module around them, matches a pattern.

    The cells of a warehouse belong to all layers that use it: they are frozen with the last one of
    them, and which warehouses therefore go on training is said.

    Args:
        network: its parameters' ``requires_grad`` is set.
        patterns: regular expressions, for instance ``"layer[12]"`` or ``".*\\.bn\\d"``.
        part: the network is a part of what trains, and may be frozen as a whole: what messages call
            it, in place of ``"model"``.

    Raises:
        ConfigError: an invalid regular expression, one that matches nothing, or nothing is left to
            train.
    """
    key = f"{part or 'model'}.freeze"
    names = [name for name, _ in network.named_parameters()]
    frozen: set[str] = set()
    layers: set[str] = set()
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{key} {pattern!r} is no regular expression: {error}") from None
        found = {name for name in names if any(map(compiled.fullmatch, _and_around(name)))}
        if not found:
            modules = [name for name, _ in network.named_modules() if name]
            raise ConfigError(f"{key} {pattern!r} matches nothing; {nearest(pattern, modules)}")
        frozen |= found
        layers |= {
            name
            for name, module in network.named_modules()
            if isinstance(module, KWLayer) and any(map(compiled.fullmatch, _and_around(name)))
        }
    if not frozen:
        return
    _freeze_cells(network, frozen, layers)
    if part is None and frozen >= set(names):
        raise ConfigError(f"{key} {list(patterns)}: nothing is left to train")
    count = 0
    for name, parameter in network.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
            count += parameter.numel()
    say(f"frozen: {len(frozen)} of {len(names)} parameters ({count:,} values)")


def _freeze_cells(network: nn.Module, frozen: set[str], layers: set[str]) -> None:
    """Add to the frozen parameters the cells that frozen layers alone use."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    users: dict[str, list[bool]] = {}
    for name, module in network.named_modules():
        if isinstance(module, KWLayer):
            users.setdefault(names[id(module.warehouse.cells)], []).append(name in layers)
    shared = []
    for cells, are_frozen in users.items():
        if all(are_frozen):
            frozen.add(cells)
        elif any(are_frozen) and cells not in frozen:
            shared.append(f"{cells} ({sum(are_frozen)} of its {len(are_frozen)} layers)")
    if shared:
        say(f"frozen in part, so that the cells go on training: {', '.join(shared)}")


def _and_around(name: str) -> Iterable[str]:
    """A parameter's name and those of the modules that it stands in."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def hold_frozen(network: nn.Module) -> None:
    """Evaluation mode for modules of which every parameter is frozen: BatchNorm keeps its
    statistics, dropout is off."""
    for module in network.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
