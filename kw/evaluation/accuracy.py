"""Exact classification metrics: sums and counts, reduced over processes, divided once.

Legend: B samples, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..registry import METRICS


class Metric(Protocol):
    """Figures of a set whose images are divided among processes."""

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: ``[B, C]`` of any floating type, and class indices ``[B]``, -1 for an
        unreadable image; with several classes an image 0 and 1 ``[B, C]`` of any type, a row of -1
        for an unreadable one."""

    def compute(self) -> Mapping[str, float | None]:
        """Reduce over all processes and read: a collective call."""


@METRICS.register("accuracy")
class Accuracy:
    """Top-1, top-5 and cross-entropy over a set whose images are divided among processes.

    Batches may differ in size, and processes in their number of batches: nothing is averaged before
    the end. Sums stay on the device until :meth:`compute`.

    Args:
        device: where the logits are.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        # images, top-1 hits, top-5 hits, summed loss, images that could be read
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch, see :meth:`Metric.update`; labels are ``[B]``. An image that could not be
        read counts as wrong and has no loss."""
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1])).indices  # [B, 5], best first
        hits = best.eq(labels[:, None])
        loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
        self.sums[0] += len(labels)
        self.sums[1] += hits[:, 0].sum()
        self.sums[2] += hits.any(1).sum()
        self.sums[3] += loss.double().sum()
        self.sums[4] += labels.ge(0).sum()

    def compute(self) -> dict[str, float]:
        """Reduce over all processes and read: a collective call.

        Returns:
            ``top1`` and ``top5`` in percent (top-5 of fewer than five classes counts all of them),
            ``loss`` in nats per image, and ``images``, the number of images counted. Where some of
            them could not be read, ``unreadable_images`` is their number.

        Raises:
            ValueError: no image was counted on any process, or none that could be read.
        """
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.sums)
        images, top1, top5, loss, readable = self.sums.tolist()
        if images == 0:
            raise ValueError("nothing was evaluated: the loader gave no image on any process")
        if readable == 0:
            raise ValueError(f"nothing was evaluated: none of {images:.0f} images can be read")
        found = {
            "top1": 100 * top1 / images,
            "top5": 100 * top5 / images,
            "loss": loss / readable,
            "images": int(images),
        }
        if readable < images:
            found["unreadable_images"] = int(images - readable)
        return found
