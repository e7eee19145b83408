"""Reading an image file as RGB: every way of storing pixels that has one meaning, and no other.

Alpha is dropped, embedded colour profiles are ignored, as torchvision, timm and OpenCV do. What
these readers get wrong is put right here: 16-bit grey is scaled (they clip it to white) and EXIF
orientation is applied where asked for.
"""

from __future__ import annotations

import errno
import os
import warnings
from contextlib import nullcontext
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from kw.errors import UserError

__all__ = ["MAX_PIXELS", "BadImageError", "DataError", "read_image"]

MAX_PIXELS = 178_956_970
"""Where Pillow refuses by itself: 512 MiB of RGB."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The machine's troubles, not the file's: another file would meet them too.
_OF_THE_MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class DataError(UserError):
    """The data folder or a file in it is not what was looked for."""


class BadImageError(DataError):
    """A file that cannot be read as an image.

    Attributes:
        path: the file.
        reason: why, in a few words.
    """

    # The message comes first and suffices: so does torch rebuild what a loader process raised.
    def __init__(self, message: str, path: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.path = path
        self.reason = reason

    @classmethod
    def of(cls, path: str | os.PathLike[str], reason: str) -> BadImageError:
        """The error for a file."""
        return cls(f"cannot read image {os.fspath(path)}: {reason}", os.fspath(path), reason)


def read_image(
    source: str | os.PathLike[str] | Image.Image,
    max_pixels: int = MAX_PIXELS,
    upright: bool = True,
) -> Image.Image:
    """Read an image by its content, whatever its name ends with.

    Args:
        source: the file, or what ``PIL.Image.open`` has made of it.
        max_pixels: larger images are refused by their header, before memory is asked for.
        upright: turn the image as its EXIF orientation says.

    Returns:
        RGB, in memory.

    Raises:
        BadImageError: the file is missing, may not be read, is empty, ends too early, is no image,
            is too large, or has pixels without a defined white.
        OSError: the machine has no file handle left.
        MemoryError: the machine has no memory left.
    """
    path = f"of mode {source.mode}" if isinstance(source, Image.Image) else source
    # Pillow warns of damaged metadata, and of sizes that it does not refuse yet; per process and
    # image, which nobody reads.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            opened = source if isinstance(source, Image.Image) else Image.open(source)
            # One that was given stays open.
            with nullcontext(opened) if opened is source else opened as file:
                width, height = file.size
                if width * height > max_pixels:
                    raise BadImageError.of(path, _too_large(width, height, max_pixels))
                file.load()
                image = _to_rgb(file)
                return _turned(file, image) if upright else image
        except (BadImageError, MemoryError):
            raise
        except OSError as error:
            if error.errno in _OF_THE_MACHINE:
                raise
            raise BadImageError.of(path, _reason(path, error)) from error
        except Image.DecompressionBombError as error:
            reason = f"more than {MAX_PIXELS} pixels (a decompression bomb?)"
            raise BadImageError.of(path, reason) from error
        except Exception as error:  # decoders raise whatever a damaged file makes them raise
            raise BadImageError.of(path, str(error) or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PPM", "PNG")):
        # Pillow clips at 255. White is 65535 in PNG; its PPM reader scales to the same.
        grey = np.asarray(image, dtype=np.float64) * (255 / _white(image))
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {mode}), of which nothing says what is white")
    if mode == "RGBa":
        image = image.convert("RGBA")  # undoes the multiplication by alpha
    return image.convert("RGB")


def _white(image: Image.Image) -> int:
    """The largest value of 16-bit grey: TIFF stores 12 bits as well."""
    tags: Any = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))
    return 2 ** int(bits[0] if isinstance(bits, tuple) else bits) - 1


def _turned(file: Image.Image, image: Image.Image) -> Image.Image:
    try:
        # Pillow turns TIFF files itself and removes the mark.
        orientation = file.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data say nothing, the pixels are there
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _too_large(width: int, height: int, most: int) -> str:
    return f"{width} x {height} pixels, more than {most} (a decompression bomb?)"


def _reason(path: str | os.PathLike[str], error: OSError) -> str:
    if isinstance(error, UnidentifiedImageError):
        try:
            empty = os.path.getsize(path) == 0
        except OSError:
            empty = False
        return "the file is empty" if empty else "no image of a known format"
    return error.strerror or str(error) or type(error).__name__
