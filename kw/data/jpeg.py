"""JPEG files decoded by libjpeg-turbo and resized as bytes: ``data.decoder: simplejpeg``.

The crop is drawn first, from the size in the header, as Pillow's path draws it under the same seed.
A picture of which the crop is twice as large as its result or more is decoded at 4/8 to 1/8 of its
size, which costs less than all pixels. What Pillow has to judge is left to it: other formats, CMYK,
turned pictures, damaged files.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from kw.data.reading import orientation_of

__all__ = ["Jpeg", "JpegError", "RandomCrop", "ShorterSide", "open_jpeg", "to_pil_image"]

_MODES = {"bilinear": "bilinear", "bicubic": "bicubic", "nearest": "nearest-exact"}
_COLOURS = ("RGB", "YCbCr", "Gray")
_SEGMENT = 1 << 16  # most bytes of a JPEG file's EXIF data


class JpegError(ValueError):
    """The decoder found damage that the header does not show."""


class Jpeg:
    """A JPEG file in memory, not yet decoded.

    Attributes:
        size: width and height, pixels.
    """

    def __init__(self, data: bytes, size: tuple[int, int]) -> None:
        self._data, self.size = data, size

    def part(self, box: tuple[int, int, int, int], least: tuple[int, int]) -> Tensor:
        """A part of the picture as uint8 ``[3, h, w]``.

        Args:
            box: top, left, height and width, pixels of the whole.
            least: height and width that are needed: where the part has twice as much or more, the
                picture is decoded at the smallest size at which the part still has them, but for
                rounding its edges.

        Raises:
            JpegError: the file is damaged.
        """
        import simplejpeg

        width, height = self.size
        top, left, rows, columns = box
        factor = min(rows / least[0], columns / least[1])
        try:
            pixels = simplejpeg.decode_jpeg(
                self._data,
                min_height=math.ceil(height / factor) if factor >= 2 else 0,
                min_width=math.ceil(width / factor) if factor >= 2 else 0,
            )
        except ValueError as error:
            raise JpegError(str(error)) from error
        y, x = pixels.shape[0] / height, pixels.shape[1] / width
        cut = pixels[
            round(top * y) : round((top + rows) * y), round(left * x) : round((left + columns) * x)
        ]
        return torch.from_numpy(cut).permute(2, 0, 1)


def open_jpeg(path: str | os.PathLike[str], max_pixels: int, upright: bool) -> Jpeg | None:
    """Read a JPEG file in RGB or grey; ``None`` for what Pillow has to read or refuse."""
    import simplejpeg

    try:
        data = Path(path).read_bytes()
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except (OSError, ValueError):
        return None
    if colours not in _COLOURS or width * height > max_pixels:
        return None
    exif = data.find(b"Exif\0\0") if upright else -1
    if exif >= 0 and orientation_of(data[exif : exif + _SEGMENT]) != 1:
        return None
    return Jpeg(data, (width, height))


class RandomCrop:
    """A random part of a picture, resized: uint8 ``[3, S, S]``.

    Args:
        step: timm's transform of Pillow images: draws the part, and has the size and the filter.
        interpolation: name of the filter.
    """

    def __init__(self, step: Any, interpolation: str) -> None:
        self.step, self.interpolation = step, interpolation

    def __call__(self, image: Jpeg | Image.Image) -> Tensor:
        if not isinstance(image, Jpeg):
            return pil_to_tensor(self.step(image))
        width, height = image.size
        sized = torch.empty(1).expand(3, height, width)  # only its shape is read
        box = self.step.get_params(sized, self.step.scale, self.step.ratio)
        return _resize(image.part(box, self.step.size), self.step.size, self.interpolation)


class ShorterSide:
    """A picture resized such that its shorter side has a size, as torchvision's ``Resize`` does.

    Args:
        size: of the shorter side, pixels.
        interpolation: name of the filter.
        long: times the shorter side; longer pictures go through ``otherwise``.
        otherwise: the transform of Pillow images.
    """

    def __init__(
        self,
        size: int,
        interpolation: str,
        long: int,
        otherwise: Callable[[Image.Image], Image.Image],
    ) -> None:
        self.size, self.interpolation = size, interpolation
        self.long, self.otherwise = long, otherwise

    def __call__(self, image: Jpeg | Image.Image) -> Tensor:
        if not isinstance(image, Jpeg):
            return pil_to_tensor(self.otherwise(image))
        width, height = image.size
        short, long = sorted(image.size)
        scaled = int(self.size * long / short)
        whole = (0, 0, height, width)
        if scaled > self.long * self.size:
            return pil_to_tensor(self.otherwise(to_pil_image(image.part(whole, whole[2:]))))
        size = (self.size, scaled) if width == long else (scaled, self.size)
        return _resize(image.part(whole, size), size, self.interpolation)


def _resize(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    mode = _MODES[interpolation]
    is_smooth = mode != "nearest-exact"
    options: dict[str, Any] = {"antialias": True, "align_corners": False} if is_smooth else {}
    return F.interpolate(image[None], size, mode=mode, **options)[0]
