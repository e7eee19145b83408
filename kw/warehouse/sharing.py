"""Which layers of an unknown network share a warehouse.

Layers share by stage and kind. A **stage** is the layers whose inputs have about the same number of
positions. It includes the first layers of the next stage, as in the paper
(warehouse construction-with-sharing). **Kinds** are dense convolutions (pointwise and spatial),
depthwise, grouped, and linear.

Layers whose channels have little in common would be cut into thousands of tiny cells, and their
attention branches would outgrow the network. What exceeds :data:`MAX_BLOCKS`, :data:`MAX_CELLS` or
the bound on attention branches is therefore split, by width, by shape, by kernel size, or into a
first and a second half, whichever leaves fewest weights static, until every part fits. Layers that
remain alone in their stage are tried once more together with similar layers of other stages. The
bounds are taken at the settings' defaults, so that layers share alike in 1/2x, 1x and 4x models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from .partition import KernelShape, partition_kernels
from .warehouse import WarehouseSettings

MAX_BLOCKS = 32  # blocks of channels that a kernel is cut into; ResNet50's shortcuts have 32
MAX_CELLS = 512  # of a warehouse at ratio 1
MIN_CELLS = 4  # the minimum for mixing; ConvNeXt's 2x2 downsampling has a warehouse of 4


@dataclass(frozen=True, eq=False)
class Candidate:
    """A layer that can be converted.

    Attributes:
        shape: its kernel.
        kind: only layers of one kind share.
        order: its rank in the network by first call.
        positions: positions (pixels, tokens) a sample at its input.
    """

    shape: KernelShape
    kind: str
    order: int
    positions: int

    @property
    def width(self) -> int:
        """The smaller of input and output channels: the width of the residual stream."""
        return min(self.shape.out_channels, self.shape.in_channels)

    @property
    def weights(self) -> int:
        """Elements of the kernel."""
        shape = self.shape
        return shape.out_channels * shape.in_per_group * math.prod(shape.kernel)


def share(
    layers: Sequence[Candidate], settings: WarehouseSettings
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Group layers into warehouses.

    Args:
        layers: the candidates.
        settings: of all warehouses.

    Returns:
        The names of the layers of each warehouse, and the layers that fit in none, each with the
        reason.
    """
    layers = sorted(layers, key=attrgetter("order"))
    mean = sum(layer.weights for layer in layers) / max(len(layers), 1)
    splitter = _Splitter(settings, mean)
    warehouses: dict[str, list[str]] = {}
    rest: dict[str, str] = {}
    groups = _stages(layers)
    for last in (False, True):
        alone: dict[str, list[Candidate]] = {}
        for name, group in groups.items():
            sharing = splitter.split(tuple(group))
            for suffix, part in sharing.parts:
                warehouses[name + suffix] = [layer.shape.name for layer in part]
            for layer, obstacle in sharing.rest:
                alone.setdefault(f"stages_{layer.kind}", []).append(layer)
                if last:
                    rest[layer.shape.name] = obstacle
        groups = {name: sorted(group, key=attrgetter("order")) for name, group in alone.items()}
    return warehouses, rest


