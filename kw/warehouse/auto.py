"""``convert(model, "auto")``: a plan for a network that has none.

Nothing is known of the network but its layers and how one example passes through them
(:mod:`kw.warehouse.probe`). Three questions are answered in this order, each by a simple rule:

1. *Which layers can have a kernel for every sample?* Plain convolutions and linear layers that are
   called once a pass, with samples along the first axis. Others are **refused**, with the reason.
2. *Which should stay as they are?* The stem, the classifier, and the small layers of gates
   (squeeze-excitation and the like): they are **left** static, as in the paper's networks.
3. *Which share a warehouse?* Layers of one stage and of one kind. A **stage** is the layers whose
   inputs have about the same number of positions, which also hands a stage's cells over to the
   layers that lead to the next one (paper: warehouse construction-with-sharing). **Kinds** are
   dense convolutions (pointwise and spatial), depthwise, grouped, and linear.

Layers whose channels have little in common would be cut into thousands of tiny cells, and their
attention branches would outgrow the network. A stage that exceeds :data:`MAX_BLOCKS`,
:data:`MAX_CELLS` or the bound on attention branches is therefore split: by width, by shape,
or into a first and a second half, whichever leaves fewest weights static, until every part fits;
what remains alone in its stage is tried once more together with its like in other stages. The
bounds are taken at the settings' defaults, so that layers share alike in 1/2x, 1x and 4x models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .convertible import has_kernel, kernel_shape, why_static
from .layers import KWLayer
from .partition import KernelShape, partition_kernels
from .plan import Plan, Rule
from .probe import Use, probe
from .warehouse import WarehouseSettings

__all__ = ["MAX_BLOCKS", "MAX_CELLS", "MIN_CELLS", "MIN_CHANNELS", "AutoReport", "auto_plan"]

MAX_BLOCKS = 32  # blocks of channels that a kernel is cut into; ResNet50's shortcuts have 32
MAX_CELLS = 512  # of a warehouse at ratio 1
MIN_CELLS = 4  # fewer leave nothing to mix; ConvNeXt's 2x2 downsampling has a warehouse of 4
MIN_CHANNELS = 8  # a layer that reads or writes fewer makes or reads a map
MAX_STEM_LAYERS = 4


@dataclass(frozen=True)
class AutoReport:
    """What became of every convolution and linear layer of a network.

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
        """One line a reason; names that differ in numbers alone are drawn together."""
        return _by_reason(self.refused)

    def __str__(self) -> str:
        lines = [f"{self.converted} layers in {len(self.warehouses)} warehouses"]
        lines += [f"  {name}: {_summary(names)}" for name, names in self.warehouses.items()]
        for title, reasons in (("left static", self.left), ("refused", self.refused)):
            if reasons:
                lines += [f"{len(reasons)} {title}", _by_reason(reasons)]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class _Layer:
    name: str
    shape: KernelShape
    use: Use
    kind: str

    @property
    def width(self) -> int:
        """The narrower side: the trunk of a block that widens or narrows inside."""
        return min(self.shape.out_channels, self.shape.in_channels)

    @property
    def weights(self) -> int:
        shape = self.shape
        return shape.out_channels * shape.in_per_group * math.prod(shape.kernel)


