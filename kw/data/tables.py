"""Images with their labels beside them: WebDataset's shards, CSV files, Hugging Face's sets."""

from __future__ import annotations

import csv
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kw.data.archives import Member, list_archived, opened_tar, tar_files
from kw.data.listing import Listing
from kw.data.reading import BadImageError, DataError
from kw.data.walk import is_hidden, is_image
from kw.registry import DATASETS


@DATASETS.register("webdataset")
def list_webdataset(
    root: Path, split: str, label: str = "cls", shards: str = "{split}*.tar", image: str = ""
) -> Listing:
    """WebDataset's shards ``root/split*.tar``: samples are members whose names differ in their
    endings alone, an image and its label.

    Args:
        root: their folder.
        split: the shards' names begin with it.
        label: ending of the label's member: a class's number, or its name.
        shards: pattern of the shards' names, with ``{split}`` in it.
        image: ending of the image's member, where samples have several images.

    Raises:
        DataError: there are no shards; a sample has no image, several, or no label; a member comes
            twice.
    """
    root, label, image = root.expanduser(), label.lower(), image.lower()
    _check_pattern("shards", shards)
    pattern = shards.replace("{split}", split)
    files = sorted(root.glob(pattern))
    if not files:
        raise DataError(f"{root} has no {pattern}")
    members, labels, incomplete = [], [], 0
    for place, file in enumerate(files):
        with opened_tar(file) as archive:
            for found in _samples(archive):
                images = [e for e in found if (e == image if image else is_image(f"x.{e}"))]
                text = archive.extractfile(found[label]) if label in found else None
                if not images or text is None:
                    incomplete += 1
                    continue
                kept = found[images[0]]
                if len(images) > 1:
                    raise DataError(
                        f"{file}: {kept.name}: a sample of several images ({', '.join(images)}); "
                        "data.dataset_args {image: ...} names the ending of one"
                    )
                members.append(Member(kept.name, place, kept.offset_data, kept.size))
                labels.append(text.read().decode("utf-8", "surrogateescape").strip())
    if incomplete:
        raise DataError(
            f"{root}/{pattern}: {incomplete} samples without an image or without .{label}; "
            "data.dataset_args {label: ...} names the ending of the labels"
        )
    if all(each.isdigit() for each in labels):
        places = [int(each) for each in labels]
        classes = _classes(root)
        if classes is None:
            classes = [str(i) for i in range(max(places, default=-1) + 1)]
    else:
        classes = sorted(set(labels))
        numbers_of = {name: place for place, name in enumerate(classes)}
        places = [numbers_of[each] for each in labels]
    return list_archived(files, members, places, classes)


def _samples(archive: tarfile.TarFile) -> Iterator[dict[str, tarfile.TarInfo]]:
    """A sample's members by ending; all of a sample stand one after another."""
    key: tuple[str, str] | None = None
    found: dict[str, tarfile.TarInfo] = {}
    for member in tar_files(archive):
        folder, name = os.path.split(member.name)
        if is_hidden(name):
            continue
        stem, _, ending = name.partition(".")
        if (folder, stem) != key and found:
            yield found
            found = {}
        key = (folder, stem)
        if ending.lower() in found:
            shard = os.fsdecode(archive.name or "")
            raise DataError(f"{shard}: {member.name} comes twice; write the shard anew")
        found[ending.lower()] = member
    if found:
        yield found


@DATASETS.register("csv")
def list_csv(
    root: Path,
    split: str,
    table: str = "{split}.csv",
    file: str = "file",
    label: str = "label",
    separator: str | None = None,
) -> Listing:
    """``root/split.csv`` with a line for every image: its file, below ``root``, and its label.

    The classes are the labels of the table of ``train``, sorted by name; or the lines of
    ``root/classes.txt``, in their order.

    Args:
        root: the folder of the tables.
        split: ``"train"`` or ``"val"``.
        table: name of the table, with ``{split}`` in it.
        file: heading of the column of files.
        label: heading of the column of labels.
        separator: between labels; with it, an image may have any number of classes, and none.

    Raises:
        DataError: a table, a column or a file's name is missing, or a label is none of the classes.
    """
    root = root.expanduser()
    _check_pattern("table", table)
    where = root / table.replace("{split}", split)
    rows = _read(where, file, label)
    classes = _classes(root)
    if classes is None:
        first = root / table.replace("{split}", "train")
        known = rows if first == where or not first.is_file() else _read(first, file, label)
        classes = sorted({name for _, text in known for name in _names(text, separator)})
    places = {name: place for place, name in enumerate(classes)}
    labels = []
    for line, (name, text) in enumerate(rows, 2):
        if not name:
            raise DataError(f"{where}:{line}: expected the name of a file, found none")
        names = _names(text, separator)
        unknown = [name for name in names if name not in places]
        if unknown or (separator is None and not names):
            raise DataError(
                f"{where}:{line}: label {text!r}: expected one of {len(classes)} classes; "
                "the table of train, or classes.txt, lists them"
            )
        labels.append([places[name] for name in names])
    files = [root / name for name, _ in rows]
    if separator is None:
        return Listing(files, [places_[0] for places_ in labels], classes)
    several = np.zeros((len(files), len(classes)), dtype=bool)
    for row, chosen in zip(several, labels, strict=True):
        row[chosen] = True
    return Listing(files, several, classes)


