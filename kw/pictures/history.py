"""Coefficients over training: snapshots of one warehouse, and what all layers turn to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .coefficients import CellUse, DynamicLayer, cell_shares
from .heatmaps import Band, draw_bands
from .style import AMOUNT, INK, add_bar, new_figure, signed_limit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = 4
_PARTS = {
    "own": "to a mixture's own cell",
    "foreign": "to other layers' cells",
    "negative": "negative",
}


@dataclass(frozen=True)
class Snapshot:
    """The coefficients at one moment of training."""

    epoch: float  # epochs done
    temperature: float | None  # tau of the weights, or None where there is none
    use: Mapping[str, CellUse]  # by name of the layer


def draw_history(
    layers: Sequence[DynamicLayer], snapshots: Sequence[Snapshot], warehouse: str, title: str
) -> Figure:
    """Above: mean coefficients of a warehouse at a few moments. Below: shares of all layers.

    ``layers`` are all of the network, ``snapshots`` in the order of training.
    """
    count = len(snapshots)
    places = np.linspace(0, count - 1, min(count, _PANELS)).round()  # the first and the last, too
    chosen = [snapshots[int(place)] for place in places]
    group = [layer for layer in layers if layer.warehouse == warehouse]
    lower = 0.8 + 0.16 * len(layers)
    said = f"warehouse {warehouse}: mean coefficients, each map on its own scale"
    figure = new_figure(10, 3.6 + lower + 1.1, title, said)
    parts: Any = figure.subfigures(2, 1, height_ratios=(3.6, lower + 0.6))
    upper_part, lower_part = parts
    all_axes = upper_part.subplots(1, len(chosen), squeeze=False)[0]
    for axes, snapshot in zip(all_axes, chosen, strict=True):
        bands = [Band(x.name, snapshot.use[x.name].mean, x.own) for x in group]
        limit = signed_limit(*(band.values for band in bands), quantile=0.998)
        add_bar(upper_part, draw_bands(axes, bands, limit), axes, below=True)
        tau = "" if snapshot.temperature is None else f", tau = {snapshot.temperature:.2f}"
        axes.set_title(f"epoch {snapshot.epoch:g}{tau}", fontsize=9)
        if axes is not all_axes[0]:
            axes.set_yticks([])
    _draw_shares(lower_part, layers, snapshots)
    return figure


def _draw_shares(part: Any, layers: Sequence[DynamicLayer], snapshots: Sequence[Snapshot]) -> None:
    has_temperature = snapshots[0].temperature is not None
    rows = 2 if has_temperature else 1
    ratios = (len(layers) * 0.16 + 0.3, 0.6)[:rows]
    grid = part.subplots(rows, len(_PARTS), squeeze=False, height_ratios=ratios, sharex=True)
    shares = [[cell_shares(snapshot.use[x.name], x) for snapshot in snapshots] for x in layers]
    epochs = [snapshot.epoch for snapshot in snapshots]
    for column, (key, label) in enumerate(_PARTS.items()):
        values = torch.tensor(
            [[s.negative if key == "negative" else s.part(key) for s in row] for row in shares]
        )  # [layers, snapshots]
        axes = grid[0, column]
        image = axes.pcolormesh(
            epochs, range(len(layers)), values.numpy(), cmap=AMOUNT, vmin=0, shading="nearest"
        )
        axes.invert_yaxis()
        axes.set_title(f"share of |coefficient| {label}", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_yticks(range(len(layers)), [x.name for x in layers] if not column else [])
        axes.tick_params(axis="y", length=0, labelsize=7)
        bar = add_bar(part, image, axes, "neither")
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        if has_temperature:
            below = grid[1, column]
            below.plot(epochs, [snapshot.temperature for snapshot in snapshots], color=INK)
            below.set_ylim(-0.05, 1.05)
            below.tick_params(labelsize=7)
            if not column:
                below.set_ylabel("temperature", fontsize=7)
        grid[-1, column].set_xlabel("epoch", fontsize=8)
