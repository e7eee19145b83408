"""ImageNet's other test sets: files in their authors' layouts, and which predictions are right.

:data:`SETS` has the layouts; docs/evaluation.md says what counts in each set.

Sources: ReaL, Beyer et al., *Are we done with ImageNet?*, arXiv:2006.07159, and its repository
google-research/reassessed-imagenet. V2, Recht et al., ICML 2019. A, Hendrycks et al., *Natural
adversarial examples*, CVPR 2021. R, Hendrycks et al., *The many faces of robustness*, ICCV 2021;
the evaluation of both keeps the logits of 200 classes. Sketch, Wang et al., NeurIPS 2019. C,
Hendrycks and Dietterich, ICLR 2019.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Subset

from ..data import DataError, Listing
from ..data.archives import Names
from ..data.walk import is_hidden, walk_images
from ..errors import say
from .corruptions import ALEXNET_ERRORS, corruption_errors

_SEVERITIES = ("1", "2", "3", "4", "5")
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\b")
_REMEDY = (
    "these sets are for networks whose classes are named as ImageNet's folders are (n01440764, "
    "...), with all of the set's classes among them"
)


@dataclass(frozen=True)
class TestSet:
    """Images to evaluate, and what counts as right."""

    __test__ = False  # no class of tests

    name: str  # "val", or a key of SETS
    title: str  # for people
    listing: Listing  # files, labels, and the classes of the model
    subset: Sequence[int] | None = None  # classes whose logits count; None for all
    # [N, K], the labels that are right for each image, where there may be several; an image's fewer
    # are repeated
    accepted: Any = None
    groups: Sequence[tuple[str, int]] = ()  # (corruption, severity) in the order of the files
    group: Any = None  # [N], the place in groups of each image
    complete: bool | None = None  # whether it has as many images as the authors'; None for "val"

    def hits(self, best: Any) -> Any:
        """Which of an image's best classes, ``[N, 5]``, are right: a boolean array like it."""
        if self.accepted is not None:
            return (best[:, :, None] == self.accepted[:, None, :]).any(2)
        return best == np.asarray(self.listing.labels)[:, None]

    def refine(self, figures: Mapping[str, Any], best: Any) -> dict[str, Any]:
        """The figures of this set.

        Args:
            figures: of plain accuracy, :meth:`kw.evaluation.Accuracy.compute`.
            best: ``[N, 5]``, the best classes of every image, -1 where there is none.

        Returns:
            The same; with several labels an image, ``top1`` and ``top5`` by all of them and no
            ``loss``; with corruptions, :func:`corruption_errors` besides.
        """
        found = dict(figures)
        if self.accepted is not None:
            hits = self.hits(best)
            found.update(top1=100 * hits[:, 0].mean(), top5=100 * hits.any(1).mean())
            del found["loss"]
        if self.groups:
            found.update(corruption_errors(self.group_errors(best)))
        return found

    def group_errors(self, best: Any) -> dict[tuple[str, int], float]:
        """Top-1 error of each corruption and severity, percent."""
        wrong = ~self.hits(best)[:, 0]
        counts = np.bincount(self.group, minlength=len(self.groups))
        errors = 100 * np.bincount(self.group, wrong, len(self.groups)) / counts
        return dict(zip(self.groups, errors.tolist(), strict=True))


