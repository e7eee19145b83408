"""More images a second: ``data.decoder: fast``. libjpeg-turbo decodes, torch resizes bytes.

The crop is drawn first, from the size in the header, as Pillow's path draws it under the same seed.
A picture of which the crop is eight times as large as its result or more is decoded at 1/2, 1/4 or
1/8 of its size, which costs less than all pixels. The result is written where the batch is
assembled. What Pillow has to judge is left to it: other formats, CMYK, turned pictures, damaged
files.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from kw.data.listing import Stored
from kw.data.reading import orientation_of
from kw.data.seeding import derive_seed, seeded
from kw.torch_private import resize_bytes

_COLOURS = ("RGB", "YCbCr", "Gray")
_GAP = 4  # times the size needed: less costs accuracy (docs/loading.md)

Box = tuple[int, int, int, int]
"""top, left, height and width, pixels"""


class DecodeError(ValueError):
    """The decoder found damage that the header does not show."""


class Jpeg:
    """A JPEG file, not yet decoded; ``size`` is its width and height in pixels."""

    def __init__(self, data: bytes | memoryview, size: tuple[int, int]) -> None:
        self._data, self.size = data, size

    def part(self, box: Box, least: tuple[int, int]) -> np.ndarray:
        """A part of the picture as uint8 ``[h, w, 3]``.

        Args:
            box: of the whole.
            least: height and width that are needed: where the part has eight times as much or more,
                it may come smaller, but with four times as much at least, but for rounding.

        Raises:
            DecodeError: the file is damaged.
        """
        import simplejpeg

        width, height = self.size
        top, left, rows, columns = box
        factor = min(rows / least[0], columns / least[1]) / _GAP
        halvings = min(int(math.log2(factor)), 3) if factor >= 2 else 0
        scale = 2**halvings
        try:
            pixels = simplejpeg.decode_jpeg(
                self._data, min_height=-(-height // scale), min_width=-(-width // scale)
            )
        except ValueError as error:
            raise DecodeError(str(error)) from error
        # A smaller picture has its edges rounded up, beyond its last pixels.
        return pixels[
            round(top / scale) : round((top + rows) / scale),
            round(left / scale) : round((left + columns) / scale),
        ]


class Pixels:
    """Pixels that are there already, uint8 ``[h, w, 3]``."""

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels, self.size = pixels, (pixels.shape[1], pixels.shape[0])

    def part(self, box: Box, least: tuple[int, int]) -> np.ndarray:
        """All pixels of a part."""
        top, left, rows, columns = box
        return self._pixels[top : top + rows, left : left + columns]


Picture: TypeAlias = Jpeg | Pixels


def open_fast(stored: Stored, max_pixels: int, upright: bool) -> Picture | None:
    """Open pixels or a JPEG file in RGB or grey; ``None`` for what Pillow has to read or refuse."""
    if isinstance(stored, np.ndarray):
        is_taken = stored.shape[2:] == (3,) and stored.shape[0] * stored.shape[1] <= max_pixels
        return Pixels(stored) if is_taken else None
    import simplejpeg

    try:
        data = stored.read_bytes() if isinstance(stored, Path) else stored
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except (OSError, ValueError):
        return None
    if colours not in _COLOURS or width * height > max_pixels:
        return None
    if upright and _may_be_turned(data):
        return None
    return Jpeg(data, (width, height))


def _may_be_turned(data: bytes | memoryview) -> bool:
    """Whether a JPEG file's EXIF data turn it, or its segments are not as they should be."""
    at, end = 2, len(data) - 4
    while at <= end and data[at] == 0xFF and (marker := data[at + 1]) > 0xBF:
        if marker == 0xDA:  # the pixels
            return False
        content, at = at + 4, at + 2 + (data[at + 2] << 8) + data[at + 3]
        if marker == 0xE1 and bytes(data[content : content + 6]) == b"Exif\0\0":
            return orientation_of(bytes(data[content:at])) != 1
    return True


