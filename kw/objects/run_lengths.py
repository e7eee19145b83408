"""Masks in COCO's forms: run lengths, compressed or not, and polygons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

_PIXELS = 2**25  # of masks that are compressed at a time


def encode_masks(masks: Any) -> list[dict[str, Any]]:
    """Compress masks to run lengths, a few hundred bytes each.

    Args:
        masks: ``[N, H, W]``, tensor on any device or array; nonzero is inside.

    Returns:
        N of ``{"size": [H, W], "counts": bytes}``.
    """
    mask_api = import_evaluator().mask
    if not isinstance(masks, torch.Tensor):
        masks = torch.as_tensor(np.asarray(masks))
    if masks.ndim != 3:
        raise ValueError(f"masks must be [N, H, W], not {list(masks.shape)}")
    if masks.shape[0] == 0:
        return []
    # A few at a time: a hundred masks of a photo would need gigabytes.
    runs: list[dict[str, Any]] = []
    for part in masks.split(max(1, _PIXELS // masks[0].numel())):
        # Run lengths go down columns. The device transposes faster than the CPU.
        columns = (part != 0).to(torch.uint8).transpose(1, 2).contiguous().cpu().numpy()
        runs += mask_api.encode(columns.T)  # [N, W, H] -> [H, W, N]
    return runs


def mask_areas(runs: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers of pixels inside masks of :func:`encode_masks`."""
    return [int(area) for area in import_evaluator().mask.area(list(runs))] if runs else []


def decompress(text: str) -> list[int] | None:
    """The run lengths of COCO's compressed form, or None if the text is not valid.

    A number is written in groups of five bits, the lowest first. Each group is a character, from
    "0" on; a sixth bit is set if another group follows. From the fourth number on, the difference
    to the number two places before is written.
    """
    counts: list[int] = []
    value, shift = 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value, shift = 0, 0
    return None if shift else counts


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
        ValueError: it is neither form, or the run lengths do not fit the image.
    """
    if isinstance(segmentation, Mapping):
        counts, size = segmentation["counts"], list(segmentation["size"])
        if isinstance(counts, bytes):
            counts = counts.decode("ascii")
        if isinstance(counts, str):
            counts = decompress(counts)
        if size != [height, width] or counts is None or sum(counts) != height * width:
            total = "unreadable counts" if counts is None else f"counts of {sum(counts)} pixels"
            raise ValueError(
                f"run lengths of size {size} with {total} are not those of an image of "
                f"height {height} and width {width}"
            )
        inside = np.arange(len(counts)) % 2 == 1
        return np.repeat(inside, counts).reshape(width, height).T
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


def import_evaluator() -> Any:
    """faster_coco_eval.

    Raises:
        ImportError: it is not installed; says how to install it.
    """
    try:
        import faster_coco_eval
    except ImportError as error:
        raise ImportError(
            "COCO's figures are computed by faster-coco-eval, which is not installed: "
            "pip install 'kernelwarehouse[detection]'"
        ) from error
    return faster_coco_eval
