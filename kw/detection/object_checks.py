"""Checks of boxes and masks, in large batches: a million objects take seconds.

Coordinates are in pixels, with the image from (0, 0) to (width, height).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from kw.detection.findings import Report
from kw.objects.run_lengths import decompress, import_evaluator

# COCO's own boxes and polygons exceed the border by fractions of a pixel.
_BORDER = 1.0
_NUMBERS = {int, float}
_BATCH = 100_000  # objects whose polygons are copied at a time

Sizes = Mapping[int, tuple[int, int]]
"""image id -> width and height"""
_Shape = tuple[Mapping[str, Any], list[list[float]]]  # an object and its polygons


def check_boxes(objects: Sequence[Mapping[str, Any]], sizes: Sizes, report: Report) -> None:
    """Check boxes, ``[left, top, width, height]``, and whether areas fit them."""
    good = []
    for each in objects:
        if is_box(each["bbox"]):
            good.append(each)
        else:
            report.add("box-format", _say(each, f"bbox {_short(each['bbox'])}"))
    if not good:
        return
    boxes = np.array([each["bbox"] for each in good], dtype=np.float64)
    limits = np.array([sizes[each["image_id"]] for each in good], dtype=np.float64)
    areas = np.array([each["area"] for each in good], dtype=np.float64)
    start, extent = boxes[:, :2], boxes[:, 2:]
    end = start + extent

    negative = (extent < 0).any(1)
    empty = ~negative & (extent == 0).any(1)
    solid = ~negative & ~empty
    outside = solid & ((end <= 0) | (start >= limits)).any(1)
    partly = solid & ~outside & ((start < -_BORDER) | (end > limits + _BORDER)).any(1)
    # COCO itself gives thin objects an area of 0; their boxes are reported as empty.
    area = solid & ~((areas > 0) & (areas <= 1.1 * extent.prod(1) + 10))
    for kind, where in (
        ("box-negative", negative),
        ("box-empty", empty),
        ("box-outside", outside),
        ("box-partly-outside", partly),
    ):
        for i in np.flatnonzero(where).tolist():
            width, height = sizes[good[i]["image_id"]]
            report.add(kind, _say(good[i], f"bbox {good[i]['bbox']}, image {width} x {height}"))
    for i in np.flatnonzero(area).tolist():
        report.add("area", _say(good[i], f"area {areas[i]:g}, bbox {good[i]['bbox']}"))

    small = ((start >= 0) & (end <= 1.001)).all(1) & (limits > 2).all(1)
    if small.mean() > 0.99 and (extent < 1).any():
        report.add("box-fractions", f"{small.sum():,} of {len(good):,} boxes end before (1, 1)")

    # Read as corners nearly all boxes fit; read as left, top, width, height many do not.
    fit = ((extent >= start) & (extent <= limits + _BORDER) & (start >= -_BORDER)).all(1)
    beyond = (end > limits + _BORDER).any(1)
    if len(good) >= 10 and fit.mean() > 0.99 and beyond.mean() > 0.25:
        report.add(
            "box-corners",
            f"{beyond.sum():,} of {len(good):,} boxes end outside of their image, but "
            f"{fit.sum():,} fit when their last two numbers are taken for right and bottom",
        )


def check_masks(objects: Sequence[Mapping[str, Any]], sizes: Sizes, report: Report) -> None:
    """Check ``segmentation``: polygons ``[[x, y, x, y, ...], ...]`` or run lengths."""
    shapes: list[_Shape] = []
    for each in objects:
        mask = each.get("segmentation")
        if not mask:
            report.add("mask-missing", _say(each, f"segmentation {_short(mask)}"))
        elif isinstance(mask, dict):
            _check_runs(each, mask, sizes[each["image_id"]], report)
        elif isinstance(mask, list) and all(isinstance(polygon, list) for polygon in mask):
            polygons = _usable(each, mask, report)
            if polygons:
                shapes.append((each, polygons))
        else:
            report.add("mask-format", _say(each, f"segmentation {_short(mask)}"))
        if len(shapes) == _BATCH:
            _check_polygons(shapes, sizes, report)
            shapes = []
    if shapes:
        _check_polygons(shapes, sizes, report)


def _usable(each: Mapping[str, Any], mask: list[list[float]], report: Report) -> list[list[float]]:
    """The polygons of an object that can be used."""
    usable, short = [], []
    for polygon in mask:
        if not _are_finite(polygon):
            report.add("polygon-broken", _say(each, "a coordinate that is not a finite number"))
        elif len(polygon) % 2:
            report.add("polygon-broken", _say(each, f"{len(polygon)} coordinates, an odd number"))
        elif len(polygon) < 6:
            short.append(polygon)
        else:
            usable.append(polygon)
    for polygon in short:
        # Readers leave it out; without other polygons the object then has no mask.
        report.add(
            "polygon-short" if usable else "polygon-broken",
            _say(each, f"{len(polygon)} coordinates, expected 6 or more"),
        )
    return usable


def _check_polygons(shapes: Sequence[_Shape], sizes: Sizes, report: Report) -> None:
    """Check positions and areas of polygons."""
    polygons = [polygon for _, those in shapes for polygon in those]
    of_shape = np.cumsum([0] + [len(those) for _, those in shapes])[:-1]  # its first polygon
    lengths = np.array([len(polygon) // 2 for polygon in polygons])
    first = np.cumsum(lengths) - lengths  # its first point
    points = np.fromiter(
        chain.from_iterable(polygons), dtype=np.float64, count=2 * int(lengths.sum())
    ).reshape(-1, 2)
    following = np.arange(1, len(points) + 1)
    following[first + lengths - 1] = first
    # Relative to the polygon's first point, to keep the precision far from the origin.
    local = points - np.repeat(points[first], lengths, axis=0)
    cross = local[:, 0] * local[following, 1] - local[following, 0] * local[:, 1]
    areas = np.abs(np.add.reduceat(cross, first)) / 2
    low = np.minimum.reduceat(np.minimum.reduceat(points, first), of_shape)
    high = np.maximum.reduceat(np.maximum.reduceat(points, first), of_shape)

    limits = np.array([sizes[each["image_id"]] for each, _ in shapes], dtype=np.float64)
    outside = ((high <= 0) | (low >= limits)).any(1)
    for i in np.flatnonzero(outside).tolist():
        each = shapes[i][0]
        (left, top), (right, bottom) = low[i], high[i]
        width, height = sizes[each["image_id"]]
        what = f"from ({left:g}, {top:g}) to ({right:g}, {bottom:g}), image {width} x {height}"
        report.add("mask-outside", _say(each, what))

    _compare_boxes([each for each, _ in shapes], np.concatenate([low, high], 1), report)

    # Polygons may overlap and annotators round, so only large differences are reported.
    total = np.add.reduceat(areas, of_shape)
    stated = np.array([each["area"] for each, _ in shapes], dtype=np.float64)
    off = (stated > 0) & ((stated > 2 * total + 50) | (total > 2 * stated + 50))
    for i in np.flatnonzero(off).tolist():
        report.add("area", _say(shapes[i][0], f"area {stated[i]:g}, polygons {total[i]:g}"))


def _check_runs(
    each: Mapping[str, Any], mask: Mapping[str, Any], size: tuple[int, int], report: Report
) -> None:
    width, height = size
    counts = mask.get("counts")
    if not isinstance(counts, (str, list)) or "size" not in mask:
        report.add("mask-format", _say(each, f"run lengths with {_short(dict(mask))}"))
        return
    if mask["size"] != [height, width]:
        report.add(
            "run-length-size",
            _say(each, f"size {_short(mask['size'])}, image [{height}, {width}] (height, width)"),
        )
        return
    if isinstance(counts, str):
        counts = decompress(counts)
    if counts is None or not all(type(count) is int and count >= 0 for count in counts):
        report.add("run-length-broken", _say(each, "counts are not run lengths"))
    elif sum(counts) != width * height:
        report.add(
            "run-length-broken",
            _say(each, f"{sum(counts):,} pixels, the image has {width * height:,}"),
        )
    else:
        mask_api = import_evaluator().mask
        as_text = isinstance(mask["counts"], str)
        runs = mask if as_text else mask_api.frPyObjects(mask, height, width)
        left, top, wide, high = mask_api.toBbox(runs)
        if wide:
            _compare_boxes([each], np.array([[left, top, left + wide, top + high]]), report)


def _compare_boxes(
    objects: Sequence[Mapping[str, Any]], extents: np.ndarray, report: Report
) -> None:
    """Compare N boxes with the extents ``[N, 4]`` of their masks: left, top, right, bottom."""
    pairs = [
        i
        for i, each in enumerate(objects)
        if is_box(each["bbox"]) and min(each["bbox"][2:]) > 0  # others are reported as boxes
    ]
    boxes = np.array([objects[i]["bbox"] for i in pairs], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = extents[pairs]
    shared = np.minimum(boxes[:, 2:], masks[:, 2:]) - np.maximum(boxes[:, :2], masks[:, :2])
    apart = (shared < -_BORDER).any(1)
    # A pixel is added on each side, because thin objects may be rounded to nothing.
    both = (shared + 2 * _BORDER).clip(0).prod(1)
    sides = [ends[:, 2:] - ends[:, :2] + 2 * _BORDER for ends in (boxes, masks)]
    either = sides[0].prod(1) + sides[1].prod(1) - both
    for kind, where in (("box-mask-apart", apart), ("box-mask", ~apart & (both < 0.5 * either))):
        for i in np.flatnonzero(where).tolist():
            ends = ", ".join(f"{value:g}" for value in masks[i])
            box = objects[pairs[i]]["bbox"]
            what = f"bbox {box} (left, top, width, height), its mask from corner to corner: {ends}"
            report.add(kind, _say(objects[pairs[i]], what))


def is_box(box: Any) -> bool:
    """Whether it is a list of four finite numbers."""
    return type(box) is list and len(box) == 4 and _are_finite(box)


def _are_finite(values: Sequence[Any]) -> bool:
    """Whether they are numbers that fit in 64 bits."""
    try:
        return set(map(type, values)) <= _NUMBERS and math.isfinite(float(sum(values)))
    except OverflowError:
        return False


def _say(each: Mapping[str, Any], what: str) -> str:
    return f"annotation {each['id']} of image {each['image_id']}: {what}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
