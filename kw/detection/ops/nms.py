"""Suppression of boxes that overlap boxes with a better score.

Boxes are corners ``x1, y1, x2, y2``. mmcv adds ``offset`` pixels to their width and height: 0 for
continuous coordinates, 1 for indices of pixels that belong to the box.

Legend: N boxes.
"""

from __future__ import annotations

import numpy as np
import torch
import torchvision  # noqa: F401  (registers torch.ops.torchvision)
from torch import Tensor

from .widening import widen

__all__ = ["nms", "nms_match", "softnms"]

_NAIVE, _LINEAR, _GAUSSIAN = range(3)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Hard suppression of boxes ``[N, 4]``, greedily from the best score: those whose IoU with a
    kept box exceeds the threshold, in float32 as in mmcv, are removed.

    Returns:
        Indices of the boxes that are kept, best first, int64.
    """
    boxes, scores = widen(boxes, scores)
    if offset:
        # Moving the lower right corners of all boxes moves those of their intersections too.
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torch.ops.torchvision.nms(boxes, scores, _as_float32(iou_threshold))


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (Bodla et al., 2017): overlapping boxes lose score instead of being removed.

    The best remaining box is kept and scales the scores of the others: to 0 if the IoU reaches the
    threshold (method 0), by ``1 - IoU`` in that case (1), or always by ``exp(-IoU^2 / sigma)`` (2).
    Boxes below ``min_score`` are then removed; the first box is always kept. Two boxes without
    area do not overlap.

    mmcv moves all tensors to the CPU before. Boxes and new scores are written to the first rows of
    ``dets``, ``[N, 5]``.

    Returns:
        Indices of the kept boxes, in the order in which they were kept, int64.
    """
    boxes, scores = widen(boxes, scores)
    # NumPy's calls on a few numbers take a tenth of the time of torch's.
    rows = torch.cat([boxes, scores[:, None]], 1).cpu().numpy().copy()
    indices = np.arange(len(rows))
    threshold = _as_float32(iou_threshold)
    count, taken = len(rows), 0
    while taken < count:
        best = taken + int(np.argmax(rows[taken:count, 4]))
        rows[[taken, best]] = rows[[best, taken]]
        indices[[taken, best]] = indices[[best, taken]]
        rest = rows[taken + 1 : count]
        iou = _iou(rows[taken], rest, offset)
        if method == _GAUSSIAN:
            rest[:, 4] *= np.exp(-(iou**2) / sigma)
        else:
            rest[:, 4] *= np.where(iou >= threshold, 1 - iou if method == _LINEAR else 0, 1)
        order = _fill_gaps(rest[:, 4] >= min_score)
        rows[taken + 1 : taken + 1 + len(order)] = rest[order]
        indices[taken + 1 : taken + 1 + len(order)] = indices[taken + 1 : count][order]
        taken += 1
        count = taken + len(order)
    dets[:count] = torch.from_numpy(rows[:count]).to(dets)
    return torch.from_numpy(indices[:count])


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Hard suppression that also gives the boxes that each kept box suppressed: those of ``dets``,
    ``[N, 5]``, boxes and scores, whose IoU *reaches* the threshold; this differs from `nms`, as in
    mmcv.

    Returns:
        A group for each kept box, best first: its index and those that it suppressed, best first.
    """
    rows = widen(dets)[0].cpu()
    remaining = rows[:, 4].sort(descending=True, stable=True).indices.numpy()
    boxes = rows.numpy()
    groups = []
    while len(remaining):
        first, others = remaining[0], remaining[1:]
        gone = _iou(boxes[first], boxes[others], 0) >= _as_float32(iou_threshold)
        groups.append([int(first), *others[gone].tolist()])
        remaining = others[~gone]
    return groups


def _iou(box: np.ndarray, others: np.ndarray, offset: int) -> np.ndarray:
    """IoU of one box with others, ``[N]``; 0 for two boxes without area."""
    sizes = np.minimum(box[2:4], others[:, 2:4]) - np.maximum(box[:2], others[:, :2]) + offset
    shared = np.prod(np.maximum(sizes, 0), axis=1)
    area = np.prod(box[2:4] - box[:2] + offset)
    union = area + np.prod(others[:, 2:4] - others[:, :2] + offset, axis=1) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union != 0)


def _fill_gaps(kept: np.ndarray) -> np.ndarray:
    """Positions of kept rows; the last rows fill the gaps, which decides ties as in mmcv."""
    count = int(kept.sum())
    order = np.arange(count)
    gaps = np.flatnonzero(~kept[:count])
    order[gaps] = (count + np.flatnonzero(kept[count:]))[::-1]
    return order


def _as_float32(threshold: float) -> float:
    return float(np.float32(threshold))
