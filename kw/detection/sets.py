"""The annotation files that a configuration names: their classes, their check, parts of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data import DataError
from ..errors import say
from .annotations import Report, category_ids, check_annotations, load_annotations
from .schema import CocoDataConfig

__all__ = [
    "check_sets",
    "check_test_annotations",
    "class_names",
    "read_sets",
    "trained_classes",
    "write_subset",
]


Content = Mapping[str, Any]


def read_sets(config: CocoDataConfig) -> tuple[Content, Content]:
    """The training and the test annotations; one file is read once.

    Raises:
        DataError: a file cannot be read.
    """
    train, val = (
        Path(config.root, name) for name in (config.train_annotations, config.val_annotations)
    )
    content = load_annotations(train)
    return content, content if train == val else load_annotations(val)


def class_names(config: CocoDataConfig, content: Content | None = None) -> list[str]:
    """The categories to detect: those of the configuration, or all of the training file.

    Args:
        config: of the data.
        content: of the training file, where it is read already.

    Raises:
        DataError: the file cannot be read, or lacks a category that the configuration names.
    """
    file = Path(config.root, config.train_annotations)
    found = list(category_ids(load_annotations(file) if content is None else content, str(file)))
    if config.classes is None:
        return found
    missing = [name for name in config.classes if name not in found]
    if missing:
        raise DataError(
            f"{file} has no category {', '.join(missing)} (data.classes); it has {', '.join(found)}"
        )
    return list(config.classes)


def trained_classes(
    checkpoint: Mapping[str, Any],
    config: CocoDataConfig,
    source: str,
    content: Content | None = None,
) -> list[str]:
    """The categories that a checkpoint detects, in the order of its labels.

    Categories of the test annotations that it does not detect, and ``data.classes`` where it names
    others, are not used, which is said.

    Args:
        checkpoint: as it was read; one without names detects what the configuration says.
        config: of the data to test on.
        source: what messages call the checkpoint.
        content: of the test annotations, where they are read already.

    Raises:
        DataError: the test annotations cannot be read, or lack a category.
    """
    trained = checkpoint.get("meta", {}).get("classes") or class_names(config)
    file = Path(config.root, config.val_annotations)
    found = list(category_ids(load_annotations(file) if content is None else content, str(file)))
    if missing := [name for name in trained if name not in found]:
        raise DataError(
            f"{file} has no category {', '.join(missing)}, which {source} detects; it has "
            f"{', '.join(found)}: name its categories as in training"
        )
    if other := [name for name in found if name not in trained]:
        say(f"{file}: objects of {', '.join(other)} are left out: {source} does not detect them")
    if config.classes is not None and list(config.classes) != trained:
        say(f"data.classes is not used: {source} detects {', '.join(trained)}")
    return list(trained)


def check_sets(
    config: CocoDataConfig,
    masks: bool,
    read_images: bool = False,
    contents: tuple[Content, Content] | None = None,
) -> list[Report]:
    """Check both annotation files, see :func:`kw.detection.annotations.check_annotations`.

    Args:
        config: of the data.
        masks: whether every object must have a mask.
        read_images: decode all images too.
        contents: of the training and the test annotations, where they are read already.
    """
    train_content, val_content = contents or (None, None)
    classes: list[str] | None
    try:
        classes = class_names(config, train_content)
    except DataError:  # a fault of the file, which is listed with all others
        classes = config.classes
    same: dict[str, Any] = {"classes": classes, "masks": masks, "read_images": read_images}
    train = _check(config, True, content=train_content, **same)
    return [train, _check(config, False, content=val_content, other=train, **same)]


def check_test_annotations(
    config: CocoDataConfig, masks: bool, classes: list[str], content: Content
) -> Report:
    """Check what is evaluated against, without the image files: bad ones count as missed.

    Args:
        config: of the data.
        masks: whether every object must have a mask.
        classes: the detector's.
        content: of the file.
    """
    settings: dict[str, Any] = {"classes": classes, "masks": masks, "content": content}
    return _check(config, False, open_images=False, **settings)


def _check(config: CocoDataConfig, training: bool, **settings: Any) -> Report:
    """Check the training or the test set that a configuration names."""
    names = (
        (config.train_annotations, config.train_images)
        if training
        else (config.val_annotations, config.val_images)
    )
    file, folder = (Path(config.root, name) for name in names)
    return check_annotations(file, folder, training=training, settings=config, **settings)


def write_subset(
    source: str | os.PathLike[str], target: str | os.PathLike[str], images: int
) -> dict[str, Any]:
    """Write the part of an annotation file that is about its first images with objects.

    Args:
        source: file in COCO's format.
        target: file to write; its folder must exist.
        images: number of images.

    Returns:
        What was written.

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
    try:
        Path(target).write_text(json.dumps(part))
    except OSError as error:
        raise DataError(f"{target}: {error.strerror}") from error
    return part
