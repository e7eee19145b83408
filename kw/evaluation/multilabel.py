"""Exact metrics for images that have any number of classes each.

Legend: N samples of the set, B of a batch, C classes.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..registry import METRICS


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Average precision of each class: the sum over thresholds of precision times gain in recall.

    As scikit-learn's ``average_precision_score``: without interpolation, and samples of one score
    come in together, so that the order of the samples does not matter, not even to the last bit.

    Args:
        scores: ``[N, C]``, larger is surer.
        labels: ``[N, C]``, true where the class is present.

    Returns:
        float64 ``[C]``; NaN for a class that no sample has, or with a score that is NaN.
    """
    ordered, order = scores.sort(dim=0, descending=True)
    hits = labels.gather(0, order).cumsum(0)  # present, among the samples down to each
    last = torch.ones_like(hits, dtype=torch.bool)  # of a group of one score
    last[:-1] = ordered[:-1] != ordered[1:]
    before = torch.zeros_like(hits)  # hits of all groups above
    before[1:] = torch.where(last, hits, 0).cummax(0).values[:-1]
    ranks = torch.arange(1, len(hits) + 1, device=hits.device)[:, None]
    gained = torch.where(last, (hits - before).double() * hits / ranks, 0)
    found = gained.sum(0) / labels.sum(0)
    return found.masked_fill(scores.isnan().any(0), torch.nan)


@METRICS.register("multilabel")
class MultiLabel:
    """Mean average precision and F1 of images with several classes, in the place of the accuracy.

    All scores are kept: 5 bytes per sample and class. They are put together once, so that the
    figures do not depend on the number of processes.

    Args:
        device: where the logits are.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self._kept: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch, see :meth:`kw.evaluation.accuracy.Metric.update`; labels are ``[B, C]``.
        An image that could not be read is counted, and left out of the other figures.

        Raises:
            ValueError: labels are ``[B]``.
        """
        if labels.ndim != 2:
            raise ValueError(
                "metrics.multilabel: expected a row of 0 and 1 for each image, found one class; "
                "leave the metric out"
            )
        # Copied: CUDA graphs write a network's next logits into the same memory.
        self._kept.append((logits.to(torch.float32, copy=True), labels.to(torch.int8)))

    def compute(self) -> dict[str, float | None]:
        """Reduce over all processes and read: a collective call.

        Returns:
            ``mAP``, the mean of the classes' average precisions, in percent; None where a score is
            NaN. A class that no image has is left out of it: there is nothing to rank;
            ``absent_classes`` is their number, where there are any. ``f1`` at probability 0.5, in
            percent, of all decisions together (micro); None where nothing is present and nothing
            predicted. ``loss``, the binary cross-entropy in nats, a mean over images and classes;
            ``images``, and where there are any ``unreadable_images``.

        Raises:
            ValueError: no image could be read on any process, or none has a class.
        """
        shares = [[(logits.cpu(), labels.cpu()) for logits, labels in self._kept]]
        if dist.is_available() and dist.is_initialized():
            shares *= dist.get_world_size()
            dist.all_gather_object(shares, shares[0])
        batches = [batch for share in shares for batch in share]
        if not batches:
            raise ValueError("nothing was evaluated: the loader gave no image on any process")
        logits = torch.cat([logits for logits, _ in batches]).to(self.device)
        marks = torch.cat([labels for _, labels in batches]).to(self.device)
        readable = marks.ge(0).all(1)
        logits, labels, images = logits[readable], marks[readable] > 0, len(marks)
        if not len(labels):
            raise ValueError(f"nothing was evaluated: none of {images} images can be read")
        present = labels.any(0)
        if not present.any():
            raise ValueError(f"nothing was evaluated: none of {len(labels)} images has a class")
        predicted = logits > 0
        right, counted = int((predicted & labels).sum()), int(predicted.sum() + labels.sum())
        losses = F.binary_cross_entropy_with_logits(
            logits.double(), labels.double(), reduction="none"
        )
        precision = 100 * float(average_precision(logits, labels)[present].mean())
        found: dict[str, float | None] = {
            "mAP": None if math.isnan(precision) else precision,
            "f1": 200 * right / counted if counted else None,
            "loss": float(losses.mean()),
            "images": images,
        }
        if absent := int((~present).sum()):
            found["absent_classes"] = absent
        if len(labels) < images:
            found["unreadable_images"] = images - len(labels)
        return found
