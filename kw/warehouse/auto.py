"""``convert(model, "auto")``: a plan for a network that has none.

The plan follows from the network's layers and one forward pass of an example
(:mod:`kw.warehouse.probe`), by one simple rule for each of three questions:

1. *Which layers can have a kernel for every sample?* Plain convolutions and linear layers that are
   called once a pass, with samples along the first axis. Others are **refused**, with the reason.
2. *Which stay static?* The stem, the classifier, and the small layers of gates
   (squeeze-excitation and the like): they are **left**, as in the paper's networks.
3. *Which share a warehouse?* Layers of one stage and of one kind; see
   :mod:`kw.warehouse.sharing`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..torch_private import BatchNorm
from .convertible import kernel_layers, kernel_shape, shared_places, why_static
from .partition import KernelShape
from .plan import Plan, Rule
from .probe import Use, probe
from .sharing import Candidate, share
from .warehouse import WarehouseSettings

MIN_CHANNELS = 8  # a layer that reads or writes fewer makes or reads a map
MAX_STEM_LAYERS = 4


@dataclass(frozen=True)
class AutoReport:
    """The decision for every convolution and linear layer of a network.

    Attributes:
        warehouses: the names of the layers of each warehouse.
        left: layers that stay static by rule, with the reason.
        refused: layers that would be converted, but cannot be, with the reason.
    """

    warehouses: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def converted(self) -> int:
        """Number of layers that get kernels for every sample."""
        return sum(map(len, self.warehouses.values()))

    def refusals(self) -> str:
        """One line per reason; names that differ only in numbers are merged."""
        return _by_reason(self.refused)

    def __str__(self) -> str:
        lines = [f"{self.converted} layers in {len(self.warehouses)} warehouses"]
        lines += [f"  {name}: {_summary(names)}" for name, names in self.warehouses.items()]
        for title, reasons in (("left static", self.left), ("refused", self.refused)):
            if reasons:
                lines += [f"{len(reasons)} {title}", _by_reason(reasons)]
        return "\n".join(lines)


def auto_plan(
    model: nn.Module, example_input: Any = None, *, static: str = "", **settings: Any
) -> tuple[Plan, AutoReport]:
    """Derive which layers of a network share which warehouse.

    Args:
        model: any PyTorch network; it is not changed.
        example_input: a batch of at least two samples of real size: a tensor, or a tuple or mapping
            of arguments of ``forward``. Default: images of the size in the model's
            ``pretrained_cfg`` (timm), else of 3 x 224 x 224.
        static: a regular expression; layers whose whole names match it stay static.
        **settings: :class:`WarehouseSettings` of all warehouses. Unless ``norm`` is given, it is
            ``"batch"`` for networks with BatchNorm and ``"layer"`` for others.

    Returns:
        The plan, to pass to :func:`kw.convert` or to print, and what it does with every layer.

    Raises:
        ValueError: an unknown setting, an example on which the network cannot run, a ``static``
            that matches no layer, or a network without a layer that can be converted.
    """
    batch_norm = any(isinstance(m, BatchNorm) for m in model.modules())
    norm = "batch" if batch_norm else "layer"
    resolved = WarehouseSettings(norm=norm).with_overrides(settings, "auto")
    report = AutoReport()
    layers = _usable_layers(model, example_input, report)
    asked = {*report.refused, *report.left, *(layer.shape.name for layer in layers)}
    try:
        asked = {name for name in asked if re.fullmatch(static, name)}
    except re.error as error:
        raise ValueError(f"auto: static {static!r} is no regular expression: {error}") from None
    if static and not asked:
        raise ValueError(f"auto: static {static!r} matches the whole name of no layer")
    for name in asked:
        report.refused.pop(name, None)
        report.left[name] = "as asked"
    layers = [layer for layer in layers if layer.shape.name not in asked]
    warehouses, rest = share(layers, resolved)
    report.warehouses.update(warehouses)
    report.left.update(rest)
    if not report.warehouses:
        raise ValueError(
            f"auto: no layer of {type(model).__name__} can be converted:\n"
            f"{_by_reason({**report.refused, **report.left}) or '  it has none'}\n"
            "write a plan of your own to convert what was left static by rule"
        )
    rules = tuple(
        Rule("|".join(map(re.escape, names)), warehouse)
        for warehouse, names in report.warehouses.items()
    )
    return Plan(rules, resolved), report


def _usable_layers(model: nn.Module, example_input: Any, report: AutoReport) -> list[Candidate]:
    """Layers that can be converted; the others are added to the report."""
    modules = kernel_layers(model, remove_duplicate=False)
    shared = shared_places(modules)
    watched: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if reason := why_static(name, module):
            report.refused[name] = re.sub(r"(of )?layer '.*?' (?=is )", "", reason.split("; ")[0])
        elif name in shared:
            report.refused[name] = "shares its weight with another place in the network"
        else:
            watched[name] = module

    uses = probe(model, watched, example_input)
    # One of many blocks may have a window as large as the whole image.
    folded = {_pattern(name) for name, use in uses.items() if use.calls and not use.by_sample}
    get_classifier = getattr(model, "get_classifier", None)
    head = {id(part) for root in _roots(get_classifier) for part in root.modules()}
    stem = _stem(uses)
    trains = {
        name: module.get_parameter("weight").requires_grad for name, module in watched.items()
    }
    layers = []
    for name, use in uses.items():
        shape = kernel_shape(name, watched[name])
        if use.read:
            report.refused[name] = "has a weight that is read elsewhere than in its own forward"
        elif not use.calls:
            report.refused[name] = "is not called as a module when the network runs for evaluation"
        elif use.calls > 1:
            report.refused[name] = "is called several times a pass: a sample has one kernel a layer"
        elif _pattern(name) in folded:
            report.refused[name] = (
                "has an input whose leading dimension is not the sample (windows, patches or "
                "tokens come first or are folded into the batch): kernels belong to samples"
            )
        elif id(watched[name]) in head:
            report.left[name] = "classifier"
        elif name in stem:
            report.left[name] = "stem"
        elif not trains[name] and any(trains.values()):
            report.left[name] = "frozen, while others train"
        elif use.positions == 1 or use.positions_out == 1:
            report.left[name] = "works on pooled features: a gate or a head"
        elif min(shape.out_channels, shape.in_channels) < MIN_CHANNELS:
            report.left[name] = f"fewer than {MIN_CHANNELS} channels: a map or a gate"
        else:
            kind = _kind(watched[name], shape)
            layers.append(Candidate(shape, kind, use.order, use.positions))
    return layers


def _roots(get_classifier: Callable[[], Any] | None) -> list[nn.Module]:
    """timm's answer to what the classifier is: a module, or several in a tuple."""
    found = get_classifier() if callable(get_classifier) else ()
    found = found if isinstance(found, tuple | list) else (found,)
    return [module for module in found if isinstance(module, nn.Module)]


