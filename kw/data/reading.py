"""Reading an image file as RGB; pixel formats without a defined meaning are refused.

Alpha is dropped, embedded colour profiles are ignored, as torchvision, timm and OpenCV do. Two
differences: 16-bit grey is scaled (they clip it to white), and EXIF orientation is applied if
``upright``.
"""

from __future__ import annotations

import errno
import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from kw.errors import UserError

Picture: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray

MAX_PIXELS = 178_956_970
"""Pillow's own limit: 512 MiB of RGB."""

_ORIENTATION = 0x0112
_BITS, _PHOTOMETRIC, _PLANES, _PALETTE = 258, 262, 284, 320  # TIFF's tags
_EMPTY = "the file is empty"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Errors of the machine, not of the file.
_OF_THE_MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class DataError(UserError):
    """The data folder or a file in it is not as expected."""


class BadImageError(DataError):
    """A file that cannot be read as an image.

    Attributes:
        path: the file.
        reason: why, in a few words.
    """

    # torch rebuilds errors of loader processes from the message alone: it must be the first
    # argument.
    def __init__(self, message: str, path: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.path = path
        self.reason = reason

    @classmethod
    def of(cls, path: str | os.PathLike[str], reason: str) -> BadImageError:
        """The error for a file."""
        return cls(f"cannot read image {os.fspath(path)}: {reason}", os.fspath(path), reason)


class Header(NamedTuple):
    """The header of an image file."""

    size: tuple[int, int]
    """width and height as stored"""
    orientation: int
    """EXIF's, 1 to 8; 1 where there is none"""

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height when it is turned as its orientation says."""
        return self.size[::-1] if self.orientation >= 5 else self.size


def read_header(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Header:
    """Read the header of an image file; refuse files that it shows to be unusable.

    Raises:
        BadImageError, OSError: as :func:`read_image`, which also finds files that end too early.
    """
    with readable(path), Image.open(path) as file:
        _refuse(file, path, max_pixels)
        exif = file.info.get("exif")
        if exif is None and file.format == "PNG":
            exif = _png_exif(file.fp)
        return Header(file.size, orientation_of(exif or b""))


def _png_exif(stream: Any) -> bytes:
    """A PNG's EXIF data. Pillow finds those behind the pixels only when it reads these."""
    stream.seek(8)
    while len(head := stream.read(8)) == 8:
        size = int.from_bytes(head[:4], "big")
        if head[4:] == b"eXIf":
            return bytes(stream.read(size))
        stream.seek(size + 4, os.SEEK_CUR)
    return b""


def read_image(
    source: Picture | bytes | memoryview,
    max_pixels: int = MAX_PIXELS,
    upright: bool = True,
    name: str | os.PathLike[str] | None = None,
    convert: Callable[[Image.Image], Image.Image] | None = None,
) -> Image.Image:
    """Read an image by its content, whatever its name ends with.

    Args:
        source: the file or its content, what ``PIL.Image.open`` has made of it, or an array of its
            pixels: uint8 ``[H, W, 3]``, or grey ``[H, W]`` in uint8 or uint16.
        max_pixels: larger images are refused by their header, before memory is allocated.
        upright: turn the image as its EXIF orientation says.
        name: of a file in messages, where ``source`` is none.
        convert: what becomes of the decoded image; left out, RGB.

    Returns:
        RGB, or as ``convert`` gives it; in memory, without metadata.

    Raises:
        BadImageError: the file is missing, may not be read, is empty, ends too early, is no image,
            is too large, or has pixels without a defined white.
        ValueError: an array of another kind.
        OSError: no file handles are left.
        MemoryError: no memory is left.
    """
    if isinstance(source, np.ndarray):
        source = _from_array(source)
    path = name or ("of mode " + source.mode if isinstance(source, Image.Image) else source)
    if isinstance(path, bytes | memoryview):
        path = "in memory"
    with readable(path):
        if isinstance(source, Image.Image):
            opened: Image.Image = source
        elif isinstance(source, bytes | memoryview):
            if not len(source):
                raise BadImageError.of(path, _EMPTY)
            opened = Image.open(io.BytesIO(source))
        else:
            opened = Image.open(source)
        # One that was given stays open.
        with nullcontext(opened) if opened is source else opened as file:
            _refuse(file, path, max_pixels)
            file.load()
            image = (convert or to_rgb)(file)
            turn = _TURNS.get(orientation_of(file.info.get("exif", b""))) if upright else None
            image = image if turn is None else image.transpose(turn)
            image.info = {}  # or it would be turned again when it is read again
            return image


def _from_array(array: np.ndarray) -> Image.Image:
    is_grey = array.ndim == 2 and array.dtype in (np.uint8, np.uint16)
    if not is_grey and not (array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8):
        raise ValueError(
            f"an array of {list(array.shape)}, {array.dtype}: expected RGB, uint8 [H, W, 3], or "
            "grey, uint8 or uint16 [H, W]"
        )
    return Image.fromarray(array)


@contextmanager
def readable(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn all errors of Pillow about a file into :class:`BadImageError`."""
    # Pillow warns of damaged metadata and of large images, once per process and image: silence it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (BadImageError, MemoryError):
            raise
        except OSError as error:
            if error.errno in _OF_THE_MACHINE:
                raise
            raise BadImageError.of(path, _reason(path, error)) from error
        except Image.DecompressionBombError as error:
            reason = f"more than {MAX_PIXELS} pixels (a decompression bomb?)"
            raise BadImageError.of(path, reason) from error
        except Exception as error:  # decoders raise many types of errors on damaged files
            raise BadImageError.of(path, str(error) or type(error).__name__) from error


def _refuse(image: Image.Image, path: str | os.PathLike[str], max_pixels: int) -> None:
    """Refuse by the header: too large, or pixels without a defined white."""
    width, height = image.size
    if width * height > max_pixels:
        reason = f"{width} x {height} pixels, more than {max_pixels} (a decompression bomb?)"
        raise BadImageError.of(path, reason)
    if image.mode in ("I", "F") and not is_16_bit(image):
        reason = f"32-bit pixels (mode {image.mode}), of which nothing says what is white"
        raise BadImageError.of(path, reason)
    if misread := _misread(image):
        raise BadImageError.of(path, f"{misread}, which Pillow misreads: store it as PNG")


def _misread(image: Image.Image) -> str | None:
    """What Pillow takes for other pixels than the file's, without an error (Pillow 13)."""
    codec = (getattr(image, "tile", None) or [[""]])[0][0]
    tags: Any = getattr(image, "tag_v2", {})
    if image.mode == "P" and 0 < max(tags.get(_PALETTE, (0,))) < 256:
        return "a palette of 8 bits, not 16"
    if codec == "raw" and tags.get(_PLANES) == 2 and 16 in tags.get(_BITS, ()):
        return "colours of 16 bits in planes, not compressed"
    if codec == "raw" and image.format == "BMP" and image.mode == "1":
        file: Any = image
        file.fp.seek(14)
        size, *_, bits, _ = file.fp.read(16)
        if size > 12 and bits > 1:  # a header of 12 bytes has no number of colours, which misleads
            return "black and white of several bits"
    return None


def is_16_bit(image: Image.Image) -> bool:
    """Whether these are 16-bit pixels, which are grey."""
    in_32 = image.mode == "I" and image.format in ("PPM", "PNG")
    return in_32 or image.mode.startswith("I;16")


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image as RGB."""
    if is_16_bit(image):
        # Pillow clips at 255. White is 65535 in PNG; its PPM reader scales to the same.
        grey = np.asarray(image, dtype=np.float64) * (255 / white_of(image))
        if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:
            grey = 255 - grey  # 0 is white; of 8 bits Pillow sees to it
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBa", "La"):
        image = image.convert(image.mode.upper())  # undoes the multiplication by alpha
    return image.convert("RGB")


def white_of(image: Image.Image) -> int:
    """The largest value of 16-bit grey: TIFF stores 12 bits as well."""
    tags: Any = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS, (16,))
    return 2 ** int(bits[0] if isinstance(bits, tuple) else bits) - 1


def orientation_of(data: bytes) -> int:
    """The EXIF orientation, as OpenCV reads it.

    XMP and text, which Pillow's ``getexif`` reads as well, are ignored. Pillow itself turns TIFF
    files.
    """
    exif = Image.Exif()
    try:
        exif.load(data)
        found = exif.get(_ORIENTATION, 1)
    except Exception:  # ignore damaged EXIF data: the pixels are intact
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _reason(path: str | os.PathLike[str], error: OSError) -> str:
    if isinstance(error, UnidentifiedImageError):
        try:
            empty = os.path.getsize(path) == 0
        except OSError:
            empty = False
        return _EMPTY if empty else "no image of a known format"
    return error.strerror or str(error) or type(error).__name__