class FastRandomCrop:
    """A random part of a picture, resized, mirrored and augmented.

    Args:
        crop: timm's transform of Pillow images, which has size and ranges.
        interpolation: name of the filter.
        mirror: probability.
        policy: applied to the result, a Pillow image; draws from the global generators.
    """

    def __init__(
        self,
        crop: Any,
        interpolation: str,
        mirror: float,
        policy: Callable[[Image.Image], Tensor] | None,
    ) -> None:
        self.crop, self.size, self.interpolation = crop, crop.size, interpolation
        self.mirror, self.policy = mirror, policy

    def __call__(self, picture: Picture, key: tuple[int | str, ...], out: Tensor) -> bool:
        """Write the picture's result.

        Args:
            picture: any size.
            key: of the random choices, see :func:`~kw.data.seeding.derive_seed`.
            out: uint8 ``[3, h, w]``, is written.

        Returns:
            False where the picture is one for Pillow's path; nothing is written then.

        Raises:
            DecodeError: the file is damaged.
        """
        if self.policy is None:
            seed = derive_seed(*key)
            self._cut(picture, random.Random(seed), torch.Generator().manual_seed(seed), out)
            return True
        with seeded(*key):
            self._cut(picture, random, torch.default_generator, out)
            out.copy_(self.policy(to_pil_image(out)))
        return True

    def _cut(self, picture: Picture, draw: Any, generator: torch.Generator, out: Tensor) -> None:
        box = draw_box(picture.size, self.crop.scale, self.crop.ratio, draw)
        box = not_empty(box, picture.size)
        resize_bytes(_tensor(picture.part(box, self.size)), self.interpolation, out)
        # As torchvision draws it.
        if self.mirror > 0 and float(torch.rand(1, generator=generator)) < self.mirror:
            out.copy_(out.flip(-1))


def draw_box(
    size: tuple[int, int], scale: Sequence[float], ratio: Sequence[float], draw: Any
) -> Box:
    """A random part of a picture, as timm's ``RandomResizedCropAndInterpolation`` draws it.

    Args:
        size: width and height.
        scale: least and largest area, fractions.
        ratio: least and largest width / height.
        draw: a ``random.Random``, or the module, whose generator timm draws from.
    """
    width, height = size
    least, most = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = draw.uniform(*scale) * (width * height)
        aspect = math.exp(draw.uniform(least, most))
        wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if wide <= width and tall <= height:
            return draw.randint(0, height - tall), draw.randint(0, width - wide), tall, wide
    # None of them fits: the largest part of an allowed shape, in the middle.
    wide, tall = width, height
    if width / height < ratio[0]:
        tall = round(width / ratio[0])
    elif width / height > ratio[1]:
        wide = round(height * ratio[1])
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def not_empty(box: Box, size: tuple[int, int]) -> Box:
    """A part of one pixel at least: timm draws empty ones of pictures of a few pixels. ``size`` is
    the picture's width and height."""
    (top, left, tall, wide), (width, height) = box, size
    return min(top, height - 1), min(left, width - 1), max(tall, 1), max(wide, 1)


class FastMiddle:
    """The middle of a picture that was resized to cover a size, as timm's transforms cut it.

    Args:
        cover: height and width that the resized picture just covers.
        size: height and width of the middle.
        interpolation: name of the filter.
        long: pictures that are more than so many times as long as that are for Pillow's path.
    """

    def __init__(
        self, cover: tuple[int, int], size: tuple[int, int], interpolation: str, long: int
    ) -> None:
        self.cover, self.size = cover, size
        self.interpolation, self.long = interpolation, long

    def __call__(self, picture: Picture, key: tuple[int | str, ...], out: Tensor) -> bool:
        """As :meth:`FastRandomCrop.__call__`."""
        width, height = picture.size
        if self.cover[0] == self.cover[1]:  # as torchvision rounds
            short = self.cover[0]
            shape = (short * height // min(width, height), short * width // min(width, height))
        else:
            ratio = min(height / self.cover[0], width / self.cover[1])
            shape = (round(height / ratio), round(width / ratio))
        if any(n > self.long * least for n, least in zip(shape, self.cover, strict=True)):
            return False
        whole = torch.empty(1, 3, *shape, dtype=torch.uint8, memory_format=torch.channels_last)[0]
        part = picture.part((0, 0, height, width), shape)
        resize_bytes(_tensor(part), self.interpolation, whole)
        top, left = (round((a - b) / 2) for a, b in zip(shape, self.size, strict=True))
        out.copy_(whole[:, top : top + self.size[0], left : left + self.size[1]])
        return True


FastTransform: TypeAlias = FastRandomCrop | FastMiddle
"""A transform of pictures that are not decoded yet; ``size`` is its results' height and width."""


def _tensor(pixels: np.ndarray) -> Tensor:
    """uint8 ``[3, h, w]`` of ``[h, w, 3]``, in the same memory; it is not written to."""
    return torch.from_numpy(pixels).permute(2, 0, 1)
