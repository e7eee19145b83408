"""Pictures of detections and of the truth, with Pillow alone.

Boxes are in pixels of the image that is given, measured from its upper left corner. Small images
are enlarged by a whole factor before anything is drawn, so that lines are thin and labels readable
beside objects of a few pixels.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .segments import segmentation_mask
from .sheets import contact_sheet, load_font, side_by_side, text_size, to_rgb

__all__ = [
    "class_colour",
    "contact_sheet",
    "draw_detections",
    "draw_ground_truth",
    "side_by_side",
    "to_rgb",
]

Colour = tuple[int, int, int]

# The longer side that an image is enlarged to, at least, pixels.
_READABLE = 480
_OPACITY = 0.45
# Told apart at a glance, on dark and on light ground; further classes go around the colour circle.
_COLOURS: tuple[Colour, ...] = (
    (255, 82, 82),
    (64, 196, 255),
    (255, 214, 0),
    (105, 240, 90),
    (224, 96, 255),
    (255, 120, 0),
    (29, 233, 182),
    (130, 140, 255),
    (255, 128, 171),
    (188, 200, 90),
)


def class_colour(label: int) -> Colour:
    """The colour of a class, the same in every picture; RGB."""
    if 0 <= label < len(_COLOURS):
        return _COLOURS[label]
    # Golden ratio: neighbours are far apart, and no hue comes twice.
    hue = label * 0.6180339887 % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.55, 0.75, 0.95)[label % 3], 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(
    image: Any,
    boxes: Any,
    labels: Any,
    scores: Any = None,
    masks: Any = None,
    classes: Sequence[str] | None = None,
    score_threshold: float = 0.0,
    scale: int | None = None,
    crowd: Any = None,
) -> Image.Image:
    """Draw boxes, names and masks over a copy of an image.

    Args:
        image: see :func:`to_rgb`; H x W pixels.
        boxes: ``[N, 4]``, left, top, right, bottom in pixels; may reach beyond the image.
        labels: places in ``classes``, integers ``[N]``; they choose the colours.
        scores: ``[N]``, 0 to 1, written behind the names.
        masks: ``[N, H, W]``, nonzero is inside.
        classes: names; without them the labels are written.
        score_threshold: detections below are left out, where there are scores.
        scale: whole factor to enlarge the image by; default: the least that gives the longer
            side 480 pixels.
        crowd: ``[N]``, which of them are regions of many objects: dashed and hatched.

    Returns:
        A new RGB image, ``scale`` times as large.

    Raises:
        ValueError: the numbers of boxes, labels, scores and masks differ, masks are not of the
            image's size, or a box has a value that is not finite.
    """
    picture = to_rgb(image)
    width, height = picture.size
    box_rows = np.asarray(boxes, np.float64).reshape(-1, 4)
    count = len(box_rows)
    label_rows = _rows("labels", labels, count).astype(int)
    score_rows = None if scores is None else _rows("scores", scores, count)
    crowd_rows = np.zeros(count, bool) if crowd is None else _rows("crowd", crowd, count) != 0
    mask_rows = None if masks is None else _rows("masks", masks, count) != 0
    if mask_rows is not None and count and mask_rows.shape[1:] != (height, width):
        raise ValueError(f"masks are {list(mask_rows.shape)} for an image of {height} x {width}")
    if not np.isfinite(box_rows).all():
        raise ValueError("a box has a value that is not finite")
    if scale is None:
        scale = max(1, math.ceil(_READABLE / max(width, height)))
    picture = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)

    kept = np.arange(count)
    if score_rows is not None:
        kept = kept[score_rows >= score_threshold]
    # Large ones first: what lies on them stays visible.
    areas = (box_rows[:, 2:] - box_rows[:, :2]).clip(0).prod(1)
    kept = kept[np.argsort(-areas[kept], kind="stable")]
    line = max(1, round(max(picture.size) / 320))
    if mask_rows is not None:
        pixels = np.array(picture)
        for i in kept:
            colour = class_colour(int(label_rows[i]))
            _paint(pixels, mask_rows[i], colour, scale, line, bool(crowd_rows[i]))
        picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    corners = [_on_picture(box_rows[i] * scale, picture.size, line) for i in kept]
    for i, corner in zip(kept, corners, strict=True):
        _frame(draw, corner, class_colour(int(label_rows[i])), line, bool(crowd_rows[i]))
    taken: list[tuple[int, int, int, int]] = []
    for i, corner in zip(kept, corners, strict=True):
        label = int(label_rows[i])
        text = str(label) if classes is None else classes[label]
        if score_rows is not None:
            text += f" {score_rows[i]:.2f}"
        _write(draw, text, corner, class_colour(label), picture.size, taken)
    return picture


def draw_ground_truth(
    image: Any,
    annotations: Sequence[Mapping[str, Any]],
    categories: Sequence[Mapping[str, Any]],
    masks: bool = True,
    scale: int | None = None,
    classes: Sequence[str] | None = None,
) -> Image.Image:
    """Draw the annotations of one image in COCO's format; crowds are dashed and hatched.

    Args:
        image: see :func:`to_rgb`.
        annotations: those of this image.
        categories: those of the file.
        masks: draw them, where all annotations have one.
        scale: see :func:`draw_detections`.
        classes: names of the categories in the order of a detector's labels, whose colours they
            get; default: in the order of their ids.

    Returns:
        A new RGB image.

    Raises:
        ValueError: a mask is not of the image's size.
        KeyError: an annotation's category is not among ``categories``.
    """
    picture = to_rgb(image)
    ordered = sorted(categories, key=lambda category: category["id"])
    names = [str(each["name"]) for each in ordered] if classes is None else list(classes)
    places = {each["id"]: names.index(str(each["name"])) for each in ordered}
    boxes = np.array([entry["bbox"] for entry in annotations], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    shapes = None
    if masks and annotations and all(entry.get("segmentation") for entry in annotations):
        size = picture.height, picture.width
        shapes = [segmentation_mask(entry["segmentation"], *size) for entry in annotations]
    return draw_detections(
        picture,
        boxes,
        [places[entry["category_id"]] for entry in annotations],
        masks=shapes,
        classes=names,
        scale=scale,
        crowd=[bool(entry.get("iscrowd", 0)) for entry in annotations],
    )


def _rows(name: str, values: Any, count: int) -> np.ndarray:
    rows = np.asarray(values)
    if rows.ndim == 0 or len(rows) != count:
        raise ValueError(f"{name} are {list(rows.shape)} for {count} boxes")
    return rows


def _on_picture(box: np.ndarray, size: tuple[int, int], line: int) -> tuple[int, int, int, int]:
    """Corners in whole pixels, both inside; edges beyond the picture stay beyond it.

    They are moved close to it, because Pillow counts in 32 bits.
    """
    left, top, right, bottom = box
    low, (wide, high) = -2 * line, (size[0] + 2 * line, size[1] + 2 * line)
    x1, x2 = np.rint([left, max(right - 1, left)]).clip(low, wide).astype(int).tolist()
    y1, y2 = np.rint([top, max(bottom - 1, top)]).clip(low, high).astype(int).tolist()
    return x1, y1, x2, y2


def _paint(
    pixels: np.ndarray, mask: np.ndarray, colour: Colour, scale: int, line: int, hatched: bool
) -> None:
    """A translucent mask with an outline inside its edge, into ``pixels``."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return
    top, left = rows[0], columns[0]
    part = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    part = part.repeat(scale, 0).repeat(scale, 1)
    inner = np.pad(part, 1)
    for _ in range(line):  # one pixel narrower each time
        inner[1:-1, 1:-1] &= inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
    edge = part & ~inner[1:-1, 1:-1]
    if hatched:
        period = 6 * line
        stripes = np.add.outer(np.arange(part.shape[0]), np.arange(part.shape[1])) % period < line
        part = part & (stripes | edge)
    window = pixels[top * scale :, left * scale :][: part.shape[0], : part.shape[1]]
    mixed = window[part] * (1 - _OPACITY) + np.array(colour) * _OPACITY
    window[part] = mixed.astype(np.uint8)
    window[edge] = colour


