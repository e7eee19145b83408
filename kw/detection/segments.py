"""Masks of annotations, from every form that COCO's format knows; for pictures and small sets.

Evaluation counts on compressed run lengths and decodes none (:mod:`kw.detection.run_lengths`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .run_lengths import decompress

__all__ = ["segmentation_mask"]


def segmentation_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The mask of an annotation.

    Args:
        segmentation: polygons, lists ``[x, y, x, y, ...]`` in pixels; or run lengths
            ``{"size": [height, width], "counts": list, str or bytes}``.
        height: of the image, pixels.
        width: of the image, pixels.

    Returns:
        bool ``[height, width]``; along polygons it may differ from pycocotools' by a pixel.

    Raises:
        ValueError: the run lengths are not those of such an image, or it is neither form.
    """
    if isinstance(segmentation, Mapping):
        return _decode(segmentation, height, width)
    if not isinstance(segmentation, (list, tuple)):
        raise ValueError(f"a segmentation is a list or a mapping, not {segmentation!r}")
    image = Image.new("1", (width, height))
    draw = ImageDraw.Draw(image)
    for polygon in segmentation:
        # COCO measures from the corner of the first pixel, Pillow from its centre.
        corners = np.asarray(polygon, np.float64).reshape(-1, 2) - 0.5
        if len(corners) > 2:
            draw.polygon([tuple(corner) for corner in corners.tolist()], fill=1)
    return np.array(image)


def _decode(segmentation: Mapping[str, Any], height: int, width: int) -> np.ndarray:
    counts = segmentation["counts"]
    if isinstance(counts, bytes):
        counts = counts.decode("ascii")
    if isinstance(counts, str):
        counts = decompress(counts)
    size = list(segmentation["size"])
    if size != [height, width] or counts is None or sum(counts) != height * width:
        total = "unreadable counts" if counts is None else f"counts of {sum(counts)} pixels"
        raise ValueError(
            f"run lengths of size {size} with {total} are not those of an image of "
            f"height {height} and width {width}"
        )
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, counts).reshape(width, height).T
