"""tiny-imagenet-100: a data set of real images on which a table takes hours, not weeks.

Tiny-ImageNet (Stanford CS231n) has 200 classes of ILSVRC2012 at 64x64, with 500 training and 50
validation images each. This subset has every second class, in the order of their wnids, with the
first 300 training images by name and all validation images: 30,000 and 5,000 images. From the
original archive, http://cs231n.stanford.edu/tiny-imagenet-200.zip, or from one of the subset::

    python -m kw.data.tiny_imagenet ARCHIVE data/tiny-imagenet-100

Settings are chosen on images that no published figure uses: with
``--hold-out 50`` the last 50 training images of every class are the validation set, and the real
one is left out.

The images are ImageNet's: for non-commercial research and education, by its terms.
"""

from __future__ import annotations

import os
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from kw.data.reading import DataError
from kw.data.whole_folder import run_writer, whole_folder

CLASSES = 100
_TRAIN_PER_CLASS, _VAL_PER_CLASS = 300, 50
_LARGEST = 2**20  # bytes of a file: the images have a few thousand


def prepare(
    archive: str | os.PathLike[str], root: str | os.PathLike[str], hold_out: int = 0
) -> dict[str, int]:
    """Lay the subset out as ``root/{train,val}/<wnid>/*.JPEG``, and check its counts.

    The folder appears only when it is complete; one that is complete is checked and left as it is.

    Args:
        archive: ``tiny-imagenet-200.zip`` as Stanford distributes it, or a ``.tar`` or ``.tar.gz``
            of ``train/<wnid>/*.JPEG`` and ``val/<wnid>/*.JPEG`` in one folder.
        root: folder to write; it must be absent, empty, or written by this function before.
        hold_out: training images of every class that make ``val``, in place of the validation
            images; 0: the validation images.

    Returns:
        The number of images in ``train`` and ``val``.

    Raises:
        DataError: ``root`` has other content, the archive cannot be read or is another one, or a
            count is wrong.
    """
    root = Path(root).expanduser().absolute()
    if not 0 <= hold_out < _TRAIN_PER_CLASS:
        raise DataError(f"--hold-out {hold_out}: expected 0 to {_TRAIN_PER_CLASS - 1} images")
    sizes = {"train": _TRAIN_PER_CLASS - hold_out, "val": hold_out or _VAL_PER_CLASS}
    settings = {"classes": CLASSES, **sizes}
    try:
        with whole_folder(root, "tiny-imagenet.json", settings, "images") as folder:
            if folder is None:
                return _counts(root, sizes)
            with _opened(Path(archive)) as files:
                for name, target in _chosen(files, hold_out):
                    path = folder / target
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(files[name]())
            return _counts(folder, sizes)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{archive}: cannot be read as an archive: {error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[dict[str, Callable[[], bytes]]]:
    """What reads each file of an archive; in its own order, since a compressed one cannot be read
    backwards."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected tiny-imagenet-200.zip or a .tar.gz of it")

    def read(name: str, size: int, begin: Callable[[Any], Any], member: Any) -> bytes:
        if size > _LARGEST:
            raise DataError(f"{path}: {name} has {size:,} bytes: that is no image of 64x64 pixels")
        with begin(member) as stream:
            return bytes(stream.read())

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            yield {
                m.filename: partial(read, m.filename, m.file_size, file.open, m)
                for m in file.infolist()
            }
        return
    with tarfile.open(path) as tar:
        members = [m for m in tar if m.isfile()]
        yield {m.name: partial(read, m.name, m.size, tar.extractfile, m) for m in members}


def _chosen(files: Mapping[str, Callable[[], bytes]], hold_out: int) -> Iterator[tuple[str, Path]]:
    """The subset's files, each with its place: names of the archive are never taken as paths."""
    names = list(files)
    parts = {name: PurePosixPath(name).parts[1:] for name in names if name.endswith(".JPEG")}
    train = {name: p[1] for name, p in parts.items() if p[:1] == ("train",) and len(p) > 2}
    val = {name: p[1] for name, p in parts.items() if p[:1] == ("val",) and len(p) == 3}
    labelled = [name for name in names if name.endswith("val_annotations.txt")]
    if labelled:  # the original, whose validation images lie in one folder
        lines = [line.split("\t") for line in files[labelled[0]]().decode().splitlines()]
        wnids = {line[0]: line[1] for line in lines if len(line) > 1}
        val = {name: wnids.get(Path(name).name, "") for name in val}
    kept = set(sorted({wnid for wnid in train.values() if wnid.isalnum()})[:: 2 if labelled else 1])
    taken: Counter[str] = Counter()
    first: dict[str, str] = {}
    for name in sorted(train, key=lambda name: Path(name).name):
        if train[name] in kept and taken[train[name]] < _TRAIN_PER_CLASS:
            taken[train[name]] += 1
            is_held_out = taken[train[name]] > _TRAIN_PER_CLASS - hold_out
            first[name] = "val" if is_held_out else "train"
    for name in names:
        if name in first:
            yield name, Path(first[name], train[name], Path(name).name)
        elif not hold_out and val.get(name) in kept:
            yield name, Path("val", val[name], Path(name).name)


def _counts(root: Path, sizes: dict[str, int]) -> dict[str, int]:
    """Images of both splits, each checked class by class."""
    counts = {}
    for split, expected in sizes.items():
        found = Counter(path.parent.name for path in (root / split).glob("*/*.JPEG"))
        odd = [f"{wnid} ({n})" for wnid, n in sorted(found.items()) if n != expected]
        if len(found) != CLASSES or odd:
            raise DataError(
                f"{split}/ has {len(found)} classes, expected {CLASSES}"
                + (f"; with other than {expected} images: {', '.join(odd[:5])}" if odd else "")
                + "; is the archive complete, and Tiny-ImageNet's?"
            )
        counts[split] = found.total()
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see :func:`kw.data.whole_folder.run_writer`."""
    return run_writer(
        prepare,
        "tiny-imagenet-100: {train} training and {val} validation images of "
        f"{CLASSES} classes in {{root}}",
        arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
