"""Pictures of runs by matplotlib, which comes with the extra ``demo``: SVG or PNG by the name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation import Run
from ..pictures.style import new_figure, save


@dataclass(frozen=True)
class Curve:
    """A run over its epochs, or the mean of several."""

    row: str  # name of the line; those of one name share their colour
    loss: Sequence[tuple[int, float]]  # epoch and value of the training loss
    score: Sequence[tuple[int, float]]  # likewise of what is evaluated
    level: float | None = None  # a published figure to compare the score with


def run_curve(
    run: Run, row: str, result: str = "top1", scale: float = 1, level: float | None = None
) -> Curve:
    """A run's curve, of the average of weights where that is what the run is judged by.

    ``result`` is the score's key in ``log.jsonl``, ``scale`` leads from its unit to the picture's.
    """
    score = [(epoch, value * scale) for epoch, value in run.curve("val", run.judged_by + result)]
    return Curve(row, run.curve("train", "loss"), score, level)


@dataclass(frozen=True)
class Dot:
    """A network's figure: ``kind`` is ``measured``, ``published`` or ``recalled``."""

    row: str
    x: float
    y: float
    kind: str = "measured"


_DOTS = {  # filled: measured here
    "measured": {"color": "tab:blue"},
    "published": {"facecolors": "none", "edgecolors": "tab:orange"},
    "recalled": {"facecolors": "none", "edgecolors": "tab:gray", "linestyles": ":"},
}


def plot_curves(curves: Sequence[Curve], score: str, path: Path) -> Path:
    """Training loss and a score of this name over epochs, a line for every curve; the path.

    Raises:
        PictureError: matplotlib is missing, or the file cannot be written.
    """
    figure = new_figure(11, 4.5)
    import matplotlib as mpl
    from matplotlib.ticker import MaxNLocator

    losses, scores = figure.subplots(1, 2)
    rows = list(dict.fromkeys(curve.row for curve in curves))
    colours = mpl.colormaps["tab10" if len(rows) <= 10 else "tab20"]
    lines = {}
    for curve in curves:
        place = rows.index(curve.row)
        style: dict[str, Any] = {"color": colours(place % colours.N), "marker": "."}
        style["linestyle"] = "-" if place < 10 else "--"
        losses.plot(*_axes(curve.loss), label=curve.row, **style)
        (lines[curve.row],) = scores.plot(*_axes(curve.score), label=curve.row, **style)
        if curve.level is not None:
            scores.axhline(curve.level, color=style["color"], linestyle=":", linewidth=1)
    losses.set(xlabel="epoch", ylabel="training loss")
    scores.set(xlabel="epoch", ylabel=score)
    for axis in (losses, scores):
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(lines.values(), lines, loc="outside right center", fontsize=8)
    save(figure, path)
    return path


def plot_dots(panels: Mapping[str, Sequence[Dot]], score: str, path: Path) -> Path:
    """A score of this name over what it costs, with names beside the dots; the path.

    ``panels`` has the dots by the name of the horizontal axis, which is logarithmic.

    Raises:
        PictureError: matplotlib is missing, or the file cannot be written.
    """
    figure = new_figure(6.5 * len(panels), 4.5)
    from matplotlib.ticker import LogFormatter

    places = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, dots) in zip(places, panels.items(), strict=True):
        for kind, style in _DOTS.items():
            own = [dot for dot in dots if dot.kind == kind]
            if own:
                axis.scatter([dot.x for dot in own], [dot.y for dot in own], label=kind, **style)
        for dot in dots:
            at = {"xytext": (5, 3), "textcoords": "offset points", "fontsize": 7}
            axis.annotate(dot.row, (dot.x, dot.y), **at)
        axis.set(xlabel=name, ylabel=score, xscale="log")
        axis.xaxis.set_major_formatter(LogFormatter())  # 20 in place of 2 x 10^1
        axis.xaxis.set_minor_formatter(LogFormatter())
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save(figure, path)
    return path


def _axes(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
