"""Checks of image files against what an annotation file says of them."""

from __future__ import annotations

import filecmp
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from PIL import Image

from kw.detection.findings import Findings, Report

__all__ = ["check_images", "check_leak"]

_ORIENTATION = 0x0112  # EXIF's tag; values of 5 and more swap width and height
_PER_TASK = 64


class _Header(NamedTuple):
    size: tuple[int, int] = (0, 0)
    """width and height as stored"""
    orientation: int = 1
    problem: str | None = None
    """kind of a finding"""
    reason: str = ""


def check_images(
    images: Sequence[Mapping[str, Any]],
    images_dir: str | os.PathLike[str],
    findings: Findings,
    decode: bool = False,
    threads: int | None = None,
) -> None:
    """Open every image file and compare its size.

    Args:
        images: entries with ``id``, ``file_name``, ``width`` and ``height``.
        images_dir: folder that the names are relative to.
        findings: list to add to.
        decode: read the pixels too, which finds files that end too early; otherwise the headers.
        threads: files opened at a time, most of which wait for the disk. Default: 4 per processor,
            16 at most.
    """
    folder = os.fspath(images_dir)
    try:
        os.scandir(folder).close()
    except OSError as error:
        findings.add("images-dir", f"{folder}: {error.strerror}")
        return
    names = [image["file_name"] for image in images]
    tasks = [names[start : start + _PER_TASK] for start in range(0, len(names), _PER_TASK)]

    def read(task: list[str]) -> list[_Header]:
        return [_read_header(os.path.join(folder, name), decode) for name in task]

    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(threads or min(16, 4 * (os.cpu_count() or 1))) as pool,
    ):
        # Damaged EXIF data and very large images make Pillow warn; neither is a fault here.
        warnings.simplefilter("ignore")
        headers = [header for task in pool.map(read, tasks) for header in task]
    for image, header in zip(images, headers, strict=True):
        _compare(image, header, findings)


def check_leak(
    files: Iterable[str], images_dir: str | os.PathLike[str], other: Report, findings: Findings
) -> None:
    """Find images that another set holds too.

    Two sets may number their files alike, so files of the same name are compared byte by byte.
    """
    for name in sorted(other.file_names.intersection(files)):
        here = os.path.join(os.fspath(images_dir), name)
        there = os.path.join(other.images_dir, name)
        try:
            same = os.path.samefile(here, there) or filecmp.cmp(here, there, shallow=False)
        except OSError:
            continue  # a missing file is a finding of its own
        if same:
            findings.add("leak", f"{here} is {there}")


def _read_header(path: str, decode: bool) -> _Header:
    try:
        with Image.open(path) as image:
            size = image.size
            # Pillow would look for EXIF data behind a PNG's pixels, and read them for that.
            marked = "exif" in image.info or image.format == "TIFF"
            orientation = image.getexif().get(_ORIENTATION, 1) if marked else 1
            if decode:
                image.load()
    except FileNotFoundError:
        return _Header(problem="image-missing")
    except Exception as error:  # decoders raise whatever a damaged file makes them raise
        return _Header(problem="image-unreadable", reason=f": {error or type(error).__name__}")
    return _Header(size, orientation if isinstance(orientation, int) else 1)


def _compare(image: Mapping[str, Any], header: _Header, findings: Findings) -> None:
    name = f"{image['file_name']} (image {image['id']})"
    if header.problem is not None:
        findings.add(header.problem, name + header.reason)
        return
    said = (image["width"], image["height"])
    turned = header.size[::-1] if header.orientation >= 5 else header.size
    if said not in (header.size, turned):
        findings.add(
            "image-size",
            f"{name} is {_times(header.size)}, the annotation file says {_times(said)}",
        )
    elif turned != header.size:
        when = "before" if said == header.size else "after"
        findings.add(
            "image-turned",
            f"{name}: orientation {header.orientation}; the annotation file has the size {when} "
            "turning",
        )
    elif header.orientation not in (0, 1):
        findings.add("image-turned", f"{name}: orientation {header.orientation}")


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
