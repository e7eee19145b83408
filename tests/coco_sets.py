"""Random ground truths and detections in COCO's format, and pycocotools' figures of them."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kw.detection.evaluation import FIGURES

Detections = dict[int, dict[str, Any]]


def random_set(
    rng: np.random.Generator,
    images: int = 24,
    classes: int = 6,
    objects: int = 6,
    detections: int = 30,
    size: tuple[int, int] = (260, 200),
    crowded: int = 120,
) -> tuple[dict[str, Any], Detections]:
    """Objects and detections of all sizes; most detections are an object, moved a little.

    Image, annotation and category ids have gaps and no order. The last class has no object, one
    image no object, one no detection, and one ``crowded`` detections of one class. Scores are
    rounded, so that many are equal.

    Returns:
        The annotation file's content, and for every image ``boxes`` (corners), ``scores``,
        ``labels`` (places in the order of category ids) and ``masks`` (run lengths).
    """
    ids = rng.choice(10**6, images, replace=False) + 1
    category_ids = sorted((rng.choice(90, classes, replace=False) + 1).tolist())
    truth: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    found: Detections = {}
    for place, image_id in enumerate(ids.tolist()):
        width, height = (int(side + rng.integers(0, 40)) for side in size)
        truth["images"].append(
            {"id": image_id, "file_name": f"{image_id}.jpg", "width": width, "height": height}
        )
        boxes = _boxes(rng, 0 if place == 0 else int(rng.poisson(objects)), width, height)
        labels = rng.integers(0, classes - 1, len(boxes))
        for box, label in zip(boxes, labels, strict=True):
            crowd = int(rng.random() < 0.12)
            polygon = _polygon(rng, box)
            truth["annotations"].append(
                {
                    "id": int(2**31 - 7 * len(truth["annotations"])),
                    "image_id": image_id,
                    "category_id": category_ids[label],
                    "bbox": box.tolist(),
                    "area": float(box[2] * box[3] * 0.785),
                    "iscrowd": crowd,
                    "segmentation": _counts(polygon, height, width) if crowd else [polygon],
                }
            )
        count = {1: 0, 2: crowded}.get(place, int(rng.poisson(detections)))
        copies = rng.integers(0, len(boxes), count if len(boxes) else 0)
        near = boxes[copies] * rng.normal(1, 0.03, (len(copies), 4))
        guesses = np.concatenate([near, _boxes(rng, count - len(copies), width, height)])
        guessed = np.concatenate([labels[copies], rng.integers(0, classes, count - len(copies))])
        wrong = rng.random(count) < 0.15
        guessed[wrong] = rng.integers(0, classes, int(wrong.sum()))
        if place == 2:
            guessed[:] = 1
        polygons = [_polygon(rng, box) for box in guesses]
        guesses = guesses.astype(np.float32)
        found[image_id] = {
            "boxes": np.concatenate([guesses[:, :2], guesses[:, :2] + guesses[:, 2:]], axis=1),
            "scores": rng.random(count).round(2).astype(np.float32),
            "labels": guessed.astype(np.int64),
            "masks": mask_api.frPyObjects(polygons, height, width) if polygons else [],
        }
    for place in rng.permutation(classes).tolist():
        truth["categories"].append({"id": category_ids[place], "name": f"class {place}"})
    return truth, found


def reference(
    truth: dict[str, Any], found: Detections, kinds: tuple[str, ...] = ("bbox", "segm")
) -> dict[str, float]:
    """pycocotools' figures, -1 where there is none."""
    category_ids = sorted(category["id"] for category in truth["categories"])
    figures: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = json.loads(json.dumps(truth))
        coco.createIndex()
        for kind in kinds:
            results = _results(found, category_ids, kind)
            evaluator = COCOeval(coco, coco.loadRes(results) if results else COCO(), kind)
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
            figures.update(
                {f"{kind}_{k}": float(v) for k, v in zip(FIGURES, evaluator.stats, strict=True)}
            )
    return figures


def write(content: dict[str, Any], path: Path) -> Path:
    path.write_text(json.dumps(content))
    return path


def _results(found: Detections, category_ids: list[int], kind: str) -> list[dict[str, Any]]:
    results = []
    for image_id, each in found.items():
        for i, (x1, y1, x2, y2) in enumerate(each["boxes"].tolist()):
            result = {
                "image_id": image_id,
                "category_id": category_ids[each["labels"][i]],
                "score": float(each["scores"][i]),
            }
            if kind == "bbox":
                result["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            else:
                result["segmentation"] = each["masks"][i]
            results.append(result)
    return results


def _boxes(rng: np.random.Generator, count: int, width: int, height: int) -> np.ndarray:
    """Left, top, width, height; from two pixels to the whole image, small ones most."""
    extent = np.exp(rng.uniform(np.log(2), np.log([width, height]), (count, 2)))
    start = rng.random((count, 2)) * (np.array([width, height]) - extent)
    return np.concatenate([start, extent], axis=1).round(2)


def _polygon(rng: np.random.Generator, box: np.ndarray) -> list[float]:
    """Twelve points on an ellipse that fills a box, each a little off."""
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    radius = rng.uniform(0.85, 1, 12) / 2
    x = box[0] + box[2] * (0.5 + radius * np.cos(angle))
    y = box[1] + box[3] * (0.5 + radius * np.sin(angle))
    return np.stack([x, y], axis=1).round(2).ravel().tolist()


def _counts(polygon: list[float], height: int, width: int) -> dict[str, Any]:
    """Uncompressed run lengths, which COCO's files have for crowds."""
    pixels = mask_api.decode(mask_api.frPyObjects([polygon], height, width))[:, :, 0].T.ravel()
    ends = np.flatnonzero(np.diff(pixels)) + 1
    counts = np.diff(np.concatenate([[0], ends, [pixels.size]])).tolist()
    return {"size": [height, width], "counts": ([0] if pixels[0] else []) + counts}