def auto_plan(
    model: nn.Module, example_input: Any = None, **settings: Any
) -> tuple[Plan, AutoReport]:
    """Derive which layers of a network share which warehouse.

    Args:
        model: any network on torch; it is not touched.
        example_input: a batch of at least two samples of true size: a tensor, or a tuple or mapping
            of arguments of ``forward``. Default: images of the size in the model's
            ``pretrained_cfg`` (timm), else of 3 x 224 x 224.
        **settings: :class:`WarehouseSettings` of all warehouses. Unless ``norm`` is given, it is
            ``"batch"`` for networks with BatchNorm and ``"layer"`` for others.

    Returns:
        The plan, to pass to :func:`kw.convert` or to print, and what it does with every layer.

    Raises:
        ValueError: an unknown setting, an example on which the network cannot run, or a network
            without a layer that can be converted.
    """
    batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    norm = "batch" if batch_norm else "layer"
    resolved = WarehouseSettings(norm=norm).with_overrides(settings, "auto")
    report = AutoReport()
    layers = _usable_layers(model, example_input, report)
    mean = sum(layer.weights for layer in layers) / max(len(layers), 1)
    splitter = _Splitter(resolved, mean)
    groups = _stages(layers)
    # What is alone in its stage may yet share with the like of it in others.
    for last in (False, True):
        alone: dict[str, list[_Layer]] = {}
        for name, group in groups.items():
            sharing = splitter.split(tuple(group))
            for suffix, part in sharing.parts:
                report.warehouses[name + suffix] = [layer.name for layer in part]
            for layer, obstacle in sharing.rest:
                alone.setdefault(f"stages_{layer.kind}", []).append(layer)
                if last:
                    report.left[layer.name] = obstacle
        groups = {name: sorted(group, key=_order) for name, group in alone.items()}
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


def _usable_layers(model: nn.Module, example_input: Any, report: AutoReport) -> list[_Layer]:
    """Layers that can have kernels for every sample, in the order of their first call."""
    inside = {
        id(part)
        for module in model.modules()
        if isinstance(module, KWLayer)
        for part in module.modules()
    }
    modules = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and has_kernel(module) and id(module) not in inside
    }
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        owners.setdefault(id(module._parameters.get("weight", module)), []).append(name)
    watched: dict[str, nn.Module] = {}
    for name, module in modules.items():
        twins = [t for t in owners[id(module._parameters.get("weight", module))] if t != name]
        if reason := why_static(name, module):
            report.refused[name] = re.sub(r"layer '.*?' (?=is a )", "", reason.split("; ")[0])
        elif twins:
            report.refused[name] = "shares its weight with another place in the network"
        else:
            watched[name] = module

    uses = probe(model, watched, example_input)
    # A window may happen to be the whole image in one of many blocks.
    folded = {_pattern(name) for name, use in uses.items() if use.calls and not use.by_sample}
    get_classifier = getattr(model, "get_classifier", None)
    head = {id(part) for root in _roots(get_classifier) for part in root.modules()}
    stem = _stem(uses)
    layers = []
    for name, use in uses.items():
        shape = kernel_shape(name, watched[name])
        if use.read:
            report.refused[name] = "has a weight that is read elsewhere than in its own forward"
        elif not use.calls:
            report.refused[name] = "is not called as a module when the network runs"
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
        elif use.positions == 1 or use.positions_out == 1:
            report.left[name] = "works on pooled features: a gate or a head"
        elif min(shape.out_channels, shape.in_channels) < MIN_CHANNELS:
            report.left[name] = f"fewer than {MIN_CHANNELS} channels: a map or a gate"
        else:
            layers.append(_Layer(name, shape, use, _kind(watched[name], shape)))
    return sorted(layers, key=_order)


