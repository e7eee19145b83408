"""What evaluation needs of an annotation file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from kw.data.dataset import DataError

__all__ = ["Truth", "read_truth"]


class Truth(NamedTuple):
    """What is evaluated against."""

    content: dict[str, Any]
    """images, annotations and categories, all numbered from 1 in the order of their ids: evaluators
    confuse some ids (an object 0 with none, images from 2^53 on with one another)"""
    images: dict[int, int]
    """the number of an image by its id"""
    categories: dict[int, int]
    """the number of a category by its id"""


def read_truth(
    content: Mapping[str, Any], file: str, category_ids: Collection[int], masks: bool
) -> Truth:
    """Images, and the objects of some categories.

    Args:
        content: an annotation file's content.
        file: its name, for messages.
        category_ids: the categories that are evaluated.
        masks: whether objects need a mask, and images their size.

    Raises:
        DataError: something that is needed is missing or wrong.
    """
    try:
        ids = [int(image["id"]) for image in content["images"]]
        images = {image_id: number for number, image_id in enumerate(sorted(ids), 1)}
        categories = {each: number for number, each in enumerate(sorted(category_ids), 1)}
        if len(images) < len(ids):
            raise DataError(f"{file} names an image id twice; tools/check_coco.py lists them")
        keys = ("height", "width") if masks else ()
        sizes = {each["id"]: {key: each[key] for key in keys} for each in content["images"]}
        annotations: list[dict[str, Any]] = []
        for each in content["annotations"]:
            if each["category_id"] not in categories:
                continue
            kept = {key: each[key] for key in ("bbox", "area")}
            if masks:
                kept["segmentation"] = _mask(each, sizes[each["image_id"]], file)
            kept.update(
                id=len(annotations) + 1,
                image_id=images[each["image_id"]],
                category_id=categories[each["category_id"]],
                iscrowd=int(each.get("iscrowd", 0)),
            )
            annotations.append(kept)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        what = f"lacks {error}" if isinstance(error, KeyError) else f"has a wrong value ({error})"
        raise DataError(
            f"{file} cannot be evaluated against: an image or an annotation {what}; "
            "tools/check_coco.py lists what is wrong"
        ) from error
    numbered = {
        "images": [{"id": images[each], **sizes[each]} for each in sizes],
        "annotations": annotations,
        "categories": [{"id": number} for number in categories.values()],
    }
    return Truth(numbered, images, categories)


def _mask(each: Mapping[str, Any], size: Mapping[str, int], file: str) -> Any:
    mask, what = each["segmentation"], f"{file}: annotation {each.get('id')}"
    if not mask:
        raise DataError(f"{what} has no mask")
    if isinstance(mask, list) and not all(isinstance(part, list) for part in mask):
        raise DataError(f"{what}: segmentation is no list of polygons")
    # Evaluators give masks of different sizes an overlap of -1, without a word.
    if isinstance(mask, Mapping) and list(mask["size"]) != [size["height"], size["width"]]:
        raise DataError(
            f"{what} has run lengths of {list(mask['size'])} (height, width), its image is "
            f"{[size['height'], size['width']]}"
        )
    return mask