def _kind(module: nn.Module, shape: KernelShape) -> str:
    if isinstance(module, nn.Linear):
        return "linear"
    dims = "" if len(shape.kernel) == 2 else f"{len(shape.kernel)}d"
    if shape.groups == 1:
        return f"dense{dims}"
    return f"depthwise{dims}" if shape.in_per_group == 1 else f"grouped{dims}"


def _stem(uses: Mapping[str, Use]) -> set[str]:
    """The first layer that is called, and the layers of the same stem.

    The stem is the outermost module around it with at most :data:`MAX_STEM_LAYERS` layers and at
    most a quarter of the network's: a deep stem, but not a whole stage.
    """
    called = {name: use.order for name, use in uses.items() if use.calls}
    if not called:
        return set()
    first = min(called, key=lambda name: called[name])
    path = first.split(".")
    for depth in range(1, len(path)):
        prefix = ".".join(path[:depth]) + "."
        inside = {name for name in called if name.startswith(prefix)}
        if len(inside) <= min(MAX_STEM_LAYERS, len(called) // 4):
            return inside
    return {first}


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _summary(names: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for name in names:
        counts[_pattern(name)] = counts.get(_pattern(name), 0) + 1
    single = {_pattern(name): name for name in names}
    return ", ".join(
        f"{pattern} ({count})" if count > 1 else single[pattern]
        for pattern, count in counts.items()
    )


def _by_reason(reasons: Mapping[str, str]) -> str:
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return "\n".join(f"  {_summary(group)}: {reason}" for reason, group in names.items())
