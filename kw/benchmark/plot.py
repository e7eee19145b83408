"""A family's picture: ratios to the static network, with their spread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..pictures.style import new_figure, save
from .conditions import WORDS
from .results import Result

_MARKERS = "soD^vP*X"  # readable in grey as well


def plot_family(results: Sequence[Result], path: Path, title: str) -> None:
    """Draw the results of one family on one machine: a row a network and run, a marker a back end.

    Raises:
        PictureError: matplotlib is missing, or ``path`` cannot be written.
    """
    modes = list(WORDS)
    rows = [
        (result, model)
        for result in sorted(results, key=lambda result: modes.index(result.conditions.mode))
        for model in dict.fromkeys(network.model for network in result.networks[1:])
    ]
    backends = list(dict.fromkeys(n.backend for r in results for n in r.networks[1:]))
    figure = new_figure(9, 1.5 + 0.26 * len(rows) * max(len(backends), 2))
    axes = figure.subplots()
    for i, backend in enumerate(backends):
        found = {
            y + 0.7 * ((i + 0.5) / len(backends) - 0.5): result.ratio(network, result.static)
            for y, (result, model) in enumerate(rows)
            for network in result.networks[1:]
            if (network.model, network.backend, network.problem) == (model, backend, None)
        }
        medians = [spread.median for spread in found.values()]
        below = [spread.median - spread.q1 for spread in found.values()]
        above = [spread.q3 - spread.median for spread in found.values()]
        marker = _MARKERS[i % len(_MARKERS)]
        axes.errorbar(medians, list(found), xerr=[below, above], fmt=marker, label=backend)
        for y, spread in found.items():
            axes.annotate(
                f"{spread.median:.2f}",
                (spread.q3, y),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [_label(result, model, results) for result, model in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xscale("log", base=2)  # grouped on a GPU: the others would be one dot beside it
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.1)
    axes.set_xlabel("ratio to the static network in the same run: median and quartiles")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    save(figure, path)


def _label(result: Result, model: str, results: Sequence[Result]) -> str:
    """Network and mode, and the conditions in which the picture's results differ."""
    own = zip(*(r.conditions.words() for r in [result, *results]), strict=True)
    differing = [word for word, *others in own if len(set(others)) > 1]
    return f"{model}\n{', '.join([WORDS[result.conditions.mode], *differing])}"
