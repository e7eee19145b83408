"""What evaluation needs of an annotation file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kw.data.dataset import DataError

__all__ = ["read_truth"]


def read_truth(
    content: Mapping[str, Any], file: str, category_ids: set[int], masks: bool
) -> dict[str, Any]:
    """Images, and objects of some categories, numbered from 1.

    Args:
        content: an annotation file's content.
        file: its name, for messages.
        category_ids: the categories that are evaluated.
        masks: whether objects need a mask, and images their size.

    Raises:
        DataError: something that is needed is missing.
    """
    needed = ["image_id", "category_id", "bbox", "area", *(["segmentation"] if masks else [])]
    annotations: list[dict[str, Any]] = []
    try:
        images = [
            {key: image[key] for key in ("id", "height", "width") if masks or key == "id"}
            for image in content["images"]
        ]
        if len({image["id"] for image in images}) < len(images):
            raise DataError(f"{file} names an image id twice; tools/check_coco.py lists them")
        for annotation in content["annotations"]:
            if annotation["category_id"] not in category_ids:
                continue
            kept = {key: annotation[key] for key in needed}
            if masks and not kept["segmentation"]:
                raise DataError(f"{file}: annotation {annotation.get('id')} has no mask")
            kept.update(id=len(annotations) + 1, iscrowd=int(annotation.get("iscrowd", 0)))
            annotations.append(kept)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{file} cannot be evaluated against: an image or an annotation lacks {error}; "
            "tools/check_coco.py lists what is wrong"
        ) from error
    categories = [category for category in content["categories"] if category["id"] in category_ids]
    return {"images": images, "annotations": annotations, "categories": categories}
