"""COCO's figures for boxes and masks, exact for any number of processes.

faster-coco-eval computes the figures of pycocotools: the same matching in C++, much faster. The
best ``maxDets`` detections of each category in an image count: 1, 10 or 100, as COCO defines;
another limit than 100 can be set. mmdetection's own metric uses 100, 300 and 1,000: its mAP is the
same, but mAP_50, mAP_75 and the figures by size count up to 1,000 detections. They differ only for
a detector that gives more than 100 detections of one category in an image.

Legend: N detections of an image, H x W its pixels.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from kw.data.reading import DataError
from kw.detection.annotations import category_ids, ids_of, load_annotations
from kw.detection.findings import some
from kw.objects.run_lengths import encode_masks, import_evaluator, mask_areas

FIGURES = (
    *("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l"),
    *("AR_1", "AR_10", "AR_100", "AR_s", "AR_m", "AR_l"),
)
"""COCO's twelve, in COCO's order: average precision (at IoU 0.5 to 0.95, 0.5, 0.75; of small,
medium and large objects), average recall (with 1, 10, 100 detections; of the three sizes)."""

COCO_DETECTIONS = 100
"""Detections of a category in an image that COCO's evaluation counts."""

Figures = dict[str, float | None]


class _Detections(NamedTuple):
    """What was found in one image: boxes are left, top, width, height in pixels, float64 [N, 4]."""

    boxes: np.ndarray
    scores: np.ndarray  # float64 [N]
    labels: np.ndarray  # int64 [N]
    masks: list[bytes] | None = None  # N compressed run lengths of [H, W]
    mask_areas: np.ndarray | None = None  # [N], pixels


