"""A classifier's predictions for every image of a set, and statistics of them.

Legend: N images of the set, B of a batch, C classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

_UNREADABLE, _FIRST = 1, 2  # as stored: 0 is an image that no process has evaluated


class Outcomes:
    """The five best classes of every image and the probability of the best.

    Every process enters its share of the images; :meth:`gather` sums over processes, of which all
    but one have zeros: exact on any number of processes.

    Args:
        images: N.
        device: where the logits are.

    Attributes:
        best: after :meth:`gather`, ``[N, 5]``, the classes of the largest logits, the largest
            first; -1 where the model has fewer, and for an image that cannot be read.
        confidence: likewise ``[N]``, the softmax probability of the best; 0 for an image that
            cannot be read.
    """

    best: Any
    confidence: Any

    def __init__(self, images: int, device: torch.device | str = "cpu") -> None:
        self._best = torch.zeros(images, 5, dtype=torch.int32, device=device)
        self._confidence = torch.zeros(images, dtype=torch.float32, device=device)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Enter a batch.

        Args:
            logits: ``[B, C]``, any floating type.
            labels: ``[B]``, -1 for an image that cannot be read.
            indices: ``[B]``, places of the images in the set.
        """
        logits = logits.float()
        values, classes = logits.topk(min(5, logits.shape[1]))
        stored = torch.full((len(logits), 5), _UNREADABLE, device=logits.device, dtype=torch.int32)
        stored[:, : classes.shape[1]] = classes.int() + _FIRST
        bad = labels.lt(0)
        stored.masked_fill_(bad[:, None], _UNREADABLE)
        confidence = (values[:, 0] - logits.logsumexp(1)).exp().masked_fill(bad, 0)
        places = indices.to(logits.device)
        self._best[places] = stored
        self._confidence[places] = confidence

    def gather(self) -> None:
        """Collect the entries of all processes: a collective call.

        Raises:
            ValueError: an image was not evaluated.
        """
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._best)
            dist.all_reduce(self._confidence)
        self.best = self._best.cpu().numpy().astype(np.int64) - _FIRST
        self.confidence = self._confidence.cpu().numpy().astype(np.float64)
        left = np.flatnonzero(self.best[:, 0] == -_FIRST)
        if len(left):
            raise ValueError(f"{len(left)} images were not evaluated, the first is {left[0]}")


class Calibration(NamedTuple):
    """Confidence against accuracy in bins of equal width, and the expected calibration error."""

    ece: float | None
    """percent; ``None`` if no image has a confidence, or one that is not finite"""
    counts: Any
    """``[M]`` images of each bin"""
    confidence: Any
    """``[M]`` their mean confidence; NaN in an empty bin"""
    accuracy: Any
    """``[M]`` the share of them that is right"""


def calibration(confidence: Any, right: Any, bins: int = 15) -> Calibration:
    """The expected calibration error: the mean over images of |accuracy - confidence| of their bin.

    Bin m of M holds confidences in ((m - 1) / M, m / M]. Guo et al., *On calibration of modern
    neural networks*, ICML 2017, equation 3, with M = 15 as there.

    Args:
        confidence: ``[N]``, probabilities.
        right: ``[N]``, booleans.
        bins: M.
    """
    nothing = np.full(bins, np.nan)
    if not len(confidence) or not np.isfinite(confidence).all():
        return Calibration(None, np.zeros(bins, dtype=np.int64), nothing, nothing)
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, weights, bins) for weights in (confidence, right)]
    means = [np.divide(s, counts, out=nothing.copy(), where=counts > 0) for s in sums]
    ece = 100 * np.abs(sums[0] - sums[1]).sum() / len(confidence)
    return Calibration(float(ece), counts, *means)


def class_hits(hits: Any, labels: Any, classes: int) -> Any:
    """``[C, 3]``: a class's images, those right at the first place, and among the first five.

    Args:
        hits: ``[N, 5]`` booleans, :meth:`kw.evaluation.sets.TestSet.hits`.
        labels: ``[N]``, or ``[N, K]`` where an image has several: it counts for each of them once.
        classes: C.
    """
    labels = np.asarray(labels).reshape(len(hits), -1)
    counted = np.zeros((classes, 3), dtype=np.int64)
    for column in range(labels.shape[1]):
        new = (labels[:, :column] != labels[:, column : column + 1]).all(1)
        label = labels[new, column]
        for place, weights in enumerate((None, hits[new, 0], hits[new].any(1))):
            counted[:, place] += np.bincount(label, weights, classes).astype(np.int64)
    return counted


def confusion(predicted: Any, labels: Any, classes: int) -> Any:
    """``[C, C]`` images by class, in rows, and predicted class; unreadable ones left out."""
    labels = np.asarray(labels)
    read = predicted >= 0
    pairs = labels[read] * classes + predicted[read]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def worst(confidence: Any, right: Any, predicted: Any, most: int) -> Any:
    """Places of the most confident mistakes, the most confident first, then in the set's order."""
    wrong = np.flatnonzero(~right & (predicted >= 0) & np.isfinite(confidence))
    return wrong[np.argsort(-confidence[wrong], kind="stable")[:most]]
