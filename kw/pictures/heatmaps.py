"""Heat maps of coefficients: layers as bands of one map, warehouse by warehouse.

A band's rows are a layer's mixtures (or classes), its columns the cells of the warehouse. The box
in a band frames the layer's own cells: at temperature 1 nothing else is used.

Legend: m mixtures, n cells, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..warehouse.partition import CellSlice
from .coefficients import CellUse, DynamicLayer
from .style import INK, SIGNED, add_bar, new_figure, signed_limit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEAST, _MOST = 7, 36  # height of a band, rows: names must fit beside it
_INCHES = 0.024  # of a row
_BOXES = 300  # cells that are still wider than a pixel
_WIDE = 120  # cells from which a panel takes the whole width


@dataclass(frozen=True)
class Band:
    """One layer's part of a map."""

    label: str  # beside it
    values: Tensor  # [rows, n]
    own: CellSlice  # the layer's own cells

    @property
    def height(self) -> int:
        """On the map, rows."""
        return min(max(len(self.values), _LEAST), _MOST)


def by_warehouse(layers: Sequence[DynamicLayer]) -> dict[str, list[DynamicLayer]]:
    """Layers in groups, as they are."""
    groups: dict[str, list[DynamicLayer]] = {}
    for layer in layers:
        groups.setdefault(layer.warehouse, []).append(layer)
    return groups


def draw_bands(axes: Any, bands: Sequence[Band], limit: float, cmap: str = SIGNED) -> Any:
    """Draw bands of one number of cells from top to bottom; what a colour bar is made of.

    The scale ends at ``limit``; it begins at ``-limit``, with colours other than ``SIGNED`` at 0.
    """
    cells = bands[0].values.shape[1]
    top, ticks, image = 0, [], None
    for band in bands:
        # Every value a box, but where there are more of them than pixels.
        boxes = cells <= _BOXES and len(band.values) <= 2 * band.height
        image = axes.imshow(
            band.values.numpy(),
            cmap=cmap,
            vmin=-limit if cmap == SIGNED else 0,
            vmax=limit,
            aspect="auto",
            interpolation="nearest" if boxes else None,
            extent=(0, cells, top + band.height, top),
        )
        own = band.own.stop - band.own.start
        if own:
            frame(axes, (band.own.start, top), own, band.height, edgecolor=INK, linewidth=0.9)
        ticks.append(top + band.height / 2)
        top += band.height
        if band is not bands[-1]:
            axes.axhline(top, color=INK, linewidth=0.4)
    axes.set(xlim=(0, cells), ylim=(top, 0))
    axes.set_yticks(ticks, [band.label for band in bands], fontsize=7)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlabel("cell of the warehouse", fontsize=8)
    return image


def frame(axes: Any, corner: tuple[float, float], width: float, height: float, **line: Any) -> None:
    """An empty rectangle."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle(corner, width, height, fill=False, **line))


def draw_panels(panels: Mapping[str, Sequence[Band]], *title: str) -> Figure:
    """One map for each title, on a scale of its own: two beside one another where cells are few."""
    bands = list(panels.values())
    columns = 1 if len(bands) == 1 or max(p[0].values.shape[1] for p in bands) > _WIDE else 2
    rows = math.ceil(len(bands) / columns)
    heights = [
        0.75 + _INCHES * max(sum(band.height for band in p) for p in bands[r::rows])
        for r in range(rows)
    ]
    figure = new_figure(9, sum(heights) + 0.5, *title)
    grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).T.flatten()
    for axes in grid[len(bands) :]:
        axes.set_axis_off()
    for axes, (name, panel) in zip(grid, panels.items(), strict=False):  # down the columns
        limit = signed_limit(*(band.values for band in panel), quantile=0.998)
        add_bar(figure, draw_bands(axes, panel, limit), axes)
        axes.set_title(name, fontsize=9, loc="left")
    return figure


def draw_attention(
    layers: Sequence[DynamicLayer], use: Mapping[str, CellUse], title: str
) -> Figure:
    """Mean coefficients of every mixture for every cell, one panel a warehouse."""
    panels = {
        f"warehouse {name}: {group[0].cells} cells": [
            Band(f"{x.name} ({x.mixtures})", use[x.name].mean, x.own) for x in group
        ]
        for name, group in by_warehouse(layers).items()
    }
    return draw_panels(
        panels, title, "rows: mixtures of a layer (their number); box: its own cells"
    )


def draw_classes(
    layers: Sequence[DynamicLayer],
    effects: Mapping[str, tuple[Tensor, float]],
    classes: Sequence[str],
    title: str,
) -> Figure:
    """How much more or less of each cell the images of a class use, one panel a warehouse; effects
    are :func:`kw.pictures.coefficients.class_effect`'s, by layer."""
    panels = {
        f"warehouse {name}": [
            Band(f"{x.name}  {effects[x.name][1]:.0%}", effects[x.name][0], x.own) for x in group
        ]
        for name, group in by_warehouse(layers).items()
    }
    rows = f"{len(classes)} classes from {classes[0]} (top) to {classes[-1]}"
    said = f"rows of a layer: {rows}; percentage: variance over images between classes"
    return draw_panels(panels, title, said)
