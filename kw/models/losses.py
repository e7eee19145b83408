"""Losses of classifiers.

Legend: B samples, C classes. Targets are labels ``[B]``, int64, or probabilities ``[B, C]``, where
training smooths labels or mixes images.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..registry import LOSSES

__all__ = ["bce", "cross_entropy"]


@LOSSES.register()
def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy, in nats."""
    return F.cross_entropy(logits, targets)


@LOSSES.register()
def bce(
    logits: Tensor, targets: Tensor, threshold: float | None = None, sum_classes: bool = False
) -> Tensor:
    """Binary cross-entropy: one independent yes-or-no decision for each class.

    "ResNet strikes back" (Wightman et al., arXiv 2110.00476), section 3: with mixup and cutmix,
    ``threshold`` makes every class that is in the mixed image present.

    Args:
        logits: ``[B, C]``.
        targets: see the head of this module.
        threshold: targets above it become 1, the others 0; None leaves them.
        sum_classes: the loss of an image is the sum over the classes, not their mean.
    """
    if targets.ndim == 1:
        targets = F.one_hot(targets, logits.shape[1])
    targets = targets.to(logits) if threshold is None else targets.gt(threshold).to(logits)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return losses.sum(1).mean() if sum_classes else losses.mean()
