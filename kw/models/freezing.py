"""Parameters that do not train, chosen by patterns on their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from torch import nn

from ..config import ConfigError
from ..errors import say
from ..warehouse import KWLayer, find_warehouses
from ..warehouse.plan import nearest


def freeze(network: nn.Module, patterns: Sequence[str], part: str | None = None) -> None:
    """Freeze the parameters whose whole name, or that of a module around them, matches a pattern.

    The cells of a warehouse belong to all layers that use it, as ``LAYER.warehouse.weight`` of each
    of them. They are frozen when the patterns match all these names; cells that match only some
    go on training, and a message names them.

    Args:
        network: its parameters' ``requires_grad`` is set.
        patterns: regular expressions, for instance ``"layer[12]"`` or ``".*\\.bn\\d"``.
        part: for a part of the trained network, which may be frozen as a whole: its name in
            messages, in place of ``"model"``.

    Raises:
        ConfigError: an invalid regular expression, one that matches nothing, or nothing is left to
            train.
    """
    key = f"{part or 'model'}.freeze"
    paths = _paths(network)
    matched: set[str] = set()
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{key} {pattern!r} is no regular expression: {error}") from None
        found = {
            path
            for path in chain.from_iterable(paths.values())
            if any(map(compiled.fullmatch, _and_around(path)))
        }
        if not found:
            modules = [name for name, _ in network.named_modules() if name]
            raise ConfigError(f"{key} {pattern!r} matches nothing; {nearest(pattern, modules)}")
        matched |= found
    frozen = {name for name, own in paths.items() if matched.issuperset(own)}
    shared = [
        f"{name} ({len(matched.intersection(own))} of its {len(own)} layers)"
        for name, own in paths.items()
        if name not in frozen and not matched.isdisjoint(own)
    ]
    if shared:
        say(f"frozen in part, so that the cells go on training: {', '.join(shared)}")
    if not frozen:
        return
    if part is None and frozen >= paths.keys():
        raise ConfigError(f"{key} {list(patterns)}: nothing is left to train")
    count = 0
    for name, parameter in network.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
            count += parameter.numel()
    say(f"frozen: {len(frozen)} of {len(paths)} parameters ({count:,} values)")


def _paths(network: nn.Module) -> dict[str, list[str]]:
    """Every parameter's name -> the names under which it is reached: cells, through each of the
    layers that use them."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    paths: dict[str, list[str]] = {name: [] for name in names.values()}
    for name, module in network.named_modules():
        if isinstance(module, KWLayer):
            path = f"{name}.warehouse.weight".removeprefix(".")
            paths[names[id(module.warehouse.weight)]].append(path)
    return {name: found or [name] for name, found in paths.items()}


def _and_around(name: str) -> Iterable[str]:
    """A parameter's name and those of the modules that contain it."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def hold_frozen(network: nn.Module) -> None:
    """Evaluation mode for frozen modules: BatchNorm keeps its statistics, dropout is off."""
    for module in frozen_modules(network):
        module.eval()


def frozen_modules(network: nn.Module) -> Iterator[nn.Module]:
    """Modules of which every parameter is frozen, except for cells that they share with others."""
    cells = {id(warehouse.cells) for warehouse in find_warehouses(network)}
    for module in network.modules():
        parameters = [p for p in module.parameters() if id(p) not in cells]
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            yield module
