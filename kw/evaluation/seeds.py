"""Which row of a study is ahead, and whether that is more than chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .report import render_table
from .study import binomial_error, mean_and_error

__all__ = ["difference_table"]


def difference_table(summary: Mapping[str, Any]) -> str:
    """The first row of a study against each of the others, as a Markdown table.

    ``±`` is a standard error: over the seeds, which are paired in a difference; with one seed, that
    of accuracies on so many test images (binomial), as if the two networks had seen different ones.
    """
    by_row: dict[str, dict[int, Mapping[str, Any]]] = {}
    for run in summary["runs"]:
        by_row.setdefault(run["row"], {})[run["seed"]] = run
    first = next(iter(by_row))
    rows = []
    for row, runs in by_row.items():
        ahead = ""
        if row != first:
            seeds = [seed for seed in runs if seed in by_row[first]]
            pairs = [(by_row[first][seed]["top1"], runs[seed]["top1"]) for seed in seeds]
            ahead = _difference(pairs, summary["images"])
        top1 = [run["top1"] for run in runs.values()]
        parameters = next(iter(runs.values()))["params"]
        shown = _accuracy(top1, summary["images"])
        seconds = 3600 * sum(run["hours"] for run in runs.values()) / len(runs)
        rows.append((row, f"{parameters:,}", shown, ahead, f"{seconds:.0f}"))
    header = ("Row", "Parameters", "top-1 (%)", f"{first} ahead by", "seconds of training")
    return render_table(header, rows)


def _accuracy(values: Sequence[float], images: int) -> str:
    if len(values) > 1:
        mean, error = mean_and_error(values)
    else:
        mean, error = values[0], binomial_error(values[0], images)
    return f"{mean:.2f} ± {error:.2f}"


def _difference(pairs: Sequence[tuple[float, float]], images: int) -> str:
    if not pairs:
        return "no seed in common"
    differences = [ours - theirs for ours, theirs in pairs]
    if len(pairs) > 1:
        mean, error = mean_and_error(differences)
    else:
        mean, error = differences[0], math.hypot(*(binomial_error(v, images) for v in pairs[0]))
    return f"{mean:+.2f} ± {error:.2f}"