def _stages(layers: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    """Layers by resolution and kind; stages are numbered in the order of their first call.

    Resolutions are rounded to powers of two, so that a convolution without padding or a class token
    does not start a new stage.
    """
    most = max((layer.positions for layer in layers), default=1)
    numbers: dict[int, int] = {}
    stages: dict[str, list[Candidate]] = {}
    for layer in layers:
        reduction = round(math.log2(most / layer.positions))
        number = numbers.setdefault(reduction, len(numbers) + 1)
        stages.setdefault(f"stage{number}_{layer.kind}", []).append(layer)
    return stages


@dataclass(frozen=True)
class _Sharing:
    """How layers of one kind share warehouses: parts, each with a suffix to its name, and the
    layers that fit in none, each with the reason."""

    parts: tuple[tuple[str, tuple[Candidate, ...]], ...]
    rest: tuple[tuple[Candidate, str], ...] = ()

    @property
    def cost(self) -> tuple[int, int]:
        """Weights that stay static, then the number of warehouses."""
        return sum(layer.weights for layer, _ in self.rest), len(self.parts)


class _Splitter:
    """The best way to split layers until each part fits in a warehouse."""

    def __init__(self, settings: WarehouseSettings, mean: float) -> None:
        self.settings, self.mean = settings, mean
        self.known: dict[tuple[Candidate, ...], _Sharing] = {}

    def split(self, layers: tuple[Candidate, ...]) -> _Sharing:
        """By width, shape, kernel size or in halves, whichever leaves fewest weights static."""
        if layers not in self.known:
            self.known[layers] = self._split(layers)
        return self.known[layers]

    def _split(self, layers: tuple[Candidate, ...]) -> _Sharing:
        obstacle = _obstacle(layers, self.settings, self.mean)
        if obstacle is None:
            return _Sharing((("", layers),))
        if len(layers) == 1 or sum(_mixtures(layers)) < MIN_CELLS:
            return _Sharing((), tuple((layer, obstacle) for layer in layers))
        half = (len(layers) + 1) // 2
        options = [{"_a": layers[:half], "_b": layers[half:]}]
        for label in (_kernel_label, _shape_label, _width_label):
            groups: dict[str, tuple[Candidate, ...]] = {}
            for layer in layers:
                groups[label(layer)] = (*groups.get(label(layer), ()), layer)
            if len(groups) > 1:
                options.insert(0, groups)
        return min((self._join(option) for option in options), key=lambda found: found.cost)

    def _join(self, groups: Mapping[str, tuple[Candidate, ...]]) -> _Sharing:
        found = {suffix: self.split(group) for suffix, group in groups.items()}
        return _Sharing(
            tuple((a + b, part) for a, sharing in found.items() for b, part in sharing.parts),
            tuple(pair for sharing in found.values() for pair in sharing.rest),
        )


def _width_label(layer: Candidate) -> str:
    return f"_w{layer.width}"


def _shape_label(layer: Candidate) -> str:
    return f"_{layer.shape.out_channels}x{layer.shape.in_per_group}"


def _kernel_label(layer: Candidate) -> str:
    return f"_k{'x'.join(map(str, layer.shape.kernel))}"


def _mixtures(layers: Sequence[Candidate]) -> list[int]:
    """Mixtures of each layer with cells as large as all have in common; their sum is the number of
    cells at ratio 1. Only counted, not built: layers with little in common have millions."""
    cell_out = math.gcd(*(layer.shape.out_channels for layer in layers))
    cell_in = math.gcd(*(layer.shape.in_per_group for layer in layers))
    return [layer.weights // (cell_out * cell_in) for layer in layers]


def _obstacle(layers: Sequence[Candidate], settings: WarehouseSettings, mean: float) -> str | None:
    """Why these layers cannot share a warehouse; ``None`` where they can.

    The second linear layer of an attention branch has ``hidden * m * (n + 1)`` weights. It may not
    outgrow the layer's own kernel or, where this is small as in a depthwise convolution, the
    network's mean one: attention branches then have at most twice the weights of all kernels.
    """
    mixtures = _mixtures(layers)
    cells = sum(mixtures)
    if cells < MIN_CELLS:
        return f"would mix fewer than {MIN_CELLS} cells: it shares its stage and shape with none"
    if cells > MAX_CELLS:
        return f"would need more than {MAX_CELLS} cells"
    for layer, count in zip(layers, mixtures, strict=True):
        if count > MAX_BLOCKS * math.prod(layer.shape.kernel):
            return f"would be cut into more than {MAX_BLOCKS} blocks of channels"
        hidden = max(int(layer.shape.in_channels / 16), 16)
        if hidden * count * (cells + 1) > max(layer.weights, mean):
            return "would have an attention branch larger than its kernel"
    try:
        partition_kernels(
            [layer.shape for layer in layers],
            cell_num_ratio=settings.cell_num_ratio,
            cell_inplane_ratio=settings.cell_inplane_ratio,
            cell_outplane_ratio=settings.cell_outplane_ratio,
            spatial_partition=settings.spatial_partition,
        )
    except ValueError:
        return "cannot be partitioned with these ratios"
    return None
