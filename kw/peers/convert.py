"""``kw.peers.convert``: a static network to one of the methods that the paper compares with.

The network keeps its class, its attributes and its module names, as with :func:`kw.convert`; every
new layer holds its kernels itself, made from the static one's at first (``start``); those of
``kerneldna`` share them. Which layers
each method converts by default follows from the published sizes:

========  =================================================================  =====================
method    layers                                                             sizes
========  =================================================================  =====================
condconv  the classifier and the convolutions of the last residual blocks,   ResNet18 8x 81.36M
          3 of a ResNet and 6 of a MobileNetV2, without the shortcuts'       (published: 81.35M)
dyconv    all convolutions but the first                                     ResNet18 4x 45.47M,
                                                                             ResNet50 4x 100.88M
odconv    all convolutions but the first and the shortcuts'                  ResNet18 4x 44.90M,
                                                                             ResNet50 4x 90.67M
fdconv    the same                                                           ResNet50 29.18M
                                                                             (published: +3.6M)
========  =================================================================  =====================

``kerneldna`` converts the convolutions, but the first and grouped ones, that have another of the
same shape to share a kernel with; which ones the authors take is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import say
from ..registry import PEERS
from ..torch_private import has_values
from ..warehouse import KWLayer
from ..warehouse.conversion import KeptWarehouse
from ..warehouse.convertible import (
    arguments_of,
    check_network,
    computed_part,
    has_other_forward,
    kernel_shape,
    replace_layers,
    shared_places,
    succeed,
)
from ..warehouse.plan import nearest
from ..warehouse.warehouse import STARTS
from .condconv import CondConv2d, CondLinear
from .dyconv import DyConv2d
from .fdconv import FDConv2d
from .kerneldna import DNAConv2d, SharedKernel, share_kernels
from .mixture import MixtureLayer
from .odconv import ODConv2d

Layers = dict[str, nn.Module]
PeerLayer = MixtureLayer | DNAConv2d
Makers = dict[str, type[PeerLayer]]


@dataclass(frozen=True)
class Method:
    """A method: its layers, and which layers it replaces by default.

    Attributes:
        conv: its convolution.
        linear: its linear layer, where it has one.
        choose: the names of the layers that it converts by default, from the model and its
            convolutions and linear layers.
        shares: whether layers share a kernel (:func:`.kerneldna.share_kernels`).
    """

    conv: type[PeerLayer]
    linear: type[MixtureLayer] | None
    choose: Callable[[nn.Module, Layers], list[str]]
    shares: bool = False


def convert(
    model: nn.Module,
    method: str,
    *,
    layers: str | None = None,
    start: str = "keep",
    announce: bool = True,
    **settings: Any,
) -> nn.Module:
    """Replace layers by those of another method, in place.

    The converted network begins as the static one: its outputs are the same at every temperature
    (:meth:`kw.peers.mixture.MixtureLayer.keep`). Only ``kerneldna`` cannot keep it: the children
    keep what a least-squares fit to their parent's kernel holds, which is said layer by layer.
    New parameters take the device and dtype of the old ones, and train where those were frozen,
    which is said; biases are kept. The temperature, of methods that have one, is that of
    :func:`kw.set_temperature`. One line says what was done (logger ``kw``, or stderr). A model is
    converted as a whole or, when anything is refused, left as it was.

    Args:
        model: any network with the names of timm's; with others, give ``layers``.
        method: ``"condconv"``, ``"dyconv"``, ``"odconv"``, ``"fdconv"`` or ``"kerneldna"``.
        layers: regular expression; the layers whose whole name matches it are converted, in place
            of those that the method converts by default.
        start: ``"keep"``: begin as the static network; ``"paper"``: kernels and attention are
            initialised at random, as the method's paper says, for training from nothing.
        announce: whether to log that line.
        **settings: ``kernels``: K, FDConv's groups of frequencies, KernelDNA's parents of layers of
            one shape; and the ``reduction`` of all but CondConv.

    Returns:
        ``model``.

    Raises:
        ValueError: an unknown method, start or setting; no layer to convert; a layer that cannot
            be converted or is used twice in the network; a model that is converted already.
    """
    check_network(model)
    if method not in PEERS:
        raise ValueError(f"method {method!r} is unknown; {nearest(str(method), PEERS)}")
    if start not in STARTS:
        raise ValueError(
            f"{method}: start {start!r} is unknown; choose one of {', '.join(map(repr, STARTS))}"
        )
    chosen = PEERS[method]
    for key in settings:
        if key not in (known := chosen.conv.defaults):
            raise ValueError(
                f"{method}: unknown setting {key!r}; {nearest(key, (*known, 'layers', 'start'))}"
            )
    if any(isinstance(module, KWLayer) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has dynamic layers already; convert a static one")
    candidates: Layers = {  # in module order, those that cannot be converted among them
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }
    if layers is None:
        names = chosen.choose(model, candidates)
    else:
        names = _matching(layers, model, candidates)
    if not names:
        raise ValueError(
            f"{method}: {type(model).__name__} has no convolution besides its first; nothing to "
            "convert"
        )
    twice = shared_places(candidates)
    for name in names:
        if name in twice:
            raise ValueError(
                f"{method}: layer {name!r} {twice[name]}; leave both static by 'layers'"
            )
    makers = {name: _counterpart(name, candidates[name], chosen, method) for name in names}
    if chosen.shares:
        settings = {**chosen.conv.defaults, **settings}
        made = _sharing(makers, candidates, method, settings, layers is not None)
    else:
        made = {n: _dynamic(n, candidates[n], make, settings) for n, make in makers.items()}
    outcome = {}
    for name, layer in made.items():
        weight, kept = candidates[name].get_parameter("weight"), None
        if start == "keep" and has_values(weight):
            kept = layer.keep(weight)
        cells = len(layer.warehouse.cells)
        outcome[name] = KeptWarehouse(1, layer.partition.mixtures, cells, kept)
    replace_layers(model, made, outcome, announce, method)
    parts = {name: each.kept for name, each in outcome.items()}
    if announce and any(part is not None and part < 1 for part in parts.values()):
        shares = ", ".join(f"{name} {100 * (part or 0):.1f}%" for name, part in parts.items())
        say(f"kept of every layer's kernel: {shares}")
    return model


def _matching(layers: str, model: nn.Module, candidates: Layers) -> list[str]:
    try:
        names = [name for name in candidates if re.fullmatch(layers, name)]
    except (re.error, TypeError) as error:
        raise ValueError(f"layers {layers!r} is no regular expression: {error}") from None
    if not names:
        raise ValueError(
            f"layers {layers!r} matches no layer of {type(model).__name__}; "
            f"{nearest(layers, candidates)}"
        )
    return names


def _sharing(
    makers: Makers, candidates: Layers, title: str, settings: dict[str, Any], is_chosen: bool
) -> dict[str, PeerLayer]:
    """The layers that share a kernel; those without another one to share with stay static, or are
    refused where the user has chosen them."""
    shapes = [kernel_shape(name, candidates[name]) for name in makers]
    runs = share_kernels(shapes, settings["kernels"])
    made: dict[str, PeerLayer] = {}
    for run in runs:
        if len(run) == 1:
            if is_chosen:
                raise ValueError(
                    f"{title}: layer {run[0].name!r} has no other of its shape to share a kernel "
                    "with; leave it static by 'layers', or set a smaller 'kernels'"
                )
            continue
        weights = [candidates[shape.name].get_parameter("weight") for shape in run]
        places = {(weight.device, weight.dtype) for weight in weights}
        if len(places) > 1:
            raise ValueError(
                f"{title}: layers {run[0].name!r} and others of its shape lie on several devices "
                "or have several types; they cannot share a kernel"
            )
        device, dtype = places.pop()
        shared = SharedKernel(run, settings["reduction"], device=device, dtype=dtype)
        for slot, shape in enumerate(run):
            name, given = shape.name, {"warehouse": shared, "slot": slot}
            made[name] = _dynamic(name, candidates[name], makers[name], given)
    if not made:
        raise ValueError(f"{title}: no two layers of one shape share a kernel; nothing to convert")
    return {name: made[name] for name in makers if name in made}


def _counterpart(name: str, module: nn.Module, method: Method, title: str) -> type[PeerLayer]:
    """The class of the layer that replaces this one; a ValueError: it cannot be converted."""
    computed = computed_part(module)
    cls = {nn.Conv2d: method.conv, nn.Linear: method.linear}.get(type(module))
    if computed or cls is None or has_other_forward(module):
        known = "nn.Conv2d and nn.Linear" if method.linear else "nn.Conv2d"
        reason = f"with a computed {computed}" if computed else f"a {type(module).__name__}"
        reason += " whose forward method is replaced" if has_other_forward(module) else ""
        raise ValueError(
            f"{title}: layer {name!r} is {reason}, which cannot be converted (only {known} can, "
            "not their subclasses); leave it static by 'layers', a regular expression on names"
        )
    return cls


def _dynamic(name: str, module: nn.Module, make: Any, settings: dict[str, Any]) -> PeerLayer:
    weight = module.get_parameter("weight")
    place = {"name": name, "device": weight.device, "dtype": weight.dtype}
    layer: PeerLayer = make(*arguments_of(module), **settings, **place)
    succeed(module, layer)
    return layer


def _all_but_the_first(model: nn.Module, candidates: Layers) -> list[str]:
    names = [name for name, module in candidates.items() if not isinstance(module, nn.Linear)]
    return names[1:]


def _without_shortcuts(model: nn.Module, candidates: Layers) -> list[str]:
    names = _all_but_the_first(model, candidates)
    return [name for name in names if "downsample" not in name.split(".")]


def _dense(model: nn.Module, candidates: Layers) -> list[str]:
    names = _all_but_the_first(model, candidates)
    return [name for name in names if getattr(candidates[name], "groups", 1) == 1]


# Residual blocks by timm's names, and how many of the last ones are converted.
_LAST_BLOCKS = ((r"layer\d\.\d+", 3), (r"blocks\.\d+\.\d+", 6))


def _last_blocks(model: nn.Module, candidates: Layers) -> list[str]:
    names = _without_shortcuts(model, candidates)
    for pattern, count in _LAST_BLOCKS:
        blocks = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
        if blocks:
            last = tuple(f"{name}." for name in blocks[-count:])
            linear = [n for n, module in candidates.items() if isinstance(module, nn.Linear)]
            return [name for name in names if name.startswith(last)] + linear[-1:]
    raise ValueError(
        f"condconv: {type(model).__name__} has no residual blocks with the names of a ResNet or a "
        "MobileNetV2; give 'layers', a regular expression on the names of layers"
    )


_OWN = {
    "condconv": Method(CondConv2d, CondLinear, _last_blocks),
    "dyconv": Method(DyConv2d, None, _all_but_the_first),
    "odconv": Method(ODConv2d, None, _without_shortcuts),
    "fdconv": Method(FDConv2d, None, _without_shortcuts),
    "kerneldna": Method(DNAConv2d, None, _dense, shares=True),
}
PEERS.update(_OWN)