def _order(layer: _Layer) -> int:
    return layer.use.order


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
    """The first layer that is called, and what stands beside it.

    That is the outermost module around it with at most :data:`MAX_STEM_LAYERS` layers and at most a
    quarter of the network's: a deep stem, but not a whole stage.
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


def _stages(layers: Sequence[_Layer]) -> dict[str, list[_Layer]]:
    """Layers by resolution and kind; stages are numbered in the order of their first call.

    Resolutions are told apart by powers of two: a convolution without padding, or a class token, is
    no new stage.
    """
    most = max((layer.use.positions for layer in layers), default=1)
    numbers: dict[int, int] = {}
    stages: dict[str, list[_Layer]] = {}
    for layer in layers:
        reduction = round(math.log2(most / layer.use.positions))
        number = numbers.setdefault(reduction, len(numbers) + 1)
        stages.setdefault(f"stage{number}_{layer.kind}", []).append(layer)
    return stages


@dataclass(frozen=True)
class _Sharing:
    """How layers of one kind share warehouses: parts, each with a suffix to its name, and the
    layers that fit in none, each with the obstacle."""

    parts: tuple[tuple[str, tuple[_Layer, ...]], ...]
    rest: tuple[tuple[_Layer, str], ...] = ()

    @property
    def cost(self) -> tuple[int, int]:
        """Weights that stay static, then the number of warehouses."""
        return sum(layer.weights for layer, _ in self.rest), len(self.parts)


class _Splitter:
    """The best way to split layers until each part fits in a warehouse."""

    def __init__(self, settings: WarehouseSettings, mean: float) -> None:
        self.settings, self.mean = settings, mean
        self.known: dict[tuple[_Layer, ...], _Sharing] = {}

    def split(self, layers: tuple[_Layer, ...]) -> _Sharing:
        """By width, by shape or in halves, whichever leaves fewest weights static."""
        if layers not in self.known:
            self.known[layers] = self._split(layers)
        return self.known[layers]

    def _split(self, layers: tuple[_Layer, ...]) -> _Sharing:
        obstacle = _obstacle(layers, self.settings, self.mean)
        if obstacle is None:
            return _Sharing((("", layers),))
        if len(layers) == 1 or _cells(layers) < MIN_CELLS:
            return _Sharing((), tuple((layer, obstacle) for layer in layers))
        half = (len(layers) + 1) // 2
        options = [{"_a": layers[:half], "_b": layers[half:]}]
        for label in (_shape_label, _width_label):
            groups: dict[str, tuple[_Layer, ...]] = {}
            for layer in layers:
                groups[label(layer)] = (*groups.get(label(layer), ()), layer)
            if len(groups) > 1:
                options.insert(0, groups)
        return min((self._join(option) for option in options), key=lambda found: found.cost)

    def _join(self, groups: Mapping[str, tuple[_Layer, ...]]) -> _Sharing:
        found = {suffix: self.split(group) for suffix, group in groups.items()}
        return _Sharing(
            tuple((a + b, part) for a, sharing in found.items() for b, part in sharing.parts),
            tuple(pair for sharing in found.values() for pair in sharing.rest),
        )


def _width_label(layer: _Layer) -> str:
    return f"_w{layer.width}"


def _shape_label(layer: _Layer) -> str:
    return f"_{layer.shape.out_channels}x{layer.shape.in_per_group}"


def _cells(layers: Sequence[_Layer]) -> int:
    return partition_kernels([layer.shape for layer in layers]).cells


def _obstacle(layers: Sequence[_Layer], settings: WarehouseSettings, mean: float) -> str | None:
    """Why these layers cannot share a warehouse; ``None`` where they can.

    The second linear layer of an attention branch has ``hidden * m * (n + 1)`` weights. It may not
    outgrow the layer's own kernel or, where this is small as in a depthwise convolution, the
    network's mean one: attention branches then have at most twice the weights of all kernels.
    """
    shapes = [layer.shape for layer in layers]
    partition = partition_kernels(shapes)
    if partition.cells < MIN_CELLS:
        return f"would mix fewer than {MIN_CELLS} cells: it shares its stage and shape with none"
    if partition.cells > MAX_CELLS:
        return f"would need more than {MAX_CELLS} cells"
    for layer, part in zip(layers, partition.layers, strict=True):
        if part.mixtures > MAX_BLOCKS * math.prod(part.kernel):
            return f"would be cut into more than {MAX_BLOCKS} blocks of channels"
        hidden = max(int(layer.shape.in_channels / 16), 16)
        if hidden * part.mixtures * (partition.cells + 1) > max(layer.weights, mean):
            return "would have an attention branch larger than its kernel"
    try:
        partition_kernels(
            shapes,
            cell_num_ratio=settings.cell_num_ratio,
            cell_inplane_ratio=settings.cell_inplane_ratio,
            cell_outplane_ratio=settings.cell_outplane_ratio,
            spatial_partition=settings.spatial_partition,
        )
    except ValueError:
        return "cannot be partitioned with these ratios"
    return None


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
