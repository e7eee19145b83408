"""Images in folders, ``root/train/<class>/*`` and ``root/val/<class>/*``, and checks of these."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import has_file_allowed_extension, make_dataset

from kw.data.seeding import seeded
from kw.errors import UserError

__all__ = ["IMAGE_EXTENSIONS", "DataError", "ImageFolder", "Sample", "check_data_root"]

IMAGE_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_LAYOUT = "expected train/ and val/, each with one folder of images per class"


class DataError(UserError):
    """The data folder or a file in it is not what was looked for."""


class Sample(NamedTuple):
    """One image as the network's preprocessing takes it."""

    image: torch.Tensor
    """uint8, [3, S, S]"""
    label: int
    key: tuple[int, int]
    """epoch and index"""


class ImageFolder(Dataset[Sample]):
    """The images of one split.

    An item's key is ``(epoch, index)``: the transform draws under a seed made of the dataset's seed
    and that key, whichever worker or process runs it.

    Args:
        root: folder that holds the splits.
        split: folder under ``root``; its folders are the classes. Names with a leading dot are
            skipped, files as well as folders.
        transform: RGB image -> uint8 tensor [3, S, S].
        seed: seed of the transform's random choices.

    Attributes:
        classes: class names, sorted; a label is a place in this list.
        labels: int64 array, the label of every image.

    Raises:
        DataError: the folder is missing or not laid out as expected.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        transform: Callable[[Image.Image], torch.Tensor],
        seed: int = 0,
    ) -> None:
        folder = Path(root).expanduser() / split
        self.folder = folder
        self.transform = transform
        self.seed = seed
        self.classes = _find_classes(folder)
        samples = make_dataset(
            str(folder),
            {name: label for label, name in enumerate(self.classes)},
            is_valid_file=_is_image,
            allow_empty=True,
        )
        self.labels = np.array([label for _, label in samples], dtype=np.int64)
        _check_not_empty(folder, self.classes, set(self.labels.tolist()))
        # A list of a million strings is copied page by page into every forked worker, because
        # reading a string writes its reference count. Two arrays are shared for good.
        self.metainfo = {"classes": self.classes}  # where mmengine looks for it
        names = [os.fsencode(os.path.relpath(path, folder)) for path, _ in samples]
        self._names = np.frombuffer(b"".join(names), dtype=np.uint8)
        self._ends = np.cumsum([len(name) for name in names])

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        """The file of an image."""
        start = self._ends[index - 1] if index else 0
        return self.folder / os.fsdecode(self._names[start : self._ends[index]].tobytes())

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Read and transform an image.

        Raises:
            DataError: the file cannot be read as an image.
        """
        epoch, index = key
        path = self.path(index)
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except OSError as error:
            raise DataError(f"cannot read image {path}: {error}") from error
        with seeded("image", self.seed, epoch, index):
            tensor = self.transform(image)
        return Sample(tensor, int(self.labels[index]), key)


def check_data_root(
    root: str | os.PathLike[str], num_classes: int, splits: Sequence[str] = ("train", "val")
) -> list[str]:
    """Check a data folder's layout before a run starts, without opening an image.

    Args:
        root: folder that holds the splits.
        num_classes: classes of the model's classifier.
        splits: splits that the run needs; all must have the classes of the first.

    Returns:
        The class names, sorted.

    Raises:
        DataError: says what was looked for and what was found.
    """
    first, *others = splits
    classes = _check_split(root, first)
    for split in others:
        found = _check_split(root, split)
        if found != classes:
            missing = sorted(set(classes) - set(found))
            unknown = sorted(set(found) - set(classes))
            raise DataError(
                f"{Path(root) / split} must have the classes of {Path(root) / first}, but "
                + " and ".join(
                    f"{what} {_some(names)}"
                    for what, names in (("lacks", missing), ("has besides", unknown))
                    if names
                )
            )
    if len(classes) != num_classes:
        raise DataError(
            f"{Path(root) / first} has {len(classes)} classes ({_some(classes)}), but "
            f"model.num_classes is {num_classes}: set model.num_classes to {len(classes)}, "
            "or data.root to the folder that was meant"
        )
    return classes


def _check_split(root: str | os.PathLike[str], split: str) -> list[str]:
    folder = Path(root).expanduser() / split
    classes = _find_classes(folder)
    filled = {label for label, name in enumerate(classes) if _has_image(folder / name)}
    _check_not_empty(folder, classes, filled)
    return classes


def _find_classes(folder: Path) -> list[str]:
    """Names of the class folders of a split, sorted."""
    root = folder.parent
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"data.root {root} {what}; {_LAYOUT}")
    if not folder.is_dir():
        raise DataError(f"data.root {root} has no {folder.name}/; {_LAYOUT}; {_found(root)}")
    with os.scandir(folder) as entries:
        classes = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not classes:
        raise DataError(f"{folder} has no class folders; {_LAYOUT}; {_found(folder)}")
    return classes


def _check_not_empty(folder: Path, classes: list[str], filled: set[int]) -> None:
    empty = [name for label, name in enumerate(classes) if label not in filled]
    if empty:
        raise DataError(
            f"{len(empty)} of {len(classes)} class folders in {folder} have no image: "
            f"{_some(empty)}; expected files named {', '.join('*' + e for e in IMAGE_EXTENSIONS)}; "
            f"{_found(folder / empty[0])}"
        )


def _is_image(path: str) -> bool:
    name = os.path.basename(path)
    return not name.startswith(".") and has_file_allowed_extension(name, IMAGE_EXTENSIONS)


def _has_image(folder: Path) -> bool:
    """Whether an image lies in a folder or below; stops at the first."""
    below = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                below.append(Path(entry.path))
            elif _is_image(entry.name):
                return True
    return any(_has_image(path) for path in below)


def _found(folder: Path) -> str:
    """What lies in a folder, for an error message."""
    with os.scandir(folder) as entries:
        names = sorted(e.name + "/" if e.is_dir() else e.name for e in entries)
    images = sum(map(_is_image, names))
    flat = f", {images} of them images" if images else ""
    return f"{folder} holds {_some(names)}{flat}" if names else f"{folder} is empty"


def _some(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
