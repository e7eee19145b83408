"""A family's picture: ratios to the static network, with spread and targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .results import Result
from .targets import target_for

__all__ = ["plot_family"]

_WHAT = {"inference": "inference", "train": "training step", "memory": "training memory"}
# Readable in grey as well: the markers differ.
_STYLES = {"grouped": ("#8c8c8c", "s"), "auto": ("#0b6cb0", "o")}
_MORE_STYLES = (("#d1730f", "D"), ("#3a8a3a", "^"), ("#8e4fa8", "v"), ("#b03a3a", "P"))
_TARGET = "#c01f3a"
_ROW = 0.7  # of a row's height is for its dots, one below the other


def plot_family(results: Sequence[Result], path: Path, title: str) -> None:
    """Draw one row a network and run, one dot a back end.

    Args:
        results: of one family on one machine.
        path: written, in the format of its suffix.
        title: above the picture.

    Raises:
        ImportError: matplotlib is missing; it comes with the extra ``demo``.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rows = [
        (result, model)
        for result in sorted(results, key=lambda result: list(_WHAT).index(result.conditions.mode))
        for model in dict.fromkeys(network.model for network in result.networks[1:])
    ]
    backends = dict.fromkeys(n.backend for r in results for n in r.networks[1:])
    styles = dict(_STYLES)
    others = [name for name in backends if name not in styles]
    styles |= {name: _MORE_STYLES[i % len(_MORE_STYLES)] for i, name in enumerate(others)}
    height = 1.5 + 0.26 * len(rows) * max(len(backends), 2)
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    largest = 1.0
    for y, (result, model) in enumerate(rows):
        own = [n for n in result.networks[1:] if n.model == model and n.problem is None]
        for i, network in enumerate(own):
            ratio = result.ratio(network, result.static)
            color, marker = styles[network.backend]
            at = y + _ROW * ((i + 0.5) / len(own) - 0.5)
            axes.plot([ratio.q1, ratio.q3], [at, at], color=color, linewidth=2, zorder=2)
            axes.plot(ratio.median, at, marker, color=color, markersize=7, zorder=3)
            axes.annotate(
                f"{ratio.median:.2f}",
                (max(ratio.q3, ratio.median), at),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                color=color,
                fontsize=8,
                # Above the targets' lines, which the figure may cross.
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
                zorder=4,
            )
            largest = max(largest, ratio.q3)
        if (target := target_for(result, model)) is not None:
            axes.plot([target.limit] * 2, [y - 0.4, y + 0.4], color=_TARGET, linewidth=2, zorder=1)
            largest = max(largest, target.limit)
    axes.axvline(1, color="black", linewidth=1, zorder=1)
    axes.set_yticks(range(len(rows)), [_label(result, model, results) for result, model in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    for y in range(1, len(rows)):
        axes.axhline(y - 0.5, color="black", alpha=0.1, linewidth=0.8, zorder=0)
    if largest > 8:  # grouped on a GPU: the others would be one dot beside it
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(0.9, largest * 1.3)
    else:
        axes.set_xlim(0.9, largest + 0.1 * (largest - 0.9))
    axes.set_xlabel(
        "ratio to the static network in the same run: median, and line between quartiles"
    )
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    for name in backends:
        color, marker = styles[name]
        axes.plot([], [], marker, color=color, label=name)
    if any(target_for(result, model) for result, model in rows):
        axes.plot([], [], color=_TARGET, linewidth=2, label="target for auto, at most")
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    # Without a date and with fixed identifiers the same results give the same file.
    with mpl.rc_context({"svg.hashsalt": "kw.benchmark"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=120, metadata=metadata)


def _label(result: Result, model: str, results: Sequence[Result]) -> str:
    """Network and mode, and the conditions in which the picture's results differ."""
    c = result.conditions
    words = {
        "batch_size": f"batch {c.batch_size}",
        "dtype": c.dtype,
        "input_size": f"{c.input_size}x{c.input_size}",
        "threads": f"{c.threads} threads",
        "layout": c.layout,
        "execution": c.execution,
    }
    own = [
        word
        for key, word in words.items()
        if len({getattr(other.conditions, key) for other in results}) > 1
    ]
    return f"{model}\n{', '.join([_WHAT[c.mode], *own])}"
