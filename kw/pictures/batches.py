"""Training batches as the network sees them, with the mixture of labels below every image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .style import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MOST", "draw_batch", "label_mixture"]

MOST = 32
"""Images of a batch that are drawn."""


def label_mixture(target: Tensor, classes: Sequence[str], smoothing: float = 0.0) -> str:
    """A target in words: ``"cat"``, or ``"cat 0.62 + dog 0.38"``, the larger part first.

    Args:
        target: a label, int64 ``[]``, or probabilities ``[C]``.
        classes: their names.
        smoothing: label smoothing; what it gives to all classes alike is left out.
    """
    if target.ndim == 0:
        return classes[int(target)]
    floor = smoothing / len(classes)
    parts = [(float(p), classes[i]) for i, p in enumerate(target) if float(p) > floor + 1e-6]
    parts.sort(key=lambda part: -part[0])
    if len(parts) == 1 and not smoothing:
        return parts[0][1]
    return " + ".join(f"{name} {share:.2f}" for share, name in parts)


def draw_batch(pictures: Any, labels: Sequence[str], title: str) -> Figure:
    """A batch in rows of eight; at most :data:`MOST` images.

    Args:
        pictures: uint8 ``[B, S, S, 3]``.
        labels: what stands below each.
        title: above the picture.

    Raises:
        PictureError: matplotlib is missing.
    """
    count = min(len(labels), MOST)
    columns = min(count, 8)
    rows = math.ceil(count / columns)
    figure = new_figure(max(1.12 * columns, 4), 0.6 + 1.5 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid:
        axes.set_axis_off()
    for axes, picture, label in zip(grid, pictures[:count], labels, strict=False):
        axes.imshow(picture)
        axes.text(
            0.5,
            -0.04,
            label.replace(" + ", "\n"),
            transform=axes.transAxes,
            ha="center",
            va="top",
            fontsize=8,
        )
    if count < len(labels):
        title += f"; the first {count} of {len(labels)} images"
    figure.suptitle(title, size=9)
    return figure
