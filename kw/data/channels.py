"""Reading images in the number of channels and the precision that a run asks for.

Grey and RGB in bytes are Pillow's images, as :func:`~kw.data.reading.read_image` gives them. All
others are tensors ``[C, H, W]``: uint8, or with ``data.pixels: uint16`` float32 in units of bytes
(white is 255, a step of 16 bits 1/257), which hold 16 bits exactly. Their files have exactly C
channels: none is dropped, added or mixed, but that grey with alpha becomes RGBA where C is 4. TIFF
files are read by tifffile, others by Pillow.

Legend: C channels, H x W size.
"""

from __future__ import annotations

import io
import os
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kw.config.data_schema import DataConfig
from kw.data.reading import (
    MAX_PIXELS,
    BadImageError,
    DataError,
    Picture,
    is_16_bit,
    read_image,
    readable,
    white_of,
)

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION = 0x0112
_OF_8_BITS = ("BMP", "GIF", "JPEG", "MPO", "PNG", "WEBP")
"""Formats whose colours have 8 bits, or say so where they have more."""
_ALIKE = {"1": "L", "La": "LA", "RGBa": "RGBA", "PA": "RGBA"}


class Reader(NamedTuple):
    """Reads images in one form.

    Attributes:
        channels: C.
        pixels: ``"uint8"`` or ``"uint16"``.
        max_pixels: larger images are refused by their header, before memory is allocated.
        upright: turn images as their EXIF orientation says.
    """

    channels: int = 3
    pixels: str = "uint8"
    max_pixels: int = MAX_PIXELS
    upright: bool = True

    @classmethod
    def of(cls, data: DataConfig) -> Reader:
        """The reader of a configuration's images."""
        upright = data.exif_orientation == "apply"
        return cls(data.channels, data.pixels, data.bad_images.max_pixels, upright)

    def __call__(
        self, source: Picture | bytes | memoryview, name: str | os.PathLike[str] | None = None
    ) -> Image.Image | Tensor:
        """Read an image.

        Args:
            source: as for :func:`~kw.data.reading.read_image`; an array for a tensor is uint8 or
                uint16, ``[H, W, C]``, or ``[H, W]`` for one channel.
            name: of a file in messages, where ``source`` is none.

        Returns:
            Pillow's image in mode L or RGB, or a tensor ``[C, H, W]``.

        Raises:
            BadImageError: as for :func:`~kw.data.reading.read_image`; or the file has another
                number of channels, or colours that are not RGB.
            DataError: a package is missing that the file needs.
            ValueError: an array of another kind.
        """
        if self.pixels == "uint8" and self.channels in (1, 3):
            image = read_image(source, self.max_pixels, self.upright, name)
            return image.convert("L") if self.channels == 1 else image
        if isinstance(source, np.ndarray):
            with nullcontext() if name is None else readable(name):  # one of a data set is bad
                values = self._of_array(source)
        else:
            values = self._of_file(source, name)
        values = values.reshape(*values.shape[:2], self.channels)
        if self.pixels == "uint16":
            values = values.astype(np.float32, copy=False)
        return torch.from_numpy(np.array(values.transpose(2, 0, 1), order="C"))

    def black(self) -> Image.Image | Tensor:
        """A small black image."""
        return self(np.zeros((8, 8, self.channels)[: 2 if self.channels == 1 else 3], np.uint8))

    def _of_file(self, source: Any, name: str | os.PathLike[str] | None) -> np.ndarray:
        if not isinstance(source, Image.Image):
            is_content = isinstance(source, bytes | memoryview)
            name = name or ("in memory" if is_content else source)
            with readable(name), io.BytesIO(source) if is_content else open(source, "rb") as file:
                is_tiff = file.read(4) in _TIFF
                if self.pixels == "uint16" and not is_tiff:
                    _refuse_cut(file)
            if is_tiff:
                return self._of_tiff(io.BytesIO(source) if is_content else source, name)
        image = read_image(source, self.max_pixels, self.upright, name, self._stored)
        return np.asarray(image)

    def _of_array(self, array: np.ndarray) -> np.ndarray:
        channels = array.shape[2] if array.ndim == 3 else 1
        fits = array.ndim in (2, 3) and channels == self.channels
        if not fits or array.dtype not in (np.uint8, np.uint16):
            raise ValueError(
                f"an array of {list(array.shape)}, {array.dtype}: expected uint8 or uint16 "
                f"[H, W, {self.channels}]" + (" or [H, W]" if self.channels == 1 else "")
            )
        return self._scaled(array, np.iinfo(array.dtype).max)

    def _scaled(self, values: np.ndarray, white: int) -> np.ndarray:
        if self.pixels == "uint16":
            return values.astype(np.float32) / np.float32(white / 255)
        if white == 255:
            return values
        return (values * (255 / white)).round().clip(0, 255).astype(np.uint8)

    def _stored(self, image: Image.Image) -> Image.Image:
        """Pillow's image with the channels that its file has."""
        if is_16_bit(image):
            self._check_count(1)
            return Image.fromarray(self._scaled(np.asarray(image), white_of(image)))
        mode = _ALIKE.get(image.mode, image.mode)
        if mode == "P":
            mode = "RGBA" if "transparency" in image.info else "RGB"
        if mode == "LA" and self.channels == 4:
            mode = "RGBA"
        if mode not in ("L", "LA", "RGB", "RGBA"):
            raise ValueError(f"{mode} pixels: store them as grey, RGB or RGBA")
        self._check_count(len(Image.new(mode, (1, 1)).getbands()), mode)
        return image if image.mode == mode else image.convert(mode)

    def _check_count(self, found: int, mode: str = "") -> None:
        if found != self.channels:
            kind = f" ({mode})" if mode else ""
            raise ValueError(f"{found} channels{kind}; data.channels is {self.channels}")

    def _of_tiff(self, source: Any, path: str | os.PathLike[str]) -> np.ndarray:
        try:
            import tifffile
        except ImportError as error:
            raise DataError(
                f"{os.fspath(path)}: TIFF files of data.channels {self.channels}, data.pixels "
                f"{self.pixels} need the package tifffile: pip install 'kernelwarehouse[tiff]'"
            ) from error
        try:
            with readable(path), tifffile.TiffFile(source) as file:
                series = file.series[0]
                page = series.keyframe
                shape, axes = series.get_shape(False), series.get_axes(False)
                order = self._check_tiff(page, shape, axes)
                values = series.asarray().reshape(shape).transpose(order)
                values = values.reshape(*values.shape[:2], self.channels)
                white = 2**page.bitspersample - 1
                if page.photometric.name == "MINISWHITE":
                    values = white - values
                turn = page.tags.get(_ORIENTATION)
                values = _turned(values, turn.value) if turn and self.upright else values
                return self._scaled(values, white)
        except BadImageError as error:
            if "imagecodecs" not in error.reason:
                raise
            raise DataError(f"{error}: pip install imagecodecs") from error

    def _check_tiff(self, page: Any, shape: tuple[int, ...], axes: str) -> list[int]:
        """Refuse by the header; the order of the axes that puts height and width first."""
        kind = page.photometric.name
        if kind not in ("MINISBLACK", "MINISWHITE", "RGB"):
            raise ValueError(f"{kind} pixels: store them as grey, RGB or plain channels")
        if page.dtype not in (np.uint8, np.uint16):
            raise ValueError(f"{page.dtype} pixels: expected uint8 or uint16")
        order = [axes.index("Y"), axes.index("X")]
        height, width = (shape[place] for place in order)
        if height * width > self.max_pixels:
            raise ValueError(f"{width} x {height} pixels, more than {self.max_pixels}")
        others = [place for place in range(len(shape)) if place not in order]
        if sum(shape[place] > 1 for place in others) > 1:
            raise ValueError(f"axes {axes} of {list(shape)}: expected one of channels at most")
        self._check_count(int(np.prod([shape[place] for place in others], dtype=int)))
        return order + others


def _refuse_cut(stream: Any) -> None:
    """Refuse colours that may have more bits than the 8 that Pillow keeps of them."""
    with Image.open(stream) as file:
        cut = file.format not in _OF_8_BITS or ";16" in str(file.tile)
        if cut and file.mode not in ("1", "L") and not is_16_bit(file):
            raise ValueError("colours of 16 bits, of which Pillow keeps 8: store them as TIFF")


def _turned(values: np.ndarray, orientation: int) -> np.ndarray:
    """``[H, W, C]`` as an EXIF orientation says."""
    if orientation >= 5:
        values = values.swapaxes(0, 1)
    down, right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return values[:: -1 if down else 1, :: -1 if right else 1]
