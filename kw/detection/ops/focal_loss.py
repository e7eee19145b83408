"""Focal loss (Lin et al., 2017): cross entropy with small weights for well classified examples.

mmcv's CUDA code takes logarithms of probabilities, bounded by the least float32. The loss here is
computed from logits: the same, but exact for probabilities that float32 rounds to 0.

Legend: N samples, C classes. ``weight`` is empty or has a factor for each class, ``[C]``; samples
of the background have the factor 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .widening import widen

__all__ = ["sigmoid_focal_loss_backward", "sigmoid_focal_loss_forward"]


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """``output = -a (1 - q)^gamma log q`` for each class.

    ``q`` is the probability of the right answer: ``sigmoid(x)`` and ``a = alpha`` for the class of
    the target, ``1 - sigmoid(x)`` and ``a = 1 - alpha`` for all others.

    Args:
        input: logits, ``[N, C]``.
        target: int64 ``[N]``; C and other values that are not a class are background.
        weight: empty or ``[C]``.
        output: ``[N, C]``, filled.
        gamma, alpha: as in the paper.
    """
    _, log_q, wrong, scale = _sigmoid_terms(input, target, weight, alpha)
    output.copy_(-scale * wrong**gamma * log_q)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """The derivative by the logits; ``grad_input`` ``[N, C]`` is filled, the rest as forward."""
    sign, log_q, wrong, scale = _sigmoid_terms(input, target, weight, alpha)
    slope = wrong**gamma * (gamma * (1 - wrong) * log_q - wrong)
    grad_input.copy_(scale * sign * slope)


def _sigmoid_terms(
    input: Tensor, target: Tensor, weight: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sign of the right answer, log q, ``1 - q`` and the factor, ``[N, C]`` each."""
    (x,) = widen(input)
    is_target = target[:, None] == torch.arange(x.shape[1], device=x.device)
    sign = is_target.to(x) * 2 - 1
    scale = torch.full_like(x, 1 - alpha).masked_fill(is_target, alpha)
    scale = scale * _weights(weight, target, x)[:, None]
    return sign, F.logsigmoid(sign * x), torch.sigmoid(-sign * x), scale


def _weights(weight: Tensor, target: Tensor, like: Tensor) -> Tensor:
    if not weight.numel():
        return like.new_ones(len(target))
    is_class = (target >= 0) & (target < len(weight))
    return torch.where(is_class, weight.to(like)[target.clamp(0, len(weight) - 1)], 1)
