"""The method in two pictures (docs/method.md), made by the code that trains: partition, mixing.

The example is one warehouse of three layers: a 3x3 convolution from 16 to 16 channels, one from 16
to 32 and a 1x1 convolution beside the latter, as at the end of a ResNet's stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..warehouse import KernelShape, KWConv2d, Warehouse, WarehouseSettings
from ..warehouse.ops.assembly import assemble
from ..warehouse.partition import Partition
from .coefficients import dynamic_layers
from .heatmaps import Band, draw_bands, frame
from .style import FOREIGN, INK, LAYER, OWN, SIGNED, add_bar, new_figure, signed_limit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHAPES = (
    KernelShape(16, 16, (3, 3), name="A"),
    KernelShape(32, 16, (3, 3), name="B"),
    KernelShape(32, 16, (1, 1), name="C"),
)
_COLORS = (LAYER, FOREIGN, "#009e73")
_SHOWN = 3  # cells of a mixture that are written out


def example() -> tuple[nn.ModuleDict, Tensor]:
    """Three layers of one warehouse, as the papers start them, and a pooled input ``[1, 16]``; the
    global random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        warehouse = Warehouse(_SHAPES, WarehouseSettings(start="paper"), name="example")
        layers = nn.ModuleDict()
        for slot, shape in enumerate(_SHAPES):
            sizes = shape.in_channels, shape.out_channels, shape.kernel
            layers[shape.name] = KWConv2d(*sizes, bias=False, warehouse=warehouse, slot=slot)
        return layers.eval(), torch.rand(1, 16)


@torch.no_grad()
def example_coefficients(layers: nn.ModuleDict, pooled: Tensor, tau: float) -> list[Tensor]:
    """Every layer's coefficients ``[m, n]`` for a pooled input at a temperature."""
    temperature = torch.tensor(tau)
    return [layer.attention(pooled, temperature)[0] for layer in _convolutions(layers)]


def _convolutions(layers: nn.ModuleDict) -> list[KWConv2d]:
    return [layer for layer in layers.values() if isinstance(layer, KWConv2d)]


def block_corner(partition: Partition, mixture: int) -> tuple[int, int, int]:
    """Where a block lies: spatial position (row-major), first output and first input channel.

    The inverse of ``i = (s * GO + go) * GI + gi``.
    """
    position, block_out, block_in = map(int, np.unravel_index(mixture, partition.grid))
    return position, block_out * partition.cell_out, block_in * partition.cell_in


