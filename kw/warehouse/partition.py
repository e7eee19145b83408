"""Partition arithmetic: the cells of a warehouse, and the cells of each layer at temperature 1.

Paper: KernelWarehouse: Rethinking the Design of Dynamic Convolution (ICML 2024, arXiv 2406.07879),
kernel partition and warehouse construction-with-sharing, Eqs. 2-4.

A warehouse is shared by layers whose kernels have shape ``[O_l, I_l / g_l, k_1 .. k_d]``. Every
kernel is cut into ``m_l`` disjoint blocks of the cell's shape. Block ``i = (s * GO + go) * GI +
gi`` lies at spatial position ``s`` (row-major), output channels ``go * c_out ..`` and input
channels ``gi * c_in ..``. This file has no tensors.

Legend: O, I out and in channels; g groups; k kernel size; m mixtures of a layer; n cells of the
warehouse; S, GO, GI blocks along space, output and input channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class KernelShape:
    """The kernel of one layer before it is partitioned.

    Attributes:
        out_channels: output channels O.
        in_channels: input channels I, over all groups.
        kernel: size along every spatial axis; ``(1,)`` for a linear layer over tokens.
        groups: groups of the convolution.
        name: the layer's name, for messages.
    """

    out_channels: int
    in_channels: int
    kernel: tuple[int, ...]
    groups: int = 1
    name: str = "layer"

    @property
    def in_per_group(self) -> int:
        """Input channels that one output channel reads, I / g."""
        return self.in_channels // self.groups


@dataclass(frozen=True)
class Partition:
    """How one kernel is cut into cells of the warehouse.

    Attributes:
        kernel: the layer's kernel size.
        cell_kernel: the cell's kernel size: all ones with spatial partition, else ``kernel``.
        cell_out: output channels of a cell.
        cell_in: input channels of a cell.
        grid: blocks ``(S, GO, GI)``.
    """

    kernel: tuple[int, ...]
    cell_kernel: tuple[int, ...]
    cell_out: int
    cell_in: int
    grid: tuple[int, int, int]

    @property
    def mixtures(self) -> int:
        """Number of blocks m."""
        return math.prod(self.grid)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Shape of the assembled kernel, ``[O, I / g, k_1 .. k_d]``."""
        _, out_blocks, in_blocks = self.grid
        return (out_blocks * self.cell_out, in_blocks * self.cell_in, *self.kernel)


@dataclass(frozen=True)
class CellSlice:
    """The cells that belong to one layer at temperature 1.

    Attributes:
        start: the slice's first cell.
        stop: one past its last cell.
        owners: for every mixture its cell, or ``None`` for the null cell.
    """

    start: int
    stop: int
    owners: tuple[int | None, ...]


@dataclass(frozen=True)
class WarehousePartition:
    """A warehouse: the shape of its cells, and per layer how they are used.

    Attributes:
        cells: number of cells n.
        cell_shape: ``(c_out, c_in, *cell_kernel)``.
        layers: the partition of each layer, in the order in which the layers were given.
        slices: the cells of each layer at temperature 1.
    """

    cells: int
    cell_shape: tuple[int, ...]
    layers: tuple[Partition, ...]
    slices: tuple[CellSlice, ...]


