"""Annotation files in COCO's format: reading them, and checking a set before training starts.

A file is ``{"images": [{id, file_name, width, height}], "annotations": [{id, image_id, category_id,
bbox, area, segmentation, iscrowd}], "categories": [{id, name}]}``; ``bbox`` is ``[left, top, width,
height]`` in pixels, ``segmentation`` and ``iscrowd`` may be absent.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

from kw.data.reading import DataError
from kw.detection.findings import Report, some
from kw.detection.image_checks import check_images, check_leak
from kw.detection.object_checks import check_boxes, check_masks, is_box
from kw.detection.schema import CocoDataConfig
from kw.detection.usage import OUTSIDE, Usage, why_unused

_TABLES = ("images", "annotations", "categories")
# LVIS's lists: categories that were searched for in an image, and those annotated incompletely.
_FEDERATED = ("neg_category_ids", "not_exhaustive_category_ids")


class _Content(dict[str, Any]):
    """That of a file; a plain dict takes no weak references."""


_in_use: WeakValueDictionary[tuple[str, int, int], _Content] = WeakValueDictionary()
"""By the file's path, time and size."""


class _Unusable(DataError):
    """A file that cannot be checked further; ``kind`` is that of the finding."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind


def load_annotations(
    annotations_file: str | os.PathLike[str], tables: Sequence[str] = _TABLES
) -> dict[str, Any]:
    """Read a file in COCO's format, with or without a byte-order mark; only the outer structure of
    its content is checked. A file is not read again while its content is in use: change none.

    Raises:
        DataError: it cannot be read, is not JSON, or lacks one of the lists ``tables``.
    """
    file = os.fspath(annotations_file)
    try:
        with open(file, "rb") as stream:
            status = os.fstat(stream.fileno())
            key = os.path.realpath(file), status.st_mtime_ns, status.st_size
            content = _in_use[key] if key in _in_use else json.load(stream)
    except OSError as error:
        raise _Unusable("file", f"{file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _Unusable("json", f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        what = f"{file} holds {_a(content)}"
        raise _Unusable("structure", f"{what}, expected an object with {', '.join(_TABLES)}")
    for table in tables:
        if table not in content:
            near = difflib.get_close_matches(table, content, 1)
            hint = f"; did it mean {near[0]!r}?" if near else f"; it has {some(list(content))}"
            if table == "annotations" and not near:
                hint += ": kw predict takes images that are not annotated"
            raise _Unusable("structure", f"{file} lacks {table!r}{hint}")
        rows = content[table]
        if not isinstance(rows, list):
            raise _Unusable("structure", f"{table!r} of {file} must be a list, not {_a(rows)}")
        wrong = [row for row in rows if not isinstance(row, dict)]
        if wrong:
            what = f"entries of {table!r} of {file} must be objects"
            raise _Unusable("structure", f"{what}, not {_a(wrong[0])}")
    return _in_use.setdefault(key, _Content(content))


def category_ids(content: Mapping[str, Any], file: str) -> dict[str, int]:
    """Category names and their ids, in the order of the ids.

    A category without objects is left out if another has the same name: some exporters list the
    name of the project or the group as a category too.

    Raises:
        DataError: a category has no id or no name, or shares one with another.
    """
    categories = _without_doubles(content)
    named = {}
    for category in categories:
        if not _is_category(category):
            raise DataError(f"{file}: category {category} needs an integer id and a name")
        named[category["name"]] = category["id"]
    if len(named) < len(categories) or len(set(named.values())) < len(categories):
        what = "categories of the same name or id"
        raise DataError(
            f"{file} has {what}: rename one, or give the objects of both one category_id "
            "(kw inspect annotations lists them)"
        )
    return dict(sorted(named.items(), key=lambda pair: pair[1]))


def ids_of(
    classes: Sequence[str], content: Mapping[str, Any], file: str, hint: str = ""
) -> list[int]:
    """The category ids of some classes, in their order; messages call the content ``file``, and
    say by ``hint`` where the names come from.

    Raises:
        DataError: the file lacks a category; or as for :func:`category_ids`.
    """
    ids = category_ids(content, file)
    if missing := [name for name in classes if name not in ids]:
        raise DataError(
            f"{file} has no category {', '.join(missing)}{hint}; it has {', '.join(ids)}"
        )
    return [ids[name] for name in classes]


def _without_doubles(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The categories, without those that have no object and share the name of another."""
    used = _values(content["annotations"], "category_id")
    sound = [each for each in content["categories"] if _is_category(each)]
    taken = {each["name"] for each in sound if each["id"] in used}
    kept: list[Mapping[str, Any]] = []
    for each in content["categories"]:
        if _is_category(each) and each["id"] not in used:
            if each["name"] in taken:
                continue
            taken.add(each["name"])
        kept.append(each)
    return kept


