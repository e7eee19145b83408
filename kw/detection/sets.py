"""The annotation files that a configuration names: their classes, their check, parts of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..data import DataError
from .annotations import Report, check_annotations, load_annotations, read_categories
from .schema import CocoDataConfig

__all__ = ["check_sets", "class_names", "write_subset"]


def class_names(config: CocoDataConfig) -> list[str]:
    """The categories to detect: those of the configuration, or all of the training file.

    Raises:
        DataError: the file cannot be read, or lacks a category that the configuration names.
    """
    file = Path(config.root, config.train_annotations)
    found = read_categories(file)
    if config.classes is None:
        return found
    missing = [name for name in config.classes if name not in found]
    if missing:
        raise DataError(
            f"{file} has no category {', '.join(missing)} (data.classes); it has {', '.join(found)}"
        )
    return list(config.classes)


def check_sets(config: CocoDataConfig, masks: bool, read_images: bool = False) -> list[Report]:
    """Check both annotation files, see :func:`kw.detection.annotations.check_annotations`.

    Raises:
        DataError: a file cannot be read at all.
    """
    root = Path(config.root)
    classes = class_names(config)
    settings: dict[str, Any] = {"classes": classes, "masks": masks, "read_images": read_images}
    train = check_annotations(
        root / config.train_annotations, root / config.train_images, **settings
    )
    val = check_annotations(
        root / config.val_annotations, root / config.val_images, other=train, **settings
    )
    return [train, val]


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
