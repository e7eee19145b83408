"""Boxes, masks and labels drawn over an image; pictures put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from ..errors import say
from .run_lengths import segmentation_mask

_READABLE = 480  # the least longer side of a picture, pixels
_OPACITY = 0.45  # of masks
# Of Linux, macOS and Windows.
_FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "arial.ttf")
# Easy to tell apart on dark and light images, and bright enough for black text.
_COLOURS = (
    *("ff5252", "40c4ff", "ffd600", "69f05a", "e060ff"),
    *("ff7800", "1de9b6", "828cff", "ff80ab", "bcc85a"),
)


def class_colour(label: int) -> tuple[int, ...]:
    """The colour of a class, the same in every picture; RGB."""
    if label < len(_COLOURS):
        return ImageColor.getrgb(f"#{_COLOURS[label]}")
    # Steps of the golden ratio keep neighbouring hues apart and repeat none.
    hue, saturation = label * 222.492236 % 360, (40, 50, 60)[label % 3]
    return ImageColor.getrgb(f"hsv({hue:.3f}, {saturation}%, 100%)")


def draw_objects(
    image: Image.Image, boxes: Any, labels: Sequence[int], texts: Sequence[str], masks: Any = None
) -> Image.Image:
    """Draw boxes, their texts and masks over a copy of an image.

    A small image is enlarged by a whole factor to a longer side of at least 480 pixels, so that
    lines are thin and texts readable beside objects of a few pixels.

    Args:
        image: RGB, H x W pixels.
        boxes: ``[N, 4]``, left, top, right, bottom in pixels; may reach beyond the image.
        labels: N numbers of classes, which give the colours.
        texts: N texts, written above the boxes.
        masks: N bool arrays ``[H, W]``, or None.

    Raises:
        ValueError: the numbers of boxes, labels, texts and masks differ, or a box is not finite.
    """
    scale = max(1, -(-_READABLE // max(image.size)))
    picture = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    line = max(1, round(max(picture.size) / 320))
    corners = scale * np.asarray(boxes, np.float64).reshape(-1, 4)
    if not np.isfinite(corners).all():
        raise ValueError("a box has a value that is not finite")
    corners[:, 2:] = np.maximum(corners[:, 2:] - 1, corners[:, :2])  # the last pixel inside
    # Edges outside stay outside, but close: Pillow counts in 32 bits.
    corners = np.rint(corners).clip(-2 * line, np.tile(picture.size, 2) + 2 * line).astype(int)
    colours = [class_colour(int(label)) for label in labels]

    if masks is not None:
        for mask, colour in zip(masks, colours, strict=True):
            veil = Image.fromarray((np.asarray(mask) * round(255 * _OPACITY)).astype(np.uint8))
            picture.paste(colour, mask=veil.resize(picture.size, Image.Resampling.NEAREST))
    draw = ImageDraw.Draw(picture)
    for box, colour in zip(corners.tolist(), colours, strict=True):
        draw.rectangle(box, outline=colour, width=line)
    font = _font(picture, texts)
    height = _height(font)
    taken: list[Any] = []  # left, top, right of the texts
    for (left, top, right, bottom), colour, text in zip(
        corners.tolist(), colours, texts, strict=True
    ):
        if right < 0 or bottom < 0 or left >= picture.width or top >= picture.height:
            continue
        width = int(font.getlength(text)) + 4
        x = max(0, min(left, picture.width - width))
        y = first = max(0, min(top - height, picture.height - height))
        while any(x < x2 and x + width > x1 and abs(y - y1) < height for x1, y1, x2 in taken):
            y += height
            if y + height > picture.height:  # no free place below
                y = first
                break
        taken.append((x, y, x + width))
        draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
        draw.text((x + 2, y + 1), text, fill=(0, 0, 0), font=font)
    return picture


def draw_annotations(
    image: Image.Image, annotations: Sequence[Mapping[str, Any]], classes: Mapping[int, str]
) -> Image.Image:
    """Draw the annotations of one image in COCO's format, as :func:`draw_objects` does.

    Masks are drawn if all annotations have one. A crowd region has ``(crowd)`` behind its name.

    Args:
        image: RGB.
        annotations: those of this image.
        classes: the names of the categories by their ids, in the order of the detector's labels.

    Raises:
        ValueError: a mask is not of the image's size, or an annotation's category is unknown.
    """
    boxes = np.array([each["bbox"] for each in annotations], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = None
    if all(each.get("segmentation") for each in annotations):
        size = image.height, image.width
        masks = [segmentation_mask(each["segmentation"], *size) for each in annotations]
    labels = [list(classes).index(each["category_id"]) for each in annotations]
    texts = [
        classes[each["category_id"]] + (" (crowd)" if each.get("iscrowd") else "")
        for each in annotations
    ]
    return draw_objects(image, boxes, labels, texts, masks)


def side_by_side(
    left: Image.Image, right: Image.Image, titles: tuple[str, str], gap: int = 8
) -> Image.Image:
    """Two pictures in one row on white, each below its title."""
    font = _font(left, titles)
    bar = _height(font) + 4
    starts = 0, max(left.width, int(font.getlength(titles[0]))) + gap
    width = starts[1] + max(right.width, int(font.getlength(titles[1])))
    sheet = Image.new("RGB", (width, bar + max(left.height, right.height)), "white")
    draw = ImageDraw.Draw(sheet)
    for picture, title, x in zip((left, right), titles, starts, strict=True):
        sheet.paste(picture, (x, bar))
        draw.text((x, 2), title, fill="black", font=font)
    return sheet


def contact_sheet(images: Sequence[Image.Image], columns: int = 2, gap: int = 8) -> Image.Image:
    """Pictures in rows on white; every place has the size of the largest."""
    width = max(image.width for image in images) + gap
    height = max(image.height for image in images) + gap
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for place, image in enumerate(images):
        sheet.paste(image, (gap + place % columns * width, gap + place // columns * height))
    return sheet


def _font(picture: Image.Image, texts: Sequence[str]) -> Any:
    """A font that has the texts' characters, in a size that is readable in a picture."""
    size = max(12, min(32, max(picture.size) // 36))
    others = {each for each in "".join(texts) if not (each.isascii() or each.isspace())}
    return _with_all(size, frozenset(others))


@lru_cache  # bounded: pictures of many classes have many sets
def _with_all(size: int, characters: frozenset[str]) -> Any:
    """Pillow's own font, which has ASCII alone, or one of the system's that has the characters."""
    own = ImageFont.load_default(size)
    for name in (None, *_FONTS):
        with suppress(OSError):  # the system does not have it
            font = ImageFont.truetype(name, size) if name else own
            unknown = bytes(font.getmask("\U0010fffd"))  # of no script
            if all(bytes(font.getmask(each)) != unknown for each in characters):
                return font
    _say_squares(", ".join(_FONTS))
    return own


@cache
def _say_squares(fonts: str) -> None:
    say(f"pictures: names are drawn with squares: their characters are in none of {fonts}")


def _height(font: Any) -> int:
    """The height of every line of text, with and without descenders, pixels."""
    return int(font.getbbox("Ag")[3]) + 3
