"""The files, labels and classes of a split, from a folder or another listing; checks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from kw.config.data_schema import DataConfig
from kw.data.reading import DataError
from kw.data.seeding import derive_seed
from kw.data.walk import IMAGE_EXTENSIONS, describe, is_hidden, is_image, walk_images
from kw.errors import say
from kw.registry import DATASETS, argument_fault

_LAYOUT = "expected train/ and val/, each with one folder of images per class"
_ARCHIVES = {".zip": "zip", ".tar": "tar"}

Stored: TypeAlias = "Path | bytes | memoryview | np.ndarray"
"""An image as it is stored: a file, a file's content, or pixels, uint8 ``[H, W, 3]``."""


class Listing(NamedTuple):
    """The images, labels and classes of a split, from an entry of :data:`kw.registry.DATASETS`."""

    files: Sequence[Stored]
    """read one by one, in any order and process: a list of paths, or whatever gives one when asked
    for ``files[i]``"""
    labels: Sequence[int] | np.ndarray
    """of each file a place in ``classes``; or all its classes, bool ``[files, classes]``"""
    classes: Sequence[str]
    names: Sequence[str] | None = None
    """of the files, for messages; left out, their paths"""

    @property
    def identity(self) -> tuple[int, bytes]:
        """The number of images, and what tells their labels from others."""
        labels = np.asarray(self.labels)
        return len(labels), labels.tobytes()


@DATASETS.register("folder")
def list_folders(
    root: Path, split: str, validation: float | None = None, split_seed: int = 0
) -> Listing:
    """``root/split/CLASS/**``: a folder for every class, in the order of their names.

    Hidden files and files that are no images (:mod:`.walk`) are left out, with a message.

    Args:
        root: the data set.
        split: ``"train"`` or ``"val"``.
        validation: the classes' folders are ``root/CLASS``, and this fraction of each class's
            images, above 0 and below 1, is ``val``; at least one image and not all of them.
        split_seed: seed of the choice. It is drawn for each class from its sorted files.

    Raises:
        DataError: the folder is missing or not laid out as expected; a class has one image, and is
            to be divided.
    """
    folder = root.expanduser() if validation else root.expanduser() / split
    left_out: Counter[str] = Counter()
    classes = _find_classes(folder, bool(validation), left_out)
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
    labels = np.array([label for _, label in samples])
    filled = set(labels.tolist())
    if empty := [name for label, name in enumerate(classes) if label not in filled]:
        raise DataError(
            f"{len(empty)} of {len(classes)} class folders in {folder} have no image: "
            f"{_some(empty)}; expected files named {', '.join('*' + e for e in IMAGE_EXTENSIONS)}; "
            f"{_found(folder / empty[0])}"
        )
    files = [path for path, _ in samples]
    if validation is not None:
        chosen = _chosen(labels, classes, validation, split_seed)
        kept = np.flatnonzero(chosen == (split == "val"))
        files, labels = [files[i] for i in kept], labels[kept]
    return Listing(files, labels.tolist(), classes)


def _chosen(labels: np.ndarray, classes: Sequence[str], validation: float, seed: int) -> np.ndarray:
    """Which images are for validation, bool ``[images]``."""
    if not 0 < validation < 1:
        raise DataError(f"validation {validation}: expected a fraction between 0 and 1")
    chosen = np.zeros(len(labels), dtype=bool)
    for label, name in enumerate(classes):
        places = np.flatnonzero(labels == label)
        if len(places) < 2:
            raise DataError(f"class {name} has one image, which cannot be divided; add another")
        count = min(max(round(validation * len(places)), 1), len(places) - 1)
        generator = torch.Generator().manual_seed(derive_seed("split", seed, name))
        chosen[places[torch.randperm(len(places), generator=generator)[:count].numpy()]] = True
    return chosen


def list_split(data: DataConfig, split: str) -> Listing:
    """A split as the configuration says, checked; a ``data.root`` that is a ZIP or TAR file is
    taken for one.

    Raises:
        DataError: the data set's function fails or has no such arguments, or its listing is
            inconsistent.
    """
    kind, root = data.dataset, Path(data.root)
    if kind == "folder" and root.suffix.lower() in _ARCHIVES and root.expanduser().is_file():
        kind = _ARCHIVES[root.suffix.lower()]
    function, args = DATASETS.find(kind), data.dataset_args
    fault = argument_fault(function, args, 2) if isinstance(args, dict) else "a mapping"
    if fault:
        raise DataError(f"data.dataset_args {args} of data.dataset {kind}: expected {fault}")
    found = function(root, split, **args)
    where = f"data.dataset {kind!r}, {split}"
    if not len(found.files) or len(found.files) != len(found.labels):
        raise DataError(f"{where}: {len(found.files)} files and {len(found.labels)} labels")
    if found.names is not None and len(found.names) != len(found.files):
        raise DataError(f"{where}: {len(found.files)} files and {len(found.names)} names")
    _check_labels(found, where)
    if len(set(found.classes)) != len(found.classes):
        raise DataError(f"{where}: a class has its name twice")
    return found


def _check_labels(found: Listing, where: str) -> None:
    count = len(found.classes)
    labels = found.labels
    if isinstance(labels, np.ndarray) and labels.ndim == 2:
        if labels.dtype != bool or labels.shape[1] != count:
            raise DataError(
                f"{where}: labels of {labels.dtype} {list(labels.shape)}: expected bool "
                f"[files, {count} classes]"
            )
        return
    places = range(count)
    wrong = [label for label in labels if label not in places]  # a fraction is in none
    if wrong:
        raise DataError(f"{where}: label {wrong[0]!r}: expected a place among {count} classes")


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


def _find_classes(folder: Path, undivided: bool, left_out: Counter[str]) -> list[str]:
    """Names of the class folders of a split, or of an undivided set, sorted; what lies beside them
    is counted by kind."""
    root = folder if undivided else folder.parent
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"data.root {root} {what}; {_LAYOUT}")
    if not folder.is_dir():
        raise DataError(f"data.root {root} has no {folder.name}/; {_LAYOUT}; {_found(root)}")
    classes = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir() and not is_hidden(entry.name):
                classes.append(entry.name)
            elif entry.is_dir():
                left_out["hidden folders"] += 1
            elif not is_hidden(entry.name):
                left_out["files beside the class folders"] += 1
    if not classes:
        raise DataError(f"{folder} has no class folders; {_LAYOUT}; {_found(folder)}")
    return sorted(classes)


def _found(folder: Path) -> str:
    """The contents of a folder, for an error message."""
    with os.scandir(folder) as entries:
        names = sorted(e.name + "/" if e.is_dir() else e.name for e in entries)
    images = sum(map(is_image, names))
    flat = f", {images} of them images" if images else ""
    return f"{folder} holds {_some(names)}{flat}" if names else f"{folder} is empty"


def _some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
