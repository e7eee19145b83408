"""Which files of a folder are its images: one rule for training, testing and prediction."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

IMAGE_EXTENSIONS = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
"""Endings that are taken for images; the format is read from the content."""

_OF_SYSTEMS = ("@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found")
"""Folders that storage devices, archives and desktops leave beside images."""


def is_hidden(name: str) -> bool:
    """Whether a name has a leading dot, or is a folder's that a system made for itself."""
    return name.startswith(".") or name in _OF_SYSTEMS


def is_image(name: str) -> bool:
    """Whether a file's name is an image's."""
    return not is_hidden(name) and name.lower().endswith(IMAGE_EXTENSIONS)


def walk_images(folder: Path, left_out: Counter[str] | None = None) -> Iterator[Path]:
    """The images in a folder and below; folder by folder, of each by name.

    Links to folders are followed, but for those that lead back to a folder around them.

    Args:
        folder: where to look.
        left_out: what is not taken is counted here, by kind.

    Raises:
        OSError: a folder cannot be read: part of the images would be missing.
    """
    counted: Counter[str] = Counter() if left_out is None else left_out
    for place, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        for name in list(folders):
            path = Path(place, name)
            back = path.is_symlink() and any(
                Path(os.path.realpath(around)).is_relative_to(os.path.realpath(path))
                for around in path.parents[: len(path.parts) - len(folder.parts)]
            )
            if is_hidden(name) or back:
                folders.remove(name)
                counted["links back" if back else "hidden folders"] += 1
        folders.sort()
        for name in sorted(names):
            if is_image(name):
                yield Path(place, name)
            else:
                ending = os.path.splitext(name)[1].lower()
                kind = f"*{ending}" if ending else "files without an ending"
                counted["hidden files" if is_hidden(name) else kind] += 1


def _refuse(error: OSError) -> None:
    raise error


def describe(left_out: Counter[str]) -> str:
    """What was left out, the most frequent first: ``12 *.txt, 1 hidden folders``."""
    return ", ".join(f"{count} {kind}" for kind, count in left_out.most_common(8))