def draw_partition() -> Figure:
    """Three kernels cut into blocks of one size, and the cells that the blocks start on."""
    figure = new_figure(10, 6.2)
    parts: Any = figure.subfigures(2, 1, height_ratios=(4.6, 1.6))
    above, below = parts
    layers, _ = example()
    whole = _convolutions(layers)[0].warehouse.partition
    all_axes = above.subplots(1, 3, width_ratios=(3.4, 3.4, 1.35))
    for axes, shape, part, color in zip(all_axes, _SHAPES, whole.layers, _COLORS, strict=True):
        _draw_kernel(axes, shape, part, color)
    above.suptitle(
        "three kernels, cut into blocks of the cell's size: the mixtures, with their number i",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    axes = below.subplots()
    for own, color, shape in zip(whole.slices, _COLORS, _SHAPES, strict=True):
        cells = range(own.start, own.stop)
        _draw_boxes(axes, [(cell, 0) for cell in cells], (0.86, 1.2), color, cells, 8)
        middle = (own.start + own.stop - 0.14) / 2
        axes.text(middle, 1.9, f"{shape.name}'s own cells", ha="center", fontsize=9, color=INK)
    axes.set(xlim=(-0.3, whole.cells + 0.2), ylim=(2.1, -0.3))
    axes.set_axis_off()
    what = f"n = {whole.cells} cells of 16 x 16 channels, one for every mixture (b = 1)"
    axes.set_title(f"the warehouse: {what}", fontsize=10, loc="left")
    return figure


def _draw_kernel(axes: Any, shape: KernelShape, part: Partition, color: str) -> None:
    """Spatial positions beside one another, each a rectangle of output and input channels."""
    columns, gap = shape.kernel[1], 0.25
    x_unit, y_unit = 1 / 16, 0.55 / 16  # of a channel
    wide, high = shape.in_per_group * x_unit, shape.out_channels * y_unit
    corners = []
    for mixture in range(part.mixtures):
        position, first_out, first_in = block_corner(part, mixture)
        row, column = divmod(position, columns)
        x = column * (wide + gap) + first_in * x_unit
        corners.append((x, row * (high + gap) + first_out * y_unit))
    size = part.cell_in * x_unit, part.cell_out * y_unit
    _draw_boxes(axes, corners, size, color, range(part.mixtures), 9)
    # One scale for all three.
    axes.set(xlim=(-0.35, columns * (wide + gap)), ylim=(3 * (1.1 + gap) + 0.05, -0.35))
    arrow = {"arrowstyle": "<->", "color": INK, "lw": 0.8}
    axes.annotate("", (-0.15, high), (-0.15, 0), arrowprops=arrow)
    axes.annotate("", (wide, -0.12), (0, -0.12), arrowprops=arrow)
    out, into = f"{shape.out_channels} out", f"{shape.in_channels} in"
    axes.text(-0.2, high / 2, out, rotation=90, ha="right", va="center", fontsize=8)
    axes.text(wide / 2, -0.17, into, ha="center", va="bottom", fontsize=8)
    axes.set_axis_off()
    kernel = f"{'x'.join(map(str, shape.kernel))}, {shape.in_channels} to {shape.out_channels}"
    axes.set_title(f"{shape.name}: {kernel},\nm = {part.mixtures} mixtures", fontsize=9)


def _draw_boxes(
    axes: Any,
    corners: Sequence[tuple[float, float]],
    size: tuple[float, float],
    color: str,
    numbers: Iterable[int],
    fontsize: int,
) -> None:
    """Boxes of one size with their numbers."""
    xs, ys = zip(*corners, strict=True)
    width, height = size
    boxes = axes.bar(
        xs, height, width, ys, align="edge", color=color, edgecolor="white", linewidth=1.2
    )
    axes.bar_label(boxes, list(numbers), label_type="center", fontsize=fontsize)


def draw_mixing() -> Figure:
    """One kernel from its coefficients, and the coefficients at three temperatures."""
    layers, pooled = example()
    figure = new_figure(10, 7.6)
    parts: Any = figure.subfigures(2, 1, height_ratios=(3.9, 3.6))
    upper, lower = parts
    alphas: list[Tensor] = []
    for axes, tau in zip(upper.subplots(1, 3), (1.0, 0.5, 0.0), strict=True):
        alphas = example_coefficients(layers, pooled, tau)
        bands = [
            Band(f"{layer.name} ({layer.mixtures})", alpha, layer.own)
            for layer, alpha in zip(dynamic_layers(layers), alphas, strict=True)
        ]
        limit = signed_limit(*alphas)
        add_bar(upper, draw_bands(axes, bands, limit), axes, "neither", below=True)
        axes.set_title(f"temperature {tau:g}", fontsize=9)
    upper.suptitle(
        "coefficients of the mixtures of A, B and C (their number), one input, fresh weights; "
        "box: own cells",
        fontsize=10,
    )
    _draw_sum(lower, _convolutions(layers)[0], alphas[0])
    return figure


def _draw_sum(part: Any, layer: KWConv2d, alpha: Tensor) -> None:
    """``W_4 = sum_j alpha_4j e_j``, and where that block lies in the kernel."""
    cells, mixture = layer.warehouse.cells.detach(), layer.partition.mixtures // 2
    row = alpha[mixture]
    above, below = part.subfigures(2, 1, height_ratios=(1.5, 2))
    _draw_coefficients(above.subplots(), row, layer.partition.mixtures, mixture)

    kernel = assemble(alpha[None], cells, layer.spec)[0]  # [O, I, 3, 3]
    high, wide = layer.partition.cell_out, layer.partition.cell_in
    position, first_out, first_in = block_corner(layer.partition, mixture)
    y, x = divmod(position, layer.kernel_size[1])
    block = kernel[first_out : first_out + high, first_in : first_in + wide, y, x]
    tiles = nn.functional.pad(kernel.permute(2, 3, 0, 1), (1, 1, 1, 1), value=float("nan"))
    whole = tiles.transpose(1, 2).flatten(2).flatten(0, 1)  # [3 * (O + 2), 3 * (I + 2)]

    panels = []
    for place, j in enumerate(row.abs().argsort(descending=True)[:_SHOWN].tolist()):
        sign = "\N{MINUS SIGN} " if row[j] < 0 else "+ " if place else ""
        title = f"{sign}{abs(float(row[j])):.3f} x cell {j}"
        panels.append((title, cells[j].view(high, wide), signed_limit(cells)))
    end = signed_limit(kernel)
    panels.append((f"+ {len(row) - _SHOWN} more = block {mixture}", block, end))
    panels.append(("nine blocks = kernel of A", whole, end))
    all_axes = below.subplots(1, len(panels), width_ratios=(*(1,) * (len(panels) - 1), 1.45))
    for axes, (title, values, limit) in zip(all_axes, panels, strict=True):
        axes.imshow(values.numpy(), cmap=SIGNED, vmin=-limit, vmax=limit)
        axes.set_title(title, fontsize=9)
        axes.set(xticks=[], yticks=[])
    corner = x * (wide + 2) - 0.5, y * (high + 2) - 0.5
    frame(all_axes[-1], corner, wide + 2, high + 2, edgecolor=OWN, linewidth=1.8)


def _draw_coefficients(axes: Any, row: Tensor, own: int, mixture: int) -> None:
    colors = [_COLORS[0] if j < own else "#b0b0b0" for j in range(len(row))]
    axes.bar(range(len(row)), row.numpy(), color=colors)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("cell j", fontsize=8)
    axes.set_ylabel(f"alpha of mixture {mixture}", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.set_xlim(-0.7, len(row) - 0.3)
    axes.spines[["top", "right"]].set_visible(False)
    title = f"one mixture at temperature 0: signed coefficients of all {len(row)} cells"
    axes.set_title(f"{title} (A's own coloured)", fontsize=9, loc="left")
