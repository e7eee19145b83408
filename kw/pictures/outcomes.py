"""Pictures of an evaluation: what is confused with what, and how far confidence can be believed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .style import AMOUNT, FOREIGN, INK, OWN, add_bar, new_figure, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CLASSES = 20
"""Classes of a confusion matrix that can be read."""


def most_confused(matrix: Any, most: int = MOST_CLASSES) -> Any:
    """At most so many classes, those of the most frequent confusions, in the order of the matrix
    ``[C, C]`` of images by class and prediction."""
    if len(matrix) <= most:
        return np.arange(len(matrix))
    wrong = np.where(np.eye(len(matrix), dtype=bool), 0, matrix)
    chosen: dict[int, None] = {}
    for pair in np.argsort(-wrong, axis=None, kind="stable"):
        both = dict.fromkeys(int(i) for i in divmod(int(pair), len(matrix)))
        if len(chosen | both) > most:
            break
        chosen |= both
    return np.array(sorted(chosen))


def draw_confusion(matrix: Any, names: Sequence[str], title: str) -> Figure:
    """A confusion matrix: colours are shares of a class's images, numbers are images.

    Of more than :data:`MOST_CLASSES` classes, those that are confused most. The matrix ``[C, C]``
    has images by class, in rows, and prediction.
    """
    chosen = most_confused(matrix)
    if len(chosen) < len(matrix):
        title += f"; the {len(chosen)} of {len(matrix):,} classes that are confused most"
    block = matrix[np.ix_(chosen, chosen)]
    share = block / np.maximum(matrix.sum(1)[chosen, None], 1)
    side = 0.42 * len(chosen)
    figure = new_figure(max(side + 4.2, 6.5), max(side + 2.4, 4.5), title)
    axes = figure.subplots()
    image = axes.imshow(share, cmap=AMOUNT, vmin=0, vmax=1)
    labels = [shorten(names[c], 1.5) for c in chosen]
    turned: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    short = max(map(len, labels)) <= 4
    axes.set_xticks(range(len(chosen)), labels, **({} if short else turned))
    axes.set_yticks(range(len(chosen)), labels)
    axes.tick_params(labelsize=8, length=0)
    axes.set_xlabel("predicted", fontsize=9)
    axes.set_ylabel("true", fontsize=9)
    for (row, column), count in np.ndenumerate(block):
        if count:
            ink = INK if share[row, column] > 0.6 else "white"
            axes.text(column, row, f"{count}", ha="center", va="center", color=ink, fontsize=7)
    add_bar(figure, image, axes, "neither").set_label("share of the class's images", fontsize=8)
    return figure


def draw_reliability(
    counts: Any, confidence: Any, accuracy: Any, ece: float | None, title: str
) -> Figure:
    """Accuracy over confidence in bins of equal width, and how many images each bin has.

    ``counts``, ``confidence`` and ``accuracy`` are ``[M]``, means NaN in an empty bin; ``ece`` is
    the expected calibration error, percent.
    """
    bins = len(counts)
    middle = (np.arange(bins) + 0.5) / bins
    figure = new_figure(5, 5.6, title)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.bar(middle, accuracy, 0.92 / bins, color=OWN, label="accuracy")
    upper.plot(confidence, confidence, "o", color=FOREIGN, markersize=5, label="mean confidence")
    upper.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle="--")
    upper.set_ylim(0, 1)
    upper.set_ylabel("share of images that are right", fontsize=9)
    error = "none" if ece is None else f"{ece:.2f}%"
    upper.legend(fontsize=8, title=f"expected calibration error {error}", title_fontsize=8)
    lower.bar(middle, counts, 0.92 / bins, color=INK)
    lower.set_xlim(0, 1)
    lower.set_xlabel("confidence", fontsize=9)
    lower.set_ylabel("images", fontsize=9)
    for axes in (upper, lower):
        axes.tick_params(labelsize=8)
    return figure