@cache
def wnids() -> tuple[str, ...]:
    """The WordNet ids of ImageNet-1k's classes in the order of their labels, as timm has them."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


def readable(names: Sequence[str]) -> list[str]:
    """Names of classes for people: of a WordNet id of ImageNet-1k, its first word in English."""
    from timm.data import ImageNetInfo

    info, known = ImageNetInfo("imagenet-1k"), set(wnids())
    words = (info.label_name_to_description(n).split(",")[0] if n in known else n for n in names)
    return list(words)


def open_set(
    name: str, root: Path | None, classes: Sequence[str], val: Callable[[], Listing]
) -> TestSet:
    """List a set's images and check it against a model's classes.

    Args:
        name: a key of :data:`SETS`.
        root: the set's folder; of ``real``, that file or its folder, or ``None`` for the labels
            that timm brings.
        classes: of the model, by name.
        val: lists ``data.root``'s validation images; of ``real``, these are the images.

    Raises:
        DataError: the folder is not laid out as the authors', or has classes that the model does
            not; the message says what was found.
    """
    layout = SETS[name]
    if root is None and name != "real":
        raise DataError(f"--set {name}: give the folder of {layout.title} as --set-root")
    root = None if root is None else root.expanduser()
    if root is not None and not root.exists():
        raise DataError(f"--set-root {root}: no such file or folder; expected {layout.expected}")
    if root is not None and name != "real" and not root.is_dir():
        raise DataError(f"--set-root {root} is a file; expected {layout.expected}")
    try:
        content = layout.read(root, classes, val)
    except DataError as error:
        raise DataError(f"--set {name}: {error}; expected {layout.expected}") from error
    images = len(content["listing"].files)
    expected = layout.images * max(len(content.get("groups", ())), 1)
    if images != expected:
        say(
            f"{layout.title}: {images:,} images of the {expected:,} that the authors' set has: "
            "figures are not comparable with published ones"
        )
    return TestSet(name, layout.title, complete=images == expected, **content)


Content = dict[str, Any]


def _read_real(root: Path | None, classes: Sequence[str], val: Callable[[], Listing]) -> Content:
    labels, where = _real_labels(root)
    listing = val()
    places: dict[int, int] = {}  # of an image's number, from 1, in the listing
    named = listing.names or [str(f) if isinstance(f, Path) else "?" for f in listing.files]
    for place, file in enumerate(named):
        found = _VAL_NAME.search(Path(file).name)
        number = int(found[1]) if found else 0
        if not 1 <= number <= len(labels) or number in places:
            why = "a second of that number" if number in places else f"{len(labels):,} are labelled"
            raise DataError(f"{file}: {why}; images have their original names")
        places[number] = place
    kept = [number for number, right in enumerate(labels, 1) if right]
    if missing := [number for number in kept if number not in places]:
        raise DataError(
            f"{len(missing):,} of the {len(kept):,} images that {where} labels are not among the "
            f"validation images (data.root): ILSVRC2012_val_{missing[0]:08d} and so on"
        )
    if not kept:
        raise DataError(f"{where} has no label")
    used = sorted({label for right in labels for label in right})
    of = dict(zip(used, _places([wnids()[k] for k in used], classes), strict=True))
    most = max(map(len, labels))
    accepted = [[of[k] for k in labels[n - 1]] for n in kept]
    accepted = [right + right[:1] * (most - len(right)) for right in accepted]
    chosen = [places[number] for number in kept]
    names = None if listing.names is None else [listing.names[place] for place in chosen]
    own = [int(listing.labels[place]) for place in chosen]
    stored: Any = listing.files
    files: Any = Subset(stored, chosen)  # each is read when it is asked for
    return {
        "listing": Listing(files, own, list(classes), names),
        "accepted": np.array(accepted),
    }


def _real_labels(root: Path | None) -> tuple[list[list[int]], str]:
    """The labels of every original image, and what messages call their file."""
    if root is None:
        file: Any = resources.files("timm.data") / "_info" / "imagenet_real_labels.json"
    else:
        file = root / "real.json" if root.is_dir() else root
    try:
        labels = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    if not isinstance(labels, list) or not all(
        isinstance(right, list) and all(type(k) is int and 0 <= k < len(wnids()) for k in right)
        for right in labels
    ):
        raise DataError(f"{file}: is no list of lists of labels from 0 to {len(wnids()) - 1}")
    return labels, str(file)


def _read_numbers(root: Path | None, classes: Sequence[str], _: Any) -> Content:
    folders, names = _folders(root), {str(i): name for i, name in enumerate(wnids())}
    if wrong := [number for number in folders if number not in names]:
        raise DataError(f"{root}: folder {wrong[0]!r} is no number of a class, 0 to 999")
    named = {names[number]: folder for number, folder in folders.items()}
    return {"listing": _listing(named, classes)}


def _read_names(root: Path | None, classes: Sequence[str], _: Any) -> Content:
    return {"listing": _listing(_folders(root), classes)}


def _read_subset(root: Path | None, classes: Sequence[str], _: Any) -> Content:
    content = _read_names(root, classes, _)
    return {**content, "subset": sorted(set(content["listing"].labels))}


def _read_corruptions(root: Path | None, classes: Sequence[str], _: Any) -> Content:
    found: dict[str, dict[str, Path]] = {}
    for name, folder in _folders(root).items():
        inside = _folders(folder)
        # noise/, blur/, weather/, digital/ and extra/ are how the authors' archives group them.
        grouped = not set(inside) & set(_SEVERITIES)
        for each, where in inside.items() if grouped else [(name, folder)]:
            levels = _folders(where)
            if set(levels) != set(_SEVERITIES) or each in found:
                raise DataError(f"{where}: found {_some(list(levels))}; each corruption once")
            found[each] = levels
    files: list[str] = []
    labels: list[int] = []
    groups = [(name, int(level)) for name in found for level in _SEVERITIES]
    counts = []
    for name, level in groups:
        part = _listing(_folders(found[name][str(level)]), classes)
        files += map(str, part.files)
        labels += part.labels
        counts.append(len(part.files))
        if counts[-1] != counts[0]:
            raise DataError(
                f"{found[name][str(level)]} has {counts[-1]:,} images and {groups[0][0]}/1 has "
                f"{counts[0]:,}: something is missing"
            )
    if missing := [name for name in ALEXNET_ERRORS if name not in found]:
        say(f"{root}: no mean corruption error without {_some(missing)}")
    return {
        "listing": Listing(_Files(Names.of(files)), np.array(labels), list(classes)),
        "groups": groups,
        "group": np.repeat(np.arange(len(groups)), counts),
    }


class _Files(Sequence[Any]):
    """Paths whose names lie in two arrays: ImageNet-C has millions."""

    def __init__(self, names: Names) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        return Path(self.names[index])


def _folders(root: Path | None) -> dict[str, Path]:
    """The folders in a folder by name, in that order."""
    assert root is not None
    with os.scandir(root) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not is_hidden(e.name))
    if not names:
        raise DataError(f"{root} has no folders")
    return {name: root / name for name in names}


def _listing(folders: Mapping[str, Path], classes: Sequence[str]) -> Listing:
    """The images of folders by class.

    Raises:
        DataError: a folder has no image, or the model lacks its class.
    """
    files: list[Path] = []
    labels: list[int] = []
    for folder, label in zip(folders.values(), _places(list(folders), classes), strict=True):
        found = list(walk_images(folder))
        if not found:
            raise DataError(f"{folder} has no image")
        files += found
        labels += [label] * len(found)
    return Listing(files, labels, list(classes))


def _places(names: Sequence[str], classes: Sequence[str]) -> list[int]:
    """The places of a set's classes among the model's.

    Raises:
        DataError: the model lacks some.
    """
    index = {name: place for place, name in enumerate(classes)}
    if unknown := [name for name in names if name not in index]:
        raise DataError(
            f"{len(unknown)} of its {len(names)} classes are not among the model's: "
            f"{_some(unknown)} (the model has {_some(classes)}); {_REMEDY}"
        )
    return [index[name] for name in names]


def _some(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@dataclass(frozen=True)
class _Layout:
    """A set: its title, the images of the authors' (of ``c``, of each part), and how it is read."""

    title: str
    images: int
    expected: str
    read: Callable[[Path | None, Sequence[str], Callable[[], Listing]], Content]
    crop_ratio: float | None = None
    """``data.test_crop_ratio`` that its authors evaluate with, in place of the configuration's"""


SETS = {
    "real": _Layout(
        "ImageNet-ReaL", 46_837, "real.json, and data.root with all original images", _read_real
    ),
    "v2": _Layout("ImageNet-V2", 10_000, "folders 0 to 999 of images", _read_numbers),
    "a": _Layout("ImageNet-A", 7_500, "folders n01498041, ... of images", _read_subset),
    "r": _Layout("ImageNet-R", 30_000, "folders n01443537, ... of images", _read_subset),
    "sketch": _Layout("ImageNet-Sketch", 50_889, "folders n01440764, ... of images", _read_names),
    "c": _Layout(
        "ImageNet-C",
        50_000,
        "folders gaussian_noise/1/n01440764, ... of images, all severities 1 to 5 of a corruption",
        _read_corruptions,
        # Its images have 224 x 224 pixels: the authors cut the centre out and resize nothing.
        1.0,
    ),
}
"""By the name of ``kw test --set``."""
