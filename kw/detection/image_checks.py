"""Checks of image files: readable, and of the size that the annotation file states."""

from __future__ import annotations

import filecmp
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kw.data.reading import BadImageError, Header, read_header, read_image
from kw.detection.findings import Report

_MISSING = "no such file"


def check_images(
    images: Sequence[Mapping[str, Any]],
    folder: str,
    report: Report,
    decode: bool,
    upright: bool,
    max_pixels: int,
) -> None:
    """Open every image file, as training reads it, and compare its size.

    ``decode`` reads the pixels too, which finds truncated files; otherwise only the headers.
    """
    try:
        os.scandir(folder).close()
    except OSError as error:
        report.add("images-dir", f"{folder}: {error.strerror}")
        return

    def read(image: Mapping[str, Any]) -> Header | str:
        return _read(os.path.join(folder, image["file_name"]), decode, max_pixels)

    # Threads, because most of them wait for the disk. Reading an image changes the warning
    # filters, which all threads share: they are restored here.
    with warnings.catch_warnings(), ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        headers = list(pool.map(read, images))
    for image, header in zip(images, headers, strict=True):
        name = f"{image['file_name']} (image {image['id']})"
        if header == _MISSING:
            report.add("image-missing", name)
        elif isinstance(header, str):
            report.add("image-unreadable", f"{name}: {header}")
        else:
            _compare(name, (image["width"], image["height"]), header, upright, report)


def check_leak(report: Report, other: Report) -> None:
    """Find images that another set has too.

    Two sets may number their files alike, so files of the same name are compared byte by byte.
    """
    for name in sorted(other.file_names & report.file_names):
        here = os.path.join(report.images_dir, name)
        there = os.path.join(other.images_dir, name)
        try:
            same = os.path.samefile(here, there) or filecmp.cmp(here, there, shallow=False)
        except OSError:
            continue  # a missing file is a finding of its own
        if same:
            report.add("leak", f"{here} is {there}")


def _read(path: str, decode: bool, max_pixels: int) -> Header | str:
    """The header, or the reason why training cannot read the file."""
    try:
        header = read_header(path, max_pixels)
        if decode:
            read_image(path, max_pixels)
    except BadImageError as error:
        if "\0" in path:
            return "not a file's name"
        return error.reason if os.path.exists(path) else _MISSING
    return header


def _compare(
    name: str, said: tuple[int, int], header: Header, upright: bool, report: Report
) -> None:
    """Compare the size in the annotation file with the size that training sees."""
    seen = header.upright_size if upright else header.size
    if said == seen:
        # An orientation that keeps the size does not show whether the boxes were turned.
        if header.orientation > 1 and header.upright_size == header.size:
            does = "is" if upright else "is not"
            report.add(
                "image-turned", f"{name}: orientation {header.orientation}; it {does} turned"
            )
    elif said == seen[::-1] and header.orientation >= 5:
        when = f"{'before' if upright else 'after'} turning (orientation {header.orientation})"
        report.add("image-size-turned", f"{name}: {_times(said)} is its size {when}")
    else:
        report.add(
            "image-size", f"{name} is {_times(seen)}, the annotation file says {_times(said)}"
        )


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
