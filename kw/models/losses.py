"""Losses of classifiers.

Legend: B samples, C classes. Targets are labels ``[B]``, int64, or probabilities ``[B, C]``, where
training smooths labels or mixes images. Class weights are factors ``[C]`` on the share of each
class, as in torch's losses for probabilities; a batch's mean is over its B samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import LOSSES


def balanced_weights(labels: Sequence[int] | np.ndarray, num_classes: int) -> Tensor:
    """Class weights N / (C n_c) of a set of N images, n_c of them of class c, as scikit-learn's
    ``compute_class_weight("balanced")``; their mean over the images is 1.

    Returns:
        float32 ``[C]``.

    Raises:
        ValueError: a class has no image.
    """
    counts = torch.bincount(torch.as_tensor(labels), minlength=num_classes)
    if empty := counts.eq(0).nonzero().flatten().tolist():
        raise ValueError(f"no image is of class {empty[0]} ({len(empty)} of {num_classes} classes)")
    return (len(labels) / (num_classes * counts.double())).float()


@LOSSES.register()
def cross_entropy(logits: Tensor, targets: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """The mean cross-entropy, in nats.

    With class weights the mean of labels is over the samples as that of probabilities is. torch
    divides the former by the batch's sum of weights, and an update would depend on how its images
    are dealt out to micro-batches.
    """
    if class_weights is None:
        return F.cross_entropy(logits, targets)
    return F.cross_entropy(logits, targets, class_weights, reduction="none").mean()


@LOSSES.register()
def bce(
    logits: Tensor,
    targets: Tensor,
    threshold: float | None = None,
    sum_classes: bool = False,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy: one independent yes-or-no decision for each class.

    "ResNet strikes back" (Wightman et al., arXiv 2110.00476), section 3: with mixup and cutmix,
    ``threshold`` makes every class that is in the mixed image present.

    Args:
        logits, targets, class_weights: see the head of this module.
        threshold: targets above it become 1, the others 0; None leaves them.
        sum_classes: the loss of an image is the sum over the classes, not their mean.
    """
    if targets.ndim == 1:
        targets = F.one_hot(targets, logits.shape[1])
    targets = targets.to(logits) if threshold is None else targets.gt(threshold).to(logits)
    losses = F.binary_cross_entropy_with_logits(logits, targets, class_weights, reduction="none")
    return losses.sum(1).mean() if sum_classes else losses.mean()


def soft_distillation(logits: Tensor, taught: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(taught / T) || softmax(logits / T)), the mean over the samples, in nats.

    Hinton, Vinyals and Dean, arXiv 1503.02531, section 2; T^2 keeps the gradient's size.

    ``logits`` are the student's, ``[B, C]`` float32, ``taught`` the teacher's.
    """
    wanted, found = (F.log_softmax(each / temperature, dim=1) for each in (taught, logits))
    divergence = F.kl_div(found, wanted, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


def hard_distillation(logits: Tensor, taught: Tensor) -> Tensor:
    """The cross-entropy with the teacher's most likely class as the label.

    Touvron et al., DeiT, arXiv 2012.12877, section 4, without the token. Arguments as above.
    """
    return F.cross_entropy(logits, taught.argmax(1))