class CocoEvaluator:
    """Collects detections on every process and evaluates them on the first.

    All images of the file count: an image without a call of :meth:`add` has no detections.

    Args:
        annotations_file: ground truth in COCO's format.
        classes: category names in the order of the model's labels; other categories and their
            objects are left out. Default: all, in the order of their ids.
        masks: whether masks are evaluated too; every object then needs a segmentation.
        max_detections: detections of a category in an image that count, more than 10; the name of
            the figure ``AR_100`` then has this number.

    Attributes:
        classes: the category names; a label is an index into this list.
        objects: number of objects by image id, without crowds.

    Raises:
        DataError: the file cannot be used, or a class is not in it.
    """

    def __init__(
        self,
        annotations_file: str | os.PathLike[str],
        classes: Sequence[str] | None = None,
        masks: bool = False,
        max_detections: int = COCO_DETECTIONS,
    ) -> None:
        self.file = os.fspath(annotations_file)
        self.kinds = ("bbox", "segm") if masks else ("bbox",)
        self._most = [1, 10, max_detections]
        content = load_annotations(self.file)
        self.classes = list(category_ids(content, self.file) if classes is None else classes)
        wanted = ids_of(self.classes, content, self.file)
        self._truth, self._numbers, categories = _read_truth(content, self.file, wanted, masks)
        self._categories_of = [categories[each] for each in wanted]  # numbers by label
        self._sizes = {
            image["id"]: (image.get("height"), image.get("width")) for image in content["images"]
        }
        back = {number: image_id for image_id, number in self._numbers.items()}
        annotations = self._truth["annotations"]
        self.objects = Counter(
            back[each["image_id"]] for each in annotations if not each["iscrowd"]
        )
        self._found: dict[int, _Detections] = {}

    def add(self, image_id: int, boxes: Any, scores: Any, labels: Any, masks: Any = None) -> None:
        """Add the detections of one image, without communication.

        Args:
            image_id: id of the image in the annotation file.
            boxes: ``[N, 4]``, left, top, right, bottom in pixels of the annotated image; like the
                others a tensor on any device or an array.
            scores: ``[N]``.
            labels: ``[N]``, indices into ``classes``.
            masks: bool ``[N, H, W]``, or N run lengths of :func:`encode_masks`; needed if masks are
                evaluated, otherwise ignored.

        Raises:
            ValueError: the image was added before or is not in the file, or a value has another
                shape or is not finite; the message names the image.
        """
        image_id = int(image_id)
        if image_id in self._found:
            raise ValueError(f"image {image_id} was evaluated twice")
        if image_id not in self._sizes:
            raise ValueError(f"detections of image {image_id}, which {self.file} does not have")
        corners = _array(boxes, np.float64).reshape(-1, 4)
        found = _Detections(
            np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1),
            _array(scores, np.float64).reshape(-1),
            _array(labels, np.int64).reshape(-1),
            *(self._compress(image_id, masks) if "segm" in self.kinds else ()),
        )
        lengths = {len(part) for part in found if part is not None}
        if len(lengths) > 1:
            raise ValueError(
                f"image {image_id}: boxes, scores, labels and masks differ in number: "
                + ", ".join(str(len(part)) for part in found[:4] if part is not None)
            )
        if not (np.isfinite(found.boxes).all() and np.isfinite(found.scores).all()):
            raise ValueError(f"image {image_id}: a box or a score is not finite")
        if len(found.labels) and not 0 <= found.labels.min() <= found.labels.max() < len(
            self.classes
        ):
            raise ValueError(
                f"image {image_id}: labels from {found.labels.min()} to {found.labels.max()}, "
                f"but there are {len(self.classes)} classes"
            )
        self._found[image_id] = found

    def compute(self) -> Figures:
        """Gather, evaluate on the first process and send the result to all, a collective call; the
        detections are then dropped.

        Returns:
            ``bbox_<figure>`` and, with masks, ``segm_<figure>`` for each of :data:`FIGURES`, in
            [0, 1]; None if no object has the figure's size (COCO writes -1).

        Raises:
            ValueError: no image was added on any process, or one on two of them.
        """
        share, self._found = self._found, {}
        if not (dist.is_available() and dist.is_initialized()):
            return self._evaluate([share])
        first = dist.get_rank() == 0
        shares: list[Any] | None = [None] * dist.get_world_size() if first else None
        dist.gather_object(share, shares)
        # An error is sent too: the other processes would otherwise wait forever.
        result: list[Any] = [None]
        if shares is not None:
            try:
                result = [self._evaluate(shares)]
            except Exception as error:
                result = [error]
        dist.broadcast_object_list(result)
        if isinstance(result[0], Exception):
            raise result[0]
        figures: Figures = result[0]
        return figures

    def _compress(self, image_id: int, masks: Any) -> tuple[list[bytes], np.ndarray]:
        """Run lengths and areas; computed here, so that the processes share the work."""
        if masks is None:
            masks = []
        is_list = isinstance(masks, (list, tuple))
        encoded = is_list and all(isinstance(mask, Mapping) for mask in masks)
        runs = masks if encoded else encode_masks(masks)
        for run in runs:
            # Evaluators silently give masks of different sizes an overlap of -1.
            if tuple(run["size"]) != self._sizes[image_id]:
                raise ValueError(
                    f"image {image_id}: a mask of {tuple(run['size'])}, but the image has (height, "
                    f"width) {self._sizes[image_id]}"
                )
        counts = [run["counts"] for run in runs]
        counts = [each.encode() if isinstance(each, str) else each for each in counts]
        return counts, _array(mask_areas(runs), np.float64)

    def _evaluate(self, shares: Sequence[Mapping[int, _Detections]]) -> Figures:
        """Evaluate the shares of all processes."""
        found: dict[int, _Detections] = {}
        for share in shares:
            twice = sorted(found.keys() & share.keys())
            if twice:
                raise ValueError(f"evaluated on two processes: image {some(twice)}")
            found.update(share)
        if not found:
            raise ValueError("nothing was evaluated: no image was added on any process")
        figures: Figures = {}
        names = [f"AR_{self._most[-1]}" if name == "AR_100" else name for name in FIGURES]
        for kind in self.kinds:
            stats = self._run(kind, found)
            figures.update({f"{kind}_{k}": v for k, v in zip(names, stats, strict=True)})
        return figures

    def _run(self, kind: str, found: Mapping[int, _Detections]) -> list[float | None]:
        """The twelve figures."""
        coco = import_evaluator()
        truth = coco.COCO(self._truth)
        # loadRes computes the areas of the masks again, which takes a third of the time.
        results = coco.COCO({**self._truth, "annotations": self._results(kind, found)})
        evaluator = coco.COCOeval_faster(truth, results, kind, print_function=lambda *_: None)
        evaluator.params.imgIds = sorted(self._numbers.values())
        evaluator.params.catIds = sorted(self._categories_of)
        evaluator.params.maxDets = self._most
        evaluator.run()
        return [None if value < 0 else float(value) for value in evaluator.stats]

    def _results(self, kind: str, found: Mapping[int, _Detections]) -> list[dict[str, Any]]:
        """Detections as annotations; the area of a mask decides its size class."""
        results: list[dict[str, Any]] = []
        for image_id in sorted(found):
            boxes, scores, labels, masks, areas = found[image_id]
            shapes: list[Any] = boxes.tolist()
            key = "bbox" if kind == "bbox" else "segmentation"
            if kind == "bbox" or areas is None:
                areas = boxes[:, 2] * boxes[:, 3]
            else:
                size = list(self._sizes[image_id])
                shapes = [{"size": size, "counts": mask} for mask in masks or []]
            columns = (shapes, scores.tolist(), labels.tolist(), areas.tolist())
            for shape, score, label, area in zip(*columns, strict=True):
                each = {"id": len(results) + 1, "iscrowd": 0, "score": score, "area": area}
                each["image_id"] = self._numbers[image_id]
                each["category_id"] = self._categories_of[label]
                each[key] = shape
                results.append(each)
        return results


