"""The method in two pictures (docs/method.md), made by the code that trains: partition, mixing.

The example is one warehouse of three layers: a 3x3 convolution from 16 to 16 channels, one from 16
to 32 and a 1x1 convolution beside the latter, as at the end of a ResNet's stage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..warehouse import KernelShape, KWConv2d, Warehouse, WarehouseSettings, set_temperature
from ..warehouse.ops.assembly import assemble
from ..warehouse.partition import Partition
from .coefficients import DynamicLayer
from .heatmaps import Band, draw_bands
from .style import FOREIGN, INK, LAYER, OWN, SIGNED, add_bar, new_figure, signed_limit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Example", "block_corner", "draw_mixing", "draw_partition"]

_SHAPES = (
    KernelShape(16, 16, (3, 3), name="A"),
    KernelShape(32, 16, (3, 3), name="B"),
    KernelShape(32, 16, (1, 1), name="C"),
)
_COLORS = (LAYER, FOREIGN, "#009e73")
_SHOWN = 3  # cells of a mixture that are written out


class Example:
    """The example's warehouse and its layers as the papers start them; no global random number.

    Attributes:
        warehouse: shared by all.
        layers: in the order of :data:`_SHAPES`.
    """

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.warehouse = Warehouse(_SHAPES, WarehouseSettings(start="paper"), name="example")
            self.layers = [
                KWConv2d(
                    shape.in_channels,
                    shape.out_channels,
                    shape.kernel,
                    bias=False,
                    warehouse=self.warehouse,
                    slot=slot,
                ).eval()
                for slot, shape in enumerate(_SHAPES)
            ]
            self.pooled = torch.rand(1, 16)

    def described(self) -> list[DynamicLayer]:
        """The layers, as :func:`kw.pictures.dynamic_layers` would describe them."""
        whole = self.warehouse.partition
        return [
            DynamicLayer(shape.name, "example", part.mixtures, whole.cells, own)
            for shape, part, own in zip(_SHAPES, whole.layers, whole.slices, strict=True)
        ]

    @torch.no_grad()
    def coefficients(self, tau: float) -> list[Tensor]:
        """Every layer's coefficients ``[m, n]`` for one input at a temperature."""
        set_temperature(self.warehouse, tau)
        temperature = self.warehouse.temperature
        return [layer.attention(self.pooled, temperature)[0] for layer in self.layers]


def block_corner(partition: Partition, mixture: int) -> tuple[int, int, int]:
    """Where a block lies: spatial position (row-major), first output and first input channel.

    The inverse of ``i = (s * GO + go) * GI + gi``.
    """
    _, out_blocks, in_blocks = partition.grid
    rest, block_in = divmod(mixture, in_blocks)
    position, block_out = divmod(rest, out_blocks)
    return position, block_out * partition.cell_out, block_in * partition.cell_in


def draw_partition() -> Figure:
    """Three kernels cut into blocks of one size, and the cells that the blocks start on.

    Raises:
        PictureError: matplotlib is missing.
    """
    example = Example()
    whole = example.warehouse.partition
    figure = new_figure(10, 6.2)
    parts: Any = figure.subfigures(2, 1, height_ratios=(4.6, 1.6))
    above, below = parts
    widths = [3.4, 3.4, 1.35]
    all_axes = above.subplots(1, 3, width_ratios=widths)
    for axes, shape, part, color in zip(all_axes, _SHAPES, whole.layers, _COLORS, strict=True):
        _draw_kernel(axes, shape, part, color)
    axes = below.subplots()
    cells = whole.cells
    for own, color, shape in zip(whole.slices, _COLORS, _SHAPES, strict=True):
        for cell in range(own.start, own.stop):
            _draw_box(axes, (cell, 0), (0.86, 1.2), color, str(cell))
        axes.text(
            (own.start + own.stop - 0.14) / 2,
            1.9,
            f"{shape.name}'s own cells",
            ha="center",
            fontsize=9,
            color=INK,
        )
    axes.set(xlim=(-0.3, cells + 0.2), ylim=(1.45, -0.3))
    axes.set_axis_off()
    axes.set_title(
        f"the warehouse: n = {cells} cells of 16 x 16 channels, one for every mixture (b = 1)",
        fontsize=10,
        loc="left",
    )
    axes.set_ylim(2.1, -0.3)
    above.suptitle(
        "three kernels, cut into blocks of the cell's size: the mixtures, with their number i",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    return figure


def _draw_kernel(axes: Any, shape: KernelShape, part: Partition, color: str) -> None:
    """Spatial positions beside one another, each a rectangle of output and input channels."""
    columns = shape.kernel[1]
    wide, high = shape.in_per_group / 16, shape.out_channels / 16 * 0.55
    gap = 0.25
    for mixture in range(part.mixtures):
        position, first_out, first_in = block_corner(part, mixture)
        row, column = divmod(position, columns)
        x = column * (wide + gap) + first_in / 16
        y = row * (high + gap) + first_out / 16 * 0.55
        size = part.cell_in / 16, part.cell_out / 16 * 0.55
        _draw_box(axes, (x, y), size, color, str(mixture), 9)
    axes.set(
        xlim=(-0.35, columns * (wide + gap)),
        ylim=(3 * (1.1 + gap) + 0.05, -0.35),  # one scale for all three
    )
    axes.annotate(
        "", (-0.15, high), (-0.15, 0), arrowprops={"arrowstyle": "<->", "color": INK, "lw": 0.8}
    )
    axes.text(
        -0.2,
        high / 2,
        f"{shape.out_channels} out",
        rotation=90,
        ha="right",
        va="center",
        fontsize=8,
    )
    axes.annotate(
        "", (wide, -0.12), (0, -0.12), arrowprops={"arrowstyle": "<->", "color": INK, "lw": 0.8}
    )
    axes.text(wide / 2, -0.17, f"{shape.in_channels} in", ha="center", va="bottom", fontsize=8)
    axes.set_axis_off()
    kernel = "x".join(map(str, shape.kernel))
    axes.set_title(
        f"{shape.name}: {kernel}, {shape.in_channels} to {shape.out_channels},\n"
        f"m = {part.mixtures} mixtures",
        fontsize=9,
    )


def _draw_box(
    axes: Any,
    corner: tuple[float, float],
    size: tuple[float, float],
    color: str,
    text: str,
    fontsize: int = 8,
) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle(corner, *size, facecolor=color, edgecolor="white", linewidth=1.2))
    middle = corner[0] + size[0] / 2, corner[1] + size[1] / 2
    axes.text(*middle, text, ha="center", va="center", fontsize=fontsize, color="black")


