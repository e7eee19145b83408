"""Training batches as the network sees them, with the mixture of labels below every image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .style import new_figure, show_image, wrap_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 32
"""Images of a batch that are drawn."""


def label_mixture(
    target: Tensor, classes: Sequence[str], smoothing: float = 0.0, several: bool = False
) -> str:
    """A target in words: ``"cat"``, or ``"cat 0.62 + dog 0.38"``, the larger part first.

    Args:
        target: a label, int64 ``[]``, or probabilities ``[C]``.
        classes: their names.
        smoothing: label smoothing; what it gives to all classes alike is left out.
        several: each class has a probability of its own.
    """
    if target.ndim == 0:
        return classes[int(target)]
    floor = smoothing / (2 if several else len(classes))
    parts = [(float(p), classes[i]) for i, p in enumerate(target) if float(p) > floor + 1e-6]
    parts.sort(key=lambda part: -part[0])
    if len(parts) == 1 and not smoothing:
        return parts[0][1]
    return " + ".join(f"{name} {share:.2f}" for share, name in parts)


def draw_batch(pictures: Any, labels: Sequence[str], title: str) -> Figure:
    """Images, uint8 ``[B, S, S, 3]``, above their labels, in rows of eight; the first of many."""
    count = min(len(labels), MOST)
    columns = min(count, 8)
    rows = math.ceil(count / columns)
    side = min(9 / columns, 3.6)
    if count < len(labels):
        title += f"; the first {count} of {len(labels)} images"
    below = [wrap_label(label.replace(" + ", "\n"), side) for label in labels[:count]]
    lines = max(text.count("\n") for text in below) + 1
    figure = new_figure(side * columns, 0.5 + rows * (side + 0.15 * lines), title)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid[count:]:
        axes.set_axis_off()
    for axes, picture, text in zip(grid, pictures, below, strict=False):
        show_image(axes, picture, below=text)
    return figure
