"""Which cells the layers of a warehouse use: their own, other layers', added or subtracted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .coefficients import CellShares, CellUse, DynamicLayer, cell_shares
from .heatmaps import Band, by_warehouse, draw_bands
from .style import AMOUNT, FOREIGN, INK, LAYER, OWN, add_bar, new_figure, signed_limit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PARTS = {
    "own": ("a mixture's own cell", OWN),
    "layer": ("other cells of the layer", LAYER),
    "foreign": ("other layers' cells", FOREIGN),
}


def draw_cells(layers: Sequence[DynamicLayer], use: Mapping[str, CellUse], title: str) -> Figure:
    """Per warehouse: how much a layer uses each cell, and whose cells it uses with which sign."""
    groups = by_warehouse(layers)
    heights = [0.7 + 0.21 * len(group) for group in groups.values()]
    figure = new_figure(9, sum(heights) + 0.9, title)
    grid = figure.subplots(
        len(groups), 2, squeeze=False, height_ratios=heights, width_ratios=(1.25, 1)
    )
    for (left, right), (name, group) in zip(grid, groups.items(), strict=True):
        bands = []
        for layer in group:
            amount = use[layer.name].absolute.mean(0, keepdim=True)  # [1, n]
            amount = amount * (layer.cells / max(float(amount.sum()), 1e-12))
            bands.append(Band(layer.name, amount, layer.own))
        limit = signed_limit(*(band.values for band in bands), quantile=0.99)
        image = draw_bands(left, bands, limit, AMOUNT)
        for box in left.patches:
            box.set_edgecolor("white")
        add_bar(figure, image, left, "max")
        left.set_title(f"warehouse {name}: use of each cell, 1 = the mean", fontsize=9, loc="left")
        for row, layer in enumerate(group):
            _draw_shares(right, row, cell_shares(use[layer.name], layer), layer)
        right.set(xlim=(0, 1), ylim=(len(group) - 0.5, -0.5))
        right.set_yticks([])
        right.tick_params(axis="x", labelsize=7)
        right.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        right.set_title("share of |coefficient|", fontsize=9, loc="left")
    handles = _legend()
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure


def _draw_shares(axes: Any, row: int, shares: CellShares, layer: DynamicLayer) -> None:
    at = 0.0
    for part, (_, color) in _PARTS.items():
        for sign, hatch in enumerate((None, "/////")):
            width = getattr(shares, part)[sign] / max(shares.total, 1e-12)
            axes.barh(
                row, width, left=at, height=0.76, color=color, hatch=hatch, edgecolor="white",
                linewidth=0,
            )  # fmt: skip
            at += width
    alike = (layer.own.stop - layer.own.start) / layer.cells
    axes.plot([alike, alike], [row - 0.46, row + 0.46], color=INK, linewidth=1.6)


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(facecolor=color, label=label) for label, color in _PARTS.values()]
    handles.append(
        Patch(facecolor="#b0b0b0", hatch="/////", edgecolor="white", label="negative coefficients")
    )
    handles.append(
        Line2D([], [], color=INK, linewidth=1.6, label="end of the layer's, if all alike")
    )
    return handles
