"""What pictures begin and end with: RGB from any image, fonts, sheets of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["contact_sheet", "load_font", "side_by_side", "text_size", "to_rgb"]

_GROUND = (255, 255, 255)
_INK = (30, 30, 30)


def to_rgb(image: Any) -> Image.Image:
    """A copy of an image, in RGB.

    Args:
        image: of Pillow, any mode; or uint8 ``[H, W]``, ``[H, W, 1]`` or ``[H, W, 3]`` (RGB).

    Raises:
        ValueError: an array of another shape or type.
    """
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):  # more than 8 bits: Pillow would clip them
            values = np.asarray(image, np.float64)
            low, high = values.min(), values.max()
            image = Image.fromarray(((values - low) * (255 / max(high - low, 1e-9))).astype("u1"))
        return image.convert("RGB").copy()
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype != np.uint8 or not (
        array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    ):
        raise ValueError(
            f"an image is uint8 [H, W], [H, W, 1] or [H, W, 3], not {array.dtype} "
            f"{list(array.shape)}"
        )
    return Image.fromarray(array).convert("RGB")


def side_by_side(
    left: Image.Image,
    right: Image.Image,
    titles: tuple[str, str] = ("ground truth", "prediction"),
    gap: int = 8,
) -> Image.Image:
    """Two pictures in one row, each below its title; both keep their size.

    Args:
        left: a picture.
        right: a picture.
        titles: what stands above them; empty strings leave no room.
        gap: between them, pixels.

    Returns:
        An RGB image on white.
    """
    font = load_font(max(12, min(32, round(max(*left.size, *right.size) / 30))))
    bar = max(text_size(font, title)[1] for title in titles) + 6 if any(titles) else 0
    widths = [
        max(picture.width, text_size(font, title)[0] if title else 0)
        for picture, title in zip((left, right), titles, strict=True)
    ]
    sheet = Image.new("RGB", (sum(widths) + gap, bar + max(left.height, right.height)), _GROUND)
    draw = ImageDraw.Draw(sheet)
    for picture, title, x in zip((left, right), titles, (0, widths[0] + gap), strict=True):
        sheet.paste(picture.convert("RGB"), (x, bar))
        draw.text((x, 2), title, fill=_INK, font=font)
    return sheet


def contact_sheet(images: Sequence[Image.Image], columns: int = 4, gap: int = 8) -> Image.Image:
    """Pictures in rows, in their order; every cell has the size of the largest.

    Args:
        images: pictures, at least one.
        columns: of the sheet; fewer where there are fewer pictures.
        gap: around them, pixels.

    Returns:
        An RGB image on white.

    Raises:
        ValueError: there is no picture or no column.
    """
    if not images or columns < 1:
        raise ValueError(f"a sheet needs pictures and columns, not {len(images)} and {columns}")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width = max(image.width for image in images) + gap
    height = max(image.height for image in images) + gap
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), _GROUND)
    for place, image in enumerate(images):
        corner = (gap + place % columns * width, gap + place // columns * height)
        sheet.paste(image.convert("RGB"), corner)
    return sheet


@lru_cache
def load_font(size: int) -> Any:
    """Pillow's own font in this size, pixels; its only size where Pillow lacks FreeType."""
    try:
        return ImageFont.load_default(size=size)
    except (ImportError, OSError, TypeError):  # no FreeType; TypeError: Pillow 10.0
        return ImageFont.load_default()


def text_size(font: Any, text: str) -> tuple[int, int]:
    """Width and height that a text takes when it is drawn at a point, pixels."""
    _, _, right, bottom = font.getbbox(text)
    # One height for all texts, with and without descenders.
    return int(right + 1), int(max(bottom, font.getbbox("Ag")[3]) + 1)