def _array(values: Any, dtype: type) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()
    return np.asarray(values, dtype=dtype)


def _read_truth(
    content: Mapping[str, Any], file: str, category_ids: Collection[int], masks: bool
) -> tuple[dict[str, Any], dict[int, int], dict[int, int]]:
    """The part of an annotation file that evaluation needs, and the new numbers of images and of
    categories by id.

    They count from 1 in the order of their ids: evaluators take an object of id 0 for no object,
    and images from 2^53 on for one another.
    """
    try:
        ids = [int(image["id"]) for image in content["images"]]
        images = {image_id: number for number, image_id in enumerate(sorted(ids), 1)}
        categories = {each: number for number, each in enumerate(sorted(category_ids), 1)}
        if len(images) < len(ids):
            raise DataError(f"{file} names an image id twice; kw inspect annotations lists them")
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
    except DataError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"has a wrong value ({error})"
        raise DataError(
            f"{file} cannot be evaluated against: an image or an annotation {what}; "
            "kw inspect annotations lists what is wrong"
        ) from error
    numbered = {
        "images": [{"id": images[each], **sizes[each]} for each in sizes],
        "annotations": annotations,
        "categories": [{"id": number} for number in categories.values()],
    }
    return numbered, images, categories


def _mask(each: Mapping[str, Any], size: Mapping[str, int], file: str) -> Any:
    mask, what = each["segmentation"], f"{file}: annotation {each.get('id')}"
    if not mask:
        raise DataError(f"{what} has no mask")
    if isinstance(mask, list) and not all(isinstance(part, list) for part in mask):
        raise DataError(f"{what}: segmentation is no list of polygons")
    # Evaluators silently give masks of different sizes an overlap of -1.
    if isinstance(mask, Mapping) and list(mask["size"]) != [size["height"], size["width"]]:
        raise DataError(
            f"{what} has run lengths of {list(mask['size'])} (height, width), its image is "
            f"{[size['height'], size['width']]}"
        )
    return mask
