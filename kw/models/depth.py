"""How deep a network's parameters lie: rates by depth, and the parameters of the first stages.

timm's networks give the places (``group_matcher``): the stem, a block of a stage, or after the last
stage. A warehouse has the place of the deepest layer that uses it: it has the learning rate of that
layer, and is frozen only with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from timm.models import group_parameters
from torch import nn

from ..warehouse import KWLayer

_LAST = 1 << 30
_Depth = TypeVar("_Depth", int, "Place")


class Place(NamedTuple):
    """A place in a network; places compare by depth."""

    stage: int  # 0 for the stem, then 1, 2, ...; one more than the last for what follows all stages
    block: int  # block of the stage, from 0


def parameter_places(network: nn.Module) -> dict[str, Place]:
    """The place of every parameter of a timm network, converted or not.

    A vision transformer has no stages: each of its blocks counts as a stage.

    Raises:
        ValueError: the network does not give its stages.
    """
    groups: Any = _matcher(network)(coarse=False)
    if not isinstance(groups, Mapping) or not {"stem", "blocks"} <= groups.keys():
        name = type(network).__name__
        raise ValueError(f"{name}'s group_matcher has no stem and blocks: its stages are not known")
    found = {name: _match(name, groups) for name, _ in network.named_parameters()}
    _place_warehouses(network, found)
    stages = sorted({place.stage for place in found.values()} - {-1})
    rank = {-1: 0} | {stage: 1 + i for i, stage in enumerate(stages)}
    return {name: Place(rank[place.stage], place.block) for name, place in found.items()}


def layer_rates(network: nn.Module, rate: float) -> dict[str, float]:
    """Factors on the learning rate of a classifier: ``rate ** (layers above)``.

    The classifier has the factor 1, the last block ``rate``, and so on to the stem, as in BEiT
    (arXiv:2106.08254): groups and values are timm's (``timm.optim.param_groups_layer_decay``).
    What follows the last block and is not the classifier belongs to that block.

    Attention branches have the factor of their layer, cells that of the deepest layer that uses
    them.

    Raises:
        ValueError: the network's layers are not known.
    """
    depths: dict[str, int] = group_parameters(
        network, _matcher(network)(coarse=False), reverse=True
    )
    _place_warehouses(network, depths)
    top = max(depths.values())
    return {name: rate ** (top - depth) for name, depth in depths.items()}


def frozen_parameters(network: nn.Module, stages: int) -> set[str]:
    """Names of the parameters of the first stages: -1 gives none, 0 the stem, 1 the stem and the
    first stage, and so on. A warehouse is among them if all layers that use it are.

    Raises:
        ValueError: the network's stages are not known, or there are fewer of them.
    """
    if stages < 0:
        return set()
    places = parameter_places(network)
    last = max(place.stage for place in places.values())
    if stages > last:
        raise ValueError(f"frozen_stages is {stages}, but the network has {last} stages")
    return {name for name, place in places.items() if place.stage <= stages}


def decayed_rates(network: nn.Module, rate: float, blocks: int) -> dict[str, float]:
    """Factors on the learning rate, which fall by ``rate`` with every group of blocks to the stem.

    Neck and heads have the factor 1, the last group of the network has ``rate``. A group has
    ``blocks`` blocks of a stage: with 3, ConvNeXt-Tiny has seven groups, the stem, three stages and
    three groups of the third stage, which has nine blocks. The published detectors were trained
    this way (ConvNeXt, arXiv:2201.03545, appendix A.3: layer-wise decay over 6 layers).

    Raises:
        ValueError: the network's stages are not known.
    """
    places = parameter_places(network)
    if all(place.block == 0 for place in places.values()):  # a transformer: one stage of blocks
        places = {n: Place(min(p.stage, 1), max(p.stage - 1, 0)) for n, p in places.items()}
    groups = {name: Place(p.stage, p.block // blocks) for name, p in places.items()}
    depth = {group: i for i, group in enumerate(sorted(set(groups.values())))}
    return {name: rate ** (len(depth) - depth[group]) for name, group in groups.items()}


def _matcher(network: nn.Module) -> Callable[..., Any]:
    matcher: Callable[..., Any] | None = getattr(network, "group_matcher", None)
    if matcher is None:
        raise ValueError(f"{type(network).__name__} has no group_matcher: its stages are not known")
    return matcher


def _match(name: str, groups: Mapping[str, Any]) -> Place:
    """The place by timm's patterns; -1 is the stem, other names belong to the head."""
    if re.match(groups["stem"], name):
        return Place(-1, 0)
    patterns = groups["blocks"]
    for pattern, suffix in [(patterns, None)] if isinstance(patterns, str) else patterns:
        if match := re.match(pattern, name):
            numbers = [int(n) for n in match.groups() if n is not None] + list(suffix or ())
            if match.groups():
                return Place(numbers[0], numbers[1] if len(numbers) > 1 else 0)
    return Place(_LAST, 0)


def _place_warehouses(network: nn.Module, found: dict[str, _Depth]) -> None:
    """Give cells the place of the deepest layer that uses them."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    deepest: dict[str, _Depth] = {}
    for layer_name, layer in network.named_modules():
        if not isinstance(layer, KWLayer):
            continue
        parts = (f"{layer_name}.attention.", f"{layer_name}.warehouse.")
        own = next(name for name in found if name.startswith(parts))
        place, cells = found[own], names[layer.warehouse.cells]
        deepest[cells] = max(place, deepest.get(cells, place))
    found.update(deepest)