def _classes(root: Path) -> list[str] | None:
    """The lines of ``root/classes.txt``, where there is one."""
    file = root / "classes.txt"
    if not file.is_file():
        return None
    try:
        lines = file.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is no text in UTF-8: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def _check_pattern(key: str, pattern: str) -> None:
    if "{split}" not in pattern:  # the splits would have the same images
        raise DataError(f"data.dataset_args {key} {pattern!r}: expected {{split}} in it")


def _names(text: str, separator: str | None) -> list[str]:
    parts = [text] if separator is None else text.split(separator)
    return [part.strip() for part in parts if part.strip()]


def _read(path: Path, file: str, label: str) -> list[tuple[str, str]]:
    """File and label of every line."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            table = csv.DictReader(stream)
            missing = [name for name in (file, label) if name not in (table.fieldnames or ())]
            if missing:
                raise DataError(
                    f"{path} has no column {missing[0]!r}: its first line is "
                    f"{','.join(table.fieldnames or ())!r}; data.dataset_args {{file: ..., "
                    "label: ...}} name the columns"
                )
            return [(row[file] or "", row[label] or "") for row in table]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no CSV file in UTF-8: {error}") from error


@DATASETS.register("huggingface")
def list_hub(
    root: Path,
    split: str,
    image: str = "image",
    label: str = "label",
    splits: dict[str, str] | None = None,
    args: dict[str, Any] | None = None,
) -> Listing:
    """A data set that ``datasets.load_dataset`` loads: parquet or Arrow files in a folder, or a
    name on Hugging Face's hub. Images stay encoded, as their files were.

    Args:
        root: the folder, or the name.
        split: ``"train"`` or ``"val"``.
        image: name of the column of images.
        label: name of the column of labels, classes or (a sequence) several of them.
        splits: the data set's names of ``train`` and ``val``; left out, ``val`` is its
            ``validation``, or else its ``test``.
        args: further arguments of ``load_dataset``.

    Raises:
        DataError: ``datasets`` is not installed, cannot load the set, or has no such column.
    """
    if "trust_remote_code" in (args or {}) or str(root) == "pandas":  # pickled files
        raise DataError(
            "data.dataset huggingface: a configuration runs no code: trust_remote_code and pandas "
            "are refused; store the set as parquet files"
        )
    try:
        import datasets
    except ImportError as error:
        raise DataError("data.dataset huggingface: pip install datasets") from error
    name = str(root.expanduser()) if root.expanduser().exists() else str(root)
    try:
        loaded = datasets.load_dataset(name, **(args or {}))
    except Exception as error:  # of many kinds, of files and of the network
        raise DataError(f"data.root {name}: datasets cannot load it: {error}") from error
    wanted = (splits or {}).get(split)
    names = [wanted] if wanted else {"val": ["val", "validation", "test"]}.get(split, [split])
    found = next((loaded[each] for each in names if each in loaded), None)
    if found is None:
        raise DataError(
            f"data.root {name} has no split {' or '.join(names)}; it has {', '.join(loaded)}; "
            "data.dataset_args {splits: {val: ...}} names it"
        )
    for column in (image, label):
        if column not in found.features:
            raise DataError(
                f"data.root {name} has no column {column!r}; it has {', '.join(found.features)}"
            )
    kind = found.features[label]
    several = hasattr(kind, "feature")
    kind = kind.feature if several else kind
    if not hasattr(kind, "names"):
        raise DataError(
            f"data.root {name}: column {label!r} has no names of classes (datasets.ClassLabel)"
        )
    labels: Any = found[label]
    if several:
        rows = labels
        labels = np.zeros((len(found), len(kind.names)), dtype=bool)
        for row, chosen in zip(labels, rows, strict=True):
            row[list(chosen)] = True
    else:
        labels = [each if each is None else int(each) for each in labels]  # None is none of them
    encoded = found.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    rows = _RowNames(f"{name}, {split}", len(encoded))
    return Listing(_Column(encoded, image, rows), labels, list(kind.names), rows)


class _Column(Sequence[Any]):
    """Encoded images of a data set."""

    def __init__(self, rows: Any, column: str, names: Sequence[str]) -> None:
        self.rows, self.column, self.names = rows, column, names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        found = self.rows[index][self.column]
        if found is None:
            raise BadImageError.of(self.names[index], "the row has no image")
        return Path(found["path"]) if found["bytes"] is None else found["bytes"]


class _RowNames(Sequence[str]):
    def __init__(self, name: str, count: int) -> None:
        self.name, self.rows = name, count

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: Any) -> Any:
        return f"{self.name}, row {range(self.rows)[index]}"  # beyond the last: IndexError