def _frame(
    draw: ImageDraw.ImageDraw,
    corners: tuple[int, int, int, int],
    colour: Colour,
    line: int,
    dashed: bool,
) -> None:
    left, top, right, bottom = corners
    if not dashed:
        draw.rectangle(corners, outline=colour, width=line)
        return
    dash = 4 * line
    for x in range(left, right + 1, 2 * dash):
        end = min(x + dash - 1, right)
        draw.rectangle((x, top, end, min(top + line - 1, bottom)), fill=colour)
        draw.rectangle((x, max(bottom - line + 1, top), end, bottom), fill=colour)
    for y in range(top, bottom + 1, 2 * dash):
        end = min(y + dash - 1, bottom)
        draw.rectangle((left, y, min(left + line - 1, right), end), fill=colour)
        draw.rectangle((max(right - line + 1, left), y, right, end), fill=colour)


def _write(
    draw: ImageDraw.ImageDraw,
    text: str,
    corners: tuple[int, int, int, int],
    colour: Colour,
    size: tuple[int, int],
    taken: list[tuple[int, int, int, int]],
) -> None:
    """A label above its box, or where nothing is written yet; none for boxes out of sight."""
    left, top, right, bottom = corners
    if right < 0 or bottom < 0 or left >= size[0] or top >= size[1]:
        return
    font = load_font(max(12, min(32, round(max(size) / 36))))
    wide, high = text_size(font, text)
    wide, high = wide + 4, high + 2
    right_side = max(right - wide + 1, 0)
    places = [(left, top - high), (left, bottom + 1), (right_side, top - high), (left, top)]
    fitted = []
    for x, y in places:
        x, y = min(max(x, 0), max(size[0] - wide, 0)), min(max(y, 0), max(size[1] - high, 0))
        fitted.append((x, y, x + wide, y + high))
    best = min(fitted, key=lambda place: sum(_overlap(place, other) for other in taken))
    taken.append(best)
    draw.rectangle((best[0], best[1], best[2] - 1, best[3] - 1), fill=colour)
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 128
    ink = (0, 0, 0) if bright else (255, 255, 255)
    draw.text((best[0] + 2, best[1] + 1), text, fill=ink, font=font)


def _overlap(first: tuple[int, int, int, int], second: tuple[int, int, int, int]) -> int:
    wide = min(first[2], second[2]) - max(first[0], second[0])
    high = min(first[3], second[3]) - max(first[1], second[1])
    return max(wide, 0) * max(high, 0)
