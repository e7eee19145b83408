"""The annotation files of a configuration: their classes, their checks, parts of them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import DataError
from ..errors import say, writing
from .annotations import Report, category_ids, check_annotations, ids_of, load_annotations
from .schema import CocoDataConfig


def class_names(config: CocoDataConfig) -> list[str]:
    """The categories to detect: ``data.classes``, or all of the training file.

    Raises:
        DataError: the file cannot be read, or lacks a category that the configuration names.
    """
    file = Path(config.root, config.train_annotations)
    content = load_annotations(file)
    if config.classes is None:
        return list(category_ids(content, str(file)))
    ids_of(config.classes, content, str(file), " (data.classes)")
    return list(config.classes)


def trained_classes(
    checkpoint: Mapping[str, Any], config: CocoDataConfig, source: str
) -> list[str]:
    """The categories that a checkpoint detects, in the order of its labels; without names in it,
    those of the configuration.

    A message, which calls the checkpoint ``source``, names categories of the test annotations that
    it does not detect, and ``data.classes`` if they differ; neither is used.

    Raises:
        DataError: the test annotations cannot be read, or lack a category.
    """
    trained = list(checkpoint.get("meta", {}).get("classes") or class_names(config))
    file = Path(config.root, config.val_annotations)
    content = load_annotations(file)
    hint = f", which {source} detects (name its categories as in training)"
    ids_of(trained, content, str(file), hint)
    if other := [name for name in category_ids(content, str(file)) if name not in trained]:
        say(f"{file}: objects of {', '.join(other)} are left out: {source} does not detect them")
    if config.classes is not None and list(config.classes) != trained:
        say(f"data.classes is not used: {source} detects {', '.join(trained)}")
    return trained


def result_ids(classes: Sequence[str], content: Mapping[str, Any], file: str) -> list[int]:
    """The category ids of a detector's labels in a file, whose content needs no annotations.

    Raises:
        DataError: the file lacks a category, or has several of one name and no objects that show
            which one is meant.
    """
    objects = content.get("annotations") or []
    ids = ids_of(classes, {**content, "annotations": objects}, file)
    used = {each.get("category_id") for each in objects}
    names = Counter(each["name"] for each in content["categories"])
    pairs = zip(classes, ids, strict=True)
    if twice := [name for name, number in pairs if names[name] > 1 and number not in used]:
        raise DataError(
            f"{file} has several categories {', '.join(twice)}: remove those that are not meant"
        )
    return ids


def check_sets(config: CocoDataConfig, masks: bool, read_images: bool = False) -> list[Report]:
    """Check the training and the test annotations, and their images.

    See :func:`kw.detection.annotations.check_annotations`.
    """
    classes: list[str] | None
    try:
        classes = class_names(config)
    except DataError:  # the check reports it with all other problems
        classes = config.classes
    same: dict[str, Any] = {"classes": classes, "masks": masks, "read_images": read_images}
    train = _check(config, True, **same)
    return [train, _check(config, False, other=train, **same)]


def check_test_annotations(config: CocoDataConfig, masks: bool, classes: list[str]) -> Report:
    """Check the test annotations without the image files: evaluation counts bad ones as missed."""
    return _check(config, False, open_images=False, classes=classes, masks=masks)


def _check(config: CocoDataConfig, training: bool, **settings: Any) -> Report:
    """Check the training or the test set of a configuration."""
    file = Path(config.root, config.train_annotations if training else config.val_annotations)
    folder = Path(config.root, config.train_images if training else config.val_images)
    return check_annotations(file, folder, training=training, settings=config, **settings)


def write_subset(
    source: str | os.PathLike[str], target: str | os.PathLike[str], images: int
) -> dict[str, Any]:
    """Write the first ``images`` images that have objects, and their annotations, to another file
    of COCO's format; returns what was written.

    Raises:
        DataError: the source cannot be read, has fewer such images, or the target cannot be
            written.
    """
    content = load_annotations(source)
    with_objects = {each["image_id"] for each in content["annotations"]}
    chosen = [image for image in content["images"] if image["id"] in with_objects][:images]
    if len(chosen) < images:
        raise DataError(f"{source} has {len(chosen)} images with objects, fewer than {images}")
    ids = {image["id"] for image in chosen}
    part = {
        **content,
        "images": chosen,
        "annotations": [each for each in content["annotations"] if each["image_id"] in ids],
    }
    with writing(Path(target), DataError):
        Path(target).write_text(json.dumps(part))
    return part
