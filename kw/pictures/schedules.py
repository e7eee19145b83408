"""Learning rate and temperature over a run that need not have begun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .style import INK, OWN, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Curves:
    """What is set before each update."""

    total: int  # epochs of the run
    epochs: Sequence[float]  # of each value, in epochs since the start
    lr: Sequence[float]
    temperature: Sequence[float] | None  # tau, or None for a network without one
    weight_decay: float  # the optimizer's, which does not change
    decoupled: bool  # whether the weights shrink by lr * weight_decay in an update (AdamW)
    marks: dict[str, float] = field(default_factory=dict)  # epoch by what happens then


def draw_schedules(curves: Curves, title: str) -> Figure:
    """One panel for the rate, one for weight decay and one for the temperature if there is any."""
    rows = 3 if curves.temperature is not None else 2
    figure = new_figure(8, 0.7 + 1.75 * rows, title)
    panels = figure.subplots(rows, 1, sharex=True)
    rate, decay = panels[:2]
    rate.plot(curves.epochs, curves.lr, color=OWN)
    rate.set_ylabel("learning rate")
    if curves.decoupled:
        shrink = [value * curves.weight_decay for value in curves.lr]
        label = f"decay of weights\nper update,\n{curves.weight_decay:g} x rate"
    else:
        shrink = [curves.weight_decay] * len(curves.lr)
        label = "weight decay\n(L2, constant)"
    decay.plot(curves.epochs, shrink, color=OWN)
    decay.set_ylabel(label)
    if curves.temperature is not None:
        panels[2].plot(curves.epochs, curves.temperature, color=OWN)
        panels[2].set_ylabel("temperature")
    styles = ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
    at: dict[float, list[str]] = {}
    for name, epoch in curves.marks.items():
        at.setdefault(epoch, []).append(name)
    for number, (epoch, names) in enumerate(at.items()):
        for axes in panels:
            axes.axvline(
                epoch,
                color=INK,
                linestyle=styles[number % len(styles)],
                linewidth=1,
                label=f"{', '.join(names)}: epoch {epoch:g}",
            )
    for axes in panels:
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("epoch")
    panels[-1].set_xlim(0, curves.total * 1.002)  # or the last number would be cut
    if curves.marks:
        handles, labels = rate.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8
        )
    return figure