def draw_mixing() -> Figure:
    """One kernel from its coefficients, and the coefficients at three temperatures.

    Raises:
        PictureError: matplotlib is missing.
    """
    example = Example()
    layers, cells = example.described(), example.warehouse.cells.detach()
    figure = new_figure(10, 7.6)
    parts: Any = figure.subfigures(2, 1, height_ratios=(3.9, 3.6))
    upper, lower = parts
    all_axes = upper.subplots(1, 3)
    for axes, tau in zip(all_axes, (1.0, 0.5, 0.0), strict=True):
        bands = [
            Band.of(x, alpha, f"{x.name} ({x.mixtures})")
            for x, alpha in zip(layers, example.coefficients(tau), strict=True)
        ]
        limit = signed_limit(*(band.values for band in bands))
        add_bar(upper, draw_bands(axes, bands, limit), axes, "neither", below=True)
        axes.set_title(f"temperature {tau:g}", fontsize=9)
    upper.suptitle(
        "coefficients of the mixtures of A, B and C (their number), one input, fresh weights; "
        "box: own cells",
        fontsize=10,
    )
    _draw_sum(lower, example.layers[0], example.coefficients(0.0)[0], cells)
    return figure


def _draw_sum(part: Any, layer: KWConv2d, alpha: Tensor, cells: Tensor) -> None:
    """``W_4 = sum_j alpha_4j e_j``, and where that block lies in the kernel."""
    mixture = layer.partition.mixtures // 2
    row = alpha[mixture]
    order = row.abs().argsort(descending=True)
    grid = part.subfigures(2, 1, height_ratios=(1.5, 2))
    bars = grid[0].subplots()
    colors = [
        _COLORS[0] if int(j) < layer.partition.mixtures else "#b0b0b0" for j in range(len(row))
    ]
    bars.bar(range(len(row)), row.numpy(), color=colors)
    bars.axhline(0, color=INK, linewidth=0.8)
    bars.set_xlabel("cell j", fontsize=8)
    bars.set_ylabel(f"alpha of mixture {mixture}", fontsize=8)
    bars.tick_params(labelsize=7)
    bars.set_xlim(-0.7, len(row) - 0.3)
    bars.spines[["top", "right"]].set_visible(False)
    bars.set_title(
        f"one mixture at temperature 0: signed coefficients of all {len(row)} cells (A's own "
        "coloured)",
        fontsize=9,
        loc="left",
    )
    size = layer.partition.cell_out, layer.partition.cell_in
    kernel = assemble(alpha[None], cells, layer.spec)[0]  # [O, I, 3, 3]
    position, first_out, first_in = block_corner(layer.partition, mixture)
    columns = layer.kernel_size[1]
    block = kernel[
        first_out : first_out + size[0],
        first_in : first_in + size[1],
        position // columns,
        position % columns,
    ]
    chosen = [int(j) for j in order[:_SHOWN]]
    axes = grid[1].subplots(1, _SHOWN + 2, width_ratios=(*(1,) * (_SHOWN + 1), 1.45))
    limit = signed_limit(cells)
    for number, (one, j) in enumerate(zip(axes, chosen, strict=False)):
        one.imshow(cells[j].view(size).numpy(), cmap=SIGNED, vmin=-limit, vmax=limit)
        sign = "+" if row[j] > 0 else "\N{MINUS SIGN}"
        sign = "" if not number and row[j] > 0 else f"{sign} "
        one.set_title(f"{sign}{abs(float(row[j])):.3f} x cell {j}", fontsize=9)
    end = signed_limit(kernel)
    axes[_SHOWN].imshow(block.numpy(), cmap=SIGNED, vmin=-end, vmax=end)
    axes[_SHOWN].set_title(f"+ {len(row) - _SHOWN} more = block {mixture}", fontsize=9)
    tiles = torch.nn.functional.pad(kernel.permute(2, 3, 0, 1), (1, 1, 1, 1), value=float("nan"))
    whole = tiles.transpose(1, 2).flatten(2).flatten(0, 1)  # [3 * (O + 2), 3 * (I + 2)]
    axes[-1].imshow(whole.numpy(), cmap=SIGNED, vmin=-end, vmax=end)
    axes[-1].set_title("nine blocks = kernel of A", fontsize=9)
    _frame(axes[-1], position // columns, position % columns, size)
    for one in axes:
        one.set_xticks([])
        one.set_yticks([])


def _frame(axes: Any, row: int, column: int, size: tuple[int, int]) -> None:
    from matplotlib.patches import Rectangle

    corner = column * (size[1] + 2) - 0.5, row * (size[0] + 2) - 0.5
    axes.add_patch(
        Rectangle(corner, size[1] + 2, size[0] + 2, fill=False, edgecolor=OWN, linewidth=1.8)
    )