def partition_kernels(
    shapes: Sequence[KernelShape],
    *,
    cell_num_ratio: float = 1.0,
    cell_inplane_ratio: float = 1.0,
    cell_outplane_ratio: float = 1.0,
    spatial_partition: bool = True,
    name: str = "warehouse",
) -> WarehousePartition:
    """Cut the kernels of the layers that share a warehouse.

    Args:
        shapes: the layers, in module order: the order in which they take their own cells.
        cell_num_ratio: the convolutional parameter budget b, an integer or 1 / integer: the
            warehouse has ``max(int(b * sum_l m_l), 1)`` cells.
        cell_inplane_ratio: share of the greatest common divisor of the layers' I / g that a cell
            spans.
        cell_outplane_ratio: the same for output channels.
        spatial_partition: cut every spatial position into cells of its own; otherwise a cell keeps
            the layers' kernel size, which must then be one.
        name: the warehouse's name, for messages.

    Returns:
        The partition; ``slices`` covers the cells exactly.

    Raises:
        ValueError: kernels of unequal size without spatial partition; a ratio out of range, one
            whose cells do not divide a layer's channels, or one that cannot give every mixture at
            temperature 1 its own cell.
    """
    if not shapes:
        raise ValueError(f"warehouse {name!r} has no layers; give at least one")
    ratios = {
        "cell_num_ratio": cell_num_ratio,
        "cell_inplane_ratio": cell_inplane_ratio,
        "cell_outplane_ratio": cell_outplane_ratio,
    }
    for key, ratio in ratios.items():
        if not (math.isfinite(ratio) and ratio > 0):
            raise ValueError(f"warehouse {name!r}: {key} is {ratio}; it must be above 0")
    for key in ("cell_inplane_ratio", "cell_outplane_ratio"):
        if ratios[key] > 1:
            raise ValueError(
                f"warehouse {name!r}: {key} is {ratios[key]}; a cell cannot span more than the "
                "channels that all layers have in common: give a value in (0, 1]"
            )
    cell_out = _cell_channels([s.out_channels for s in shapes], cell_outplane_ratio)
    cell_in = _cell_channels([s.in_per_group for s in shapes], cell_inplane_ratio)
    for shape in shapes:
        for axis, key, channels, size in (
            ("output", "cell_outplane_ratio", shape.out_channels, cell_out),
            ("input", "cell_inplane_ratio", shape.in_per_group, cell_in),
        ):
            if channels % size:
                raise ValueError(
                    f"warehouse {name!r}: cells of {size} {axis} channels do not divide the "
                    f"{channels} of layer {shape.name!r}; {key} is {ratios[key]}, use 1 / integer"
                )

    if not spatial_partition and len({s.kernel for s in shapes}) > 1:
        sizes = ", ".join(f"{s.name!r} {'x'.join(map(str, s.kernel))}" for s in shapes)
        raise ValueError(
            f"warehouse {name!r} joins kernels of unequal size ({sizes}); set spatial_partition, "
            "or give each size a warehouse of its own"
        )
    layers = []
    for shape in shapes:
        cell_kernel = (1,) * len(shape.kernel) if spatial_partition else shape.kernel
        grid = (
            math.prod(shape.kernel) // math.prod(cell_kernel),
            shape.out_channels // cell_out,
            shape.in_per_group // cell_in,
        )
        layers.append(Partition(shape.kernel, cell_kernel, cell_out, cell_in, grid))

    mixtures = [layer.mixtures for layer in layers]
    names = [s.name for s in shapes]
    budget = _exact_budget(cell_num_ratio, name, names)
    cells = max(int(sum(mixtures) * budget), 1)
    slices = _assign_cells(mixtures, cells, budget, name, names)
    cell_shape = (cell_out, cell_in, *layers[0].cell_kernel)
    return WarehousePartition(cells, cell_shape, tuple(layers), slices)


def _cell_channels(channels: Sequence[int], ratio: float) -> int:
    # int(), with a margin for rounding: (1 / 49) * 49 is just below 1.
    return max(int(math.gcd(*channels) * ratio + 1e-9), 1)


def _exact_budget(ratio: float, name: str, layers: Sequence[str]) -> Fraction:
    """The ratio as an exact integer or 1 / integer."""
    budget = Fraction(ratio).limit_denominator(1 << 16)
    if 1 not in (budget.numerator, budget.denominator) or not math.isclose(float(budget), ratio):
        raise ValueError(
            f"warehouse {name!r} (layers {', '.join(map(repr, layers))}): cell_num_ratio {ratio:g} "
            "cannot give every mixture its own cell; only an integer or 1 / integer can "
            "(..., 0.25, 0.5, 1, 2, 4, ...)"
        )
    return budget


def _assign_cells(
    mixtures: Sequence[int], cells: int, budget: Fraction, name: str, layers: Sequence[str]
) -> tuple[CellSlice, ...]:
    """Give every mixture its cell at temperature 1 (the one-hot start beta, Eq. 5)."""
    slices, start = [], 0
    for count in mixtures:
        owners: list[int | None]
        if budget >= 1:
            step = budget.numerator
            owners = [start + i * step for i in range(count)]
            stop = start + count * step
        else:
            period, owners, stop = budget.denominator, [], start
            for i in range(count):
                own = i % period == (i // period) % period
                owners.append(stop if own else None)
                stop += own
        slices.append(CellSlice(start, stop, tuple(owners)))
        start = stop
    if start != cells:
        counts = ", ".join(f"{layer!r} {m}" for layer, m in zip(layers, mixtures, strict=True))
        raise ValueError(
            f"warehouse {name!r}: with cell_num_ratio {float(budget):g} its layers take {start} "
            f"cells of {cells} (mixtures: {counts}); choose cell_inplane_ratio and "
            "cell_outplane_ratio so that every layer's mixtures are a multiple of "
            f"{budget.denominator**2}, or a larger cell_num_ratio"
        )
    return tuple(slices)
