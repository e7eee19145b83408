"""The images of a split, in folders ``root/SPLIT/CLASS/*`` or by another listing; checks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from kw.config.data_schema import DataConfig
from kw.config.run_schema import BadImagesConfig
from kw.data.channels import Reader
from kw.data.faults import TolerantDataset
from kw.data.jpeg import JpegError, open_jpeg
from kw.data.reading import DataError
from kw.data.seeding import seeded
from kw.data.walk import IMAGE_EXTENSIONS, describe, is_hidden, is_image, walk_images
from kw.errors import say
from kw.registry import DATASETS

__all__ = [
    "UNREADABLE",
    "DataError",
    "ImageFolder",
    "Listing",
    "Sample",
    "list_split",
    "list_splits",
]

_LAYOUT = "expected train/ and val/, each with one folder of images per class"

UNREADABLE = -1
"""Label of a test image that cannot be read: no prediction is right."""


class Sample(NamedTuple):
    """One image, as the batch preprocessing expects it."""

    image: torch.Tensor
    """[C, H, W]; uint8, or float32 in units of bytes (:mod:`kw.data.channels`)"""
    label: int
    key: tuple[int, int]
    """epoch and index"""


class Listing(NamedTuple):
    """The files, labels and classes of a split, from an entry of :data:`kw.registry.DATASETS`."""

    files: Sequence[Path]
    labels: Sequence[int]
    """of each file, a place in ``classes``"""
    classes: Sequence[str]


@DATASETS.register("folder")
def list_folders(root: Path, split: str) -> Listing:
    """``root/split/CLASS/**``: a folder for every class, in the order of their names.

    Hidden files and files that are no images (:mod:`.walk`) are left out, with a message.

    Raises:
        DataError: the folder is missing or not laid out as expected.
    """
    folder = root.expanduser() / split
    classes = _find_classes(folder)
    left_out = Counter(_beside(folder))
    samples = [
        (path, label)
        for label, name in enumerate(classes)
        # By folder and name, which is not by path: "a/b.png" comes after "a.png".
        for path in sorted(
            walk_images(folder / name, left_out), key=lambda p: (str(p.parent), p.name)
        )
    ]
    if left_out:
        say(f"{folder}: left out: {describe(left_out)}")
    labels = [label for _, label in samples]
    _check_not_empty(folder, classes, set(labels))
    return Listing([path for path, _ in samples], labels, classes)


def list_split(data: DataConfig, split: str) -> Listing:
    """A split as the configuration says, checked.

    Raises:
        DataError: the data set's function fails, or its listing is inconsistent.
    """
    found = DATASETS.find(data.dataset)(Path(data.root), split, **data.dataset_args)
    where = f"data.dataset {data.dataset!r}, {split}"
    if not found.files or len(found.files) != len(found.labels):
        raise DataError(f"{where}: {len(found.files)} files and {len(found.labels)} labels")
    places = range(len(found.classes))
    wrong = [label for label in found.labels if label not in places]  # a fraction is in none
    if wrong:
        raise DataError(
            f"{where}: label {wrong[0]!r}: expected a place among {len(places)} classes"
        )
    if len(set(found.classes)) != len(places):
        raise DataError(f"{where}: a class has its name twice")
    return found


class ImageFolder(TolerantDataset):
    """The images of one split.

    An item's key is ``(epoch, index)``: the transform draws under a seed made of the dataset's seed
    and that key, whichever worker or process runs it.

    Args:
        root: folder that holds the splits.
        split: folder under ``root``.
        transform: image as ``reader`` gives it, or a Jpeg with that decoder -> tensor [C, H, W].
        seed: seed of the transform's random choices.
        training: whether images that cannot be read are replaced; in evaluation each gives a black
            image with the label :data:`UNREADABLE`, so that all are counted and none is right.
        bad_images: the policy for them; without it they raise.
        upright: turn images as their EXIF data say.
        listing: the split's files; left out, its folders are its classes (:func:`list_folders`).
        decoder: ``"pillow"`` or ``"simplejpeg"`` (:mod:`.jpeg`).
        reader: reads files; left out, RGB as ``bad_images`` and ``upright`` say.

    Attributes:
        classes: class names; a label is a place in this list.
        labels: int64 array, the label of every image.

    Raises:
        DataError: the folder is missing or not laid out as expected.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        transform: Callable[[Any], torch.Tensor],
        seed: int = 0,
        training: bool = False,
        bad_images: BadImagesConfig | None = None,
        upright: bool = True,
        listing: Listing | None = None,
        decoder: str = "pillow",
        reader: Reader | None = None,
    ) -> None:
        super().__init__(seed, training, bad_images or BadImagesConfig(policy="raise"))
        if decoder != "pillow" and find_spec(decoder) is None:
            raise DataError(f"data.decoder {decoder}: install it: pip install {decoder}")
        self.transform = transform
        self.upright = upright
        self.decoder = decoder
        self.reader = reader or Reader(max_pixels=self.bad_images.max_pixels, upright=upright)
        found = list_folders(Path(root), split) if listing is None else listing
        self.folder = Path(root).expanduser()
        inside = f"{self.folder / split}{os.sep}"
        if all(str(path).startswith(inside) for path in found.files):
            self.folder /= split
        self.classes = list(found.classes)
        self.labels = np.array(found.labels, dtype=np.int64)
        # Not a list of strings: reading one writes its reference count, so that every forked worker
        # would copy all pages. Two arrays stay shared.
        names = [os.fsencode(os.path.relpath(path, self.folder)) for path in found.files]
        self._names = np.frombuffer(b"".join(names), dtype=np.uint8)
        self._ends = np.cumsum([len(name) for name in names])

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        """The file of an image."""
        start = self._ends[index - 1] if index else 0
        return self.folder / os.fsdecode(self._names[start : self._ends[index]].tobytes())

    def read(self, index: int, key: tuple[int, int]) -> Sample:
        """Read and transform an image.

        Raises:
            BadImageError: the file cannot be read as an image.
        """
        path, limit = self.path(index), self.bad_images.max_pixels
        jpeg = None if self.decoder == "pillow" else open_jpeg(path, limit, self.upright)
        if jpeg is not None:
            with seeded("image", self.seed, *key), suppress(JpegError):  # Pillow judges the damage
                return Sample(self.transform(jpeg), int(self.labels[index]), key)
        image = self.reader(path)
        with seeded("image", self.seed, *key):
            tensor = self.transform(image)
        return Sample(tensor, int(self.labels[index]), key)

    def unreadable(self, key: tuple[int, int]) -> Sample:
        """A black image that belongs to no class."""
        with seeded("image", self.seed, *key):
            tensor = self.transform(self.reader.black())
        return Sample(tensor, UNREADABLE, key)


def list_splits(
    data: DataConfig, num_classes: int, splits: Sequence[str] = ("train", "val")
) -> dict[str, Listing]:
    """The files of a run's splits, listed once and checked before the run; no image is opened.

    Args:
        data: the data set.
        num_classes: classes of the model's classifier.
        splits: splits that the run needs; all must have the classes of the first.

    Raises:
        DataError: with what was expected and what was found; or there is only one class.
    """
    listings = {split: list_split(data, split) for split in splits}
    first, *others = splits
    classes = list(listings[first].classes)
    where = {split: f"data.dataset {data.dataset!r}, {split}" for split in splits}
    if data.dataset == "folder":
        where = {split: str(Path(data.root) / split) for split in splits}
    if len(classes) == 1 and "train" in splits:
        raise DataError(
            f"{where[first]} has one class ({classes[0]}): there is nothing to tell apart, "
            "every network is right; add a folder of other images"
        )
    for split in others:
        found = list(listings[split].classes)
        if found != classes:
            missing = sorted(set(classes) - set(found))
            unknown = sorted(set(found) - set(classes))
            differences = [
                f"{what} {_some(names)}"
                for what, names in (("lacks", missing), ("has besides", unknown))
                if names
            ] or ["has them in another order"]
            raise DataError(
                f"{where[split]} must have the classes of {where[first]}, but "
                + " and ".join(differences)
            )
    if len(classes) != num_classes:
        raise DataError(
            f"{where[first]} has {len(classes)} classes ({_some(classes)}), but "
            f"model.num_classes is {num_classes}: set model.num_classes to {len(classes)}, "
            "or data.root to the folder that was meant"
        )
    return listings


def _find_classes(folder: Path) -> list[str]:
    """Names of the class folders of a split, sorted."""
    root = folder.parent
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"data.root {root} {what}; {_LAYOUT}")
    if not folder.is_dir():
        raise DataError(f"data.root {root} has no {folder.name}/; {_LAYOUT}; {_found(root)}")
    with os.scandir(folder) as entries:
        classes = sorted(e.name for e in entries if e.is_dir() and not is_hidden(e.name))
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


def _beside(folder: Path) -> Iterator[str]:
    """Other contents beside the class folders, by kind."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir() and is_hidden(entry.name):
                yield "hidden folders"
            elif not entry.is_dir() and not is_hidden(entry.name):
                yield "files beside the class folders"


def _found(folder: Path) -> str:
    """The contents of a folder, for an error message."""
    with os.scandir(folder) as entries:
        names = sorted(e.name + "/" if e.is_dir() else e.name for e in entries)
    images = sum(map(is_image, names))
    flat = f", {images} of them images" if images else ""
    return f"{folder} holds {_some(names)}{flat}" if names else f"{folder} is empty"


def _some(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