def check_annotations(
    annotations_file: str | os.PathLike[str],
    images_dir: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    masks: bool = True,
    read_images: bool = False,
    other: Report | None = None,
    training: bool = True,
    open_images: bool = True,
    settings: CocoDataConfig | None = None,
) -> Report:
    """Check a set and list all problems; problems are reported, not raised.

    Args:
        annotations_file: file in COCO's format.
        images_dir: folder that the file's image names are relative to.
        classes: the model's classes: each must be a category of the file.
        masks: whether every object must have a mask.
        read_images: decode all images, which finds damaged ones; otherwise only read their headers.
        other: report on a set that this one must not share images with; for a validation set, the
            training set.
        training: whether the set is for training; otherwise it is for evaluation.
        open_images: whether to open the image files at all.
        settings: how images are read and which are left out. Default: a run's defaults.
    """
    file, folder = os.fspath(annotations_file), os.fspath(images_dir)
    report = Report(file, folder)
    settings = settings or CocoDataConfig(root=folder)
    try:
        content = load_annotations(file)
    except _Unusable as error:
        report.add(error.kind, str(error))
        return report
    report.images, report.objects = len(content["images"]), len(content["annotations"])
    images, objects, categories = (_check_table(content, table, report) for table in _TABLES)
    for table, rows in zip(_TABLES[:2], (images, objects), strict=True):
        if not content[table]:
            report.add("no-images" if table == "images" else "no-objects", file)
        _check_ids(table[:-1], rows, report)
    kept = _without_doubles({**content, "categories": categories})
    for category in categories:
        if not any(category is each for each in kept):
            report.add("category-double", f"{category['name']} (category {category['id']})")
    categories = [dict(each) for each in kept]
    _check_categories(categories, classes, report)
    _check_links(content, images, objects, categories, report)

    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    placed = [each for each in objects if each["image_id"] in sizes]
    check_boxes(placed, sizes, report)
    if masks:
        check_masks(placed, sizes, report)
    wanted = {c["id"]: c["name"] for c in categories if classes is None or c["name"] in classes}
    _check_usage(placed, wanted, sizes, training, settings, report)
    if open_images:
        check_images(
            images,
            folder,
            report,
            decode=read_images,
            upright=settings.exif_orientation == "apply",
            max_pixels=settings.bad_images.max_pixels,
        )
    report.file_names = frozenset(image["file_name"] for image in images)
    if other is not None:
        check_leak(report, other)
    report.categories = tuple(c["name"] for c in sorted(categories, key=lambda c: c["id"]))
    return report


def _is_integer(value: Any) -> bool:
    # True is an int, and some exporters write ids as text: neither would match another id.
    return type(value) is int


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


# Of every key: the test of its value, and what was expected. Boxes have a check of their own.
_Expected = tuple[Callable[[Any], bool], str]
_ID: _Expected = _is_integer, "an integer"
_SIZE: _Expected = (lambda value: type(value) is int and value > 0), "a positive integer"
_REQUIRED: dict[str, dict[str, _Expected]] = {
    "images": {
        "id": _ID,
        "file_name": (_is_name, "a file's name"),
        "width": _SIZE,
        "height": _SIZE,
    },
    "annotations": {
        "id": _ID,
        "image_id": _ID,
        "category_id": _ID,
        "bbox": (lambda value: True, "anything"),
        "area": (lambda value: type(value) in (int, float), "a number"),
    },
    "categories": {"id": _ID, "name": (lambda value: isinstance(value, str), "text")},
}
_OPTIONAL: dict[str, _Expected] = {
    "iscrowd": (lambda value: value in (0, 1), "0 or 1"),
    "ignore": (lambda value: value in (0, 1, None), "0 or 1"),
}


