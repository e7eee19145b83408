"""What detectors of any kind share: their detections, how these are drawn, and COCO's formats."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, overload

import numpy as np
from PIL import Image
from torch import Tensor

from ..data.reading import MAX_PIXELS, Picture, read_image
from .drawing import draw_objects
from .run_lengths import mask_areas, segmentation_mask


class Found(NamedTuple):
    """The detections in a picture, by falling score."""

    boxes: Tensor
    """float32 ``[N, 4]``: left, top, right, bottom in pixels"""
    scores: Tensor
    """float32 ``[N]``"""
    labels: Tensor
    """int64 ``[N]``, indices into :attr:`Detector.classes`"""
    masks: list[dict[str, Any]] | None
    """run lengths of :func:`kw.objects.run_lengths.encode_masks`; None for boxes alone"""
    size: tuple[int, int]
    """width and height of the picture, pixels"""


class Detector(ABC):
    """A detector that is ready for pictures: a run's, or an exported one.

    Attributes:
        classes: names of its categories; a label is an index into this list.
        has_masks: whether it finds masks.
        max_pixels: larger pictures are refused.
        upright: turn pictures as their EXIF data say.
    """

    classes: list[str]
    has_masks: bool = False
    max_pixels: int = MAX_PIXELS
    upright: bool = True

    @abstractmethod
    def find(self, picture: Picture, score: float) -> Found:
        """The detections in one picture, see :meth:`predict`."""

    @overload
    def predict(self, images: Picture, score: float = ...) -> Found: ...  # type: ignore[overload-overlap]
    @overload
    def predict(self, images: Iterable[Picture], score: float = ...) -> list[Found]: ...
    def predict(self, images: Any, score: float = 0.0) -> Any:
        """Find objects in pictures, each a batch of its own.

        Args:
            images: a file, a Pillow image or an array, see :func:`kw.data.read_image`; or several.
            score: detections below this score are left out, and those below the detector's own
                threshold (``test_cfg``).

        Returns:
            The detections of a single picture, or a list of those of several, in their order.

        Raises:
            BadImageError: a file cannot be read as an image, or the transforms fail on it.
            OutOfMemory: one needs too much memory.
        """
        if isinstance(images, (str, os.PathLike, Image.Image, np.ndarray)):
            return self.find(images, score)
        return [self.find(picture, score) for picture in images]

    def read(self, picture: Picture) -> Image.Image:
        """A picture as the detector reads it, RGB in full size, or a BadImageError."""
        return read_image(picture, self.max_pixels, self.upright)

    def draw(self, picture: Picture, found: Found, score: float = 0.0) -> Image.Image:
        """The picture with its detections, without those below a score."""
        kept = (found.scores >= score).nonzero().flatten().tolist()
        labels = [int(found.labels[i]) for i in kept]
        texts = [
            f"{self.classes[label]} {found.scores[i]:.2f}"
            for i, label in zip(kept, labels, strict=True)
        ]
        masks = None
        if found.masks is not None:
            width, height = found.size
            masks = [segmentation_mask(found.masks[i], height, width) for i in kept]
        return draw_objects(self.read(picture), found.boxes[kept], labels, texts, masks)


def coco_results(found: Iterable[tuple[int, Found]], ids: Sequence[int]) -> list[dict[str, Any]]:
    """Detections by image id in COCO's results format; ``ids`` are the categories' by label, see
    :func:`kw.detection.sets.result_ids`."""
    return [row for image_id, each in found for row in _rows(image_id, each, ids)]


def coco_file(found: Sequence[tuple[str, Found]], classes: Sequence[str]) -> dict[str, Any]:
    """Detections by file name as an annotation file with scores; ids count from 1."""
    numbered = [(place, name, each) for place, (name, each) in enumerate(found, 1)]
    ids = range(1, len(classes) + 1)
    rows: list[dict[str, Any]] = []
    for place, _, each in numbered:
        sides = (each.boxes[:, 2:] - each.boxes[:, :2]).double()
        areas = sides.prod(1).tolist() if each.masks is None else mask_areas(each.masks)
        for row, area in zip(_rows(place, each, ids), areas, strict=True):
            rows.append({**row, "id": len(rows) + 1, "iscrowd": 0, "area": area})
    return {
        "images": [
            {"id": place, "file_name": name, "width": each.size[0], "height": each.size[1]}
            for place, name, each in numbered
        ],
        "annotations": rows,
        "categories": [{"id": i, "name": name} for i, name in zip(ids, classes, strict=True)],
    }


def _rows(image_id: int, found: Found, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    boxes = found.boxes.double()
    boxes[:, 2:] -= boxes[:, :2]
    rows: list[dict[str, Any]] = [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": [round(value, 2) for value in box],
            "score": round(score, 5),
        }
        for box, label, score in zip(
            boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True
        )
    ]
    for row, mask in zip(rows, found.masks or (), strict=False):
        row["segmentation"] = {"size": list(mask["size"]), "counts": mask["counts"].decode()}
    return rows
