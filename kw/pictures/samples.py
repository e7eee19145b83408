"""Which images pictures are made of: few, the same every time, read in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data import BadImageError, DataError, ImageFolder
from ..data.loader import collate


def spaced(total: int, count: int) -> list[int]:
    """At most ``count`` of ``total`` places, evenly over all: of every class, since files are in
    the order of classes."""
    count = min(total, count)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def few_of_each(labels: Any, classes: int, count: int) -> list[int]:
    """Places of about ``count`` images in all, equally many of each of the first classes.

    Args:
        labels: integers, one an image.
        classes: how many classes, from label 0.
        count: images in all; at least two a class, where it has as many.

    Raises:
        DataError: images have several classes each.
    """
    if np.ndim(labels) == 2:
        raise DataError("images have several classes each: nothing is an effect of one of them")
    each = max(count // classes, 2)
    found = []
    for label in range(classes):
        places = np.flatnonzero(np.asarray(labels) == label)
        found += [int(places[i]) for i in spaced(len(places), each)]
    return found


def read_images(dataset: ImageFolder, indices: Sequence[int]) -> dict[str, Any]:
    """A batch of images, as loaders make them; those that cannot be read are left out.

    Raises:
        DataError: none can be read.
    """
    samples = []
    for index in indices:
        try:
            samples.append(dataset.read(index, (0, index)))
        except BadImageError:
            continue
    if not samples:
        raise DataError(f"{dataset.folder}: none of {len(indices)} images can be read")
    return collate(samples)