def _check_table(content: Mapping[str, Any], table: str, report: Report) -> list[dict[str, Any]]:
    """The rows of a table that have all keys, with values of the right kind."""
    required, what = _REQUIRED[table], "category" if table == "categories" else table[:-1]
    expected = {**required, **_OPTIONAL} if table == "annotations" else required
    sound = []
    for place, row in enumerate(content[table]):
        if missing := [key for key in required if key not in row]:
            name = row["id"] if "id" in row else f"number {place + 1} in the file"
            report.add("missing-key", f"{what} {name} lacks {', '.join(missing)}")
            continue
        for key, (is_right, kind) in expected.items():
            if key in row and not is_right(row[key]):
                found = f"{what} {row['id']}: {key} is {row[key]!r}, not {kind}"
                report.add("bad-value", found)
                break
        else:
            sound.append(row)
    return sound


def _check_usage(
    objects: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
    sizes: Mapping[int, tuple[int, int]],
    training: bool,
    settings: CocoDataConfig,
    report: Report,
) -> None:
    """Find the objects that are not used."""
    usage = Usage()
    for each in objects:
        if each["category_id"] not in names or not is_box(each["bbox"]):
            continue
        reason = why_unused(each, sizes[each["image_id"]], training, settings.min_size)
        usage.count(names[each["category_id"]], reason)
        # What is outside is reported by the check of boxes.
        if reason not in (None, OUTSIDE) and not each.get("iscrowd"):
            what = f"annotation {each['id']} of image {each['image_id']}: {reason}"
            report.add("left-out", what)
    if usage.listed and not usage.used:
        report.add("nothing-left", str(usage))
    else:
        report.add("category-left-out", *usage.without_any())


def _check_ids(what: str, rows: Iterable[Mapping[str, Any]], report: Report) -> None:
    seen: set[int] = set()
    for row in rows:
        if row["id"] in seen:
            report.add(f"{what}-id-twice", f"{what} {row['id']}")
        seen.add(row["id"])


def _check_categories(
    categories: Sequence[Mapping[str, Any]],
    classes: Sequence[str] | None,
    report: Report,
) -> None:
    _check_ids("category", categories, report)
    owner: dict[str, int] = {}
    for category in categories:
        name = category["name"]
        if not _is_name(name):
            report.add("category-name-empty", f"category {category['id']}")
        elif name in owner:
            twice = f"categories {owner[name]} and {category['id']} are both {name!r}"
            report.add("category-name-twice", twice)
        else:
            owner[name] = category["id"]
    if classes is not None:
        for name in classes:
            if name not in owner:
                near = difflib.get_close_matches(name, owner, 1)
                hint = f"; the file has {near[0]!r}" if near else ""
                report.add("class-missing", name + hint)
        report.add("class-extra", *(name for name in owner if name not in classes))


def _check_links(
    content: Mapping[str, Any],
    images: Sequence[Mapping[str, Any]],
    objects: Sequence[Mapping[str, Any]],
    categories: Sequence[Mapping[str, Any]],
    report: Report,
) -> None:
    """Check the ids that annotations refer to, and find images and categories without objects."""
    # The ids of all rows: a row that lacks something else is reported for that already.
    image_ids = _values(content["images"], "id")
    known = _values(content["categories"], "id")
    used = _values(content["annotations"], "category_id")
    shown = _values(content["annotations"], "image_id")
    for each in objects:
        for kind, key, ids in (
            ("unknown-image", "image_id", image_ids),
            ("unknown-category", "category_id", known),
        ):
            if each[key] not in ids:
                report.add(kind, f"annotation {each['id']}: {key} {each[key]}")
    unused = [f"{c['name']} (category {c['id']})" for c in categories if c["id"] not in used]
    report.add("category-unused", *unused)
    owner: dict[str, int] = {}
    for image in images:
        if listed := [key for key in _FEDERATED if image.get(key)]:
            report.add("federated", f"image {image['id']} has {' and '.join(listed)}")
        if image["id"] not in shown:
            report.add("image-empty", f"{image['file_name']} (image {image['id']})")
        if image["file_name"] in owner:
            first = owner[image["file_name"]]
            twice = f"images {first} and {image['id']} are both {image['file_name']}"
            report.add("file-name-twice", twice)
        owner.setdefault(image["file_name"], image["id"])


def _values(rows: Iterable[Mapping[str, Any]], key: str) -> set[int]:
    return {row[key] for row in rows if _is_integer(row.get(key))}


def _is_category(row: Mapping[str, Any]) -> bool:
    return _is_integer(row.get("id")) and _is_name(row.get("name"))


def _a(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "a truth value"}
    return kinds.get(type(value), "nothing" if value is None else "a number")
