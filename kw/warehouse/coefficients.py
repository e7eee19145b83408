"""What the attention of a trained network does: how far it is from its start, and how dynamic.

A layer whose coefficients are the one-hot start is a static one; one whose coefficients do not vary
with the image is a static one too, of another kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attention import KernelAttention

__all__ = ["LayerCoefficients", "measure_coefficients"]


class LayerCoefficients(NamedTuple):
    """The coefficients of one layer over a batch of images."""

    layer: str
    mixtures: int
    cells: int
    own: float
    """coefficient of a mixture's own cell, mean over mixtures that have one and over images"""
    others: float
    """sum of the magnitudes of a mixture's other coefficients, mean over mixtures and images"""
    negative: float
    """share of the coefficients that are below zero"""
    variation: float
    """deviation over the images / mean over the images, each a root mean square over coefficients;
    0: the same for every image"""


@torch.no_grad()
def measure_coefficients(network: nn.Module, images: Tensor) -> list[LayerCoefficients]:
    """Measure every layer's coefficients at the network's temperature, in evaluation mode.

    Args:
        network: a KernelWarehouse network; it is left in the mode that it was in.
        images: [B, 3, H, W], two at least, as the network takes them.
    """
    found: list[LayerCoefficients] = []
    handles = [
        module.register_forward_hook(
            lambda attention, _, alpha, name=name: found.append(_measure(name, attention, alpha))
        )
        for name, module in network.named_modules()
        if isinstance(module, KernelAttention)
    ]
    training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        network(images)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return found


def _measure(name: str, attention: KernelAttention, alpha: Tensor) -> LayerCoefficients:
    if attention.one_hot is None:
        raise ValueError(f"{name}: its temperature is folded, and which cells are its own is lost")
    start = attention.one_hot.to(alpha)  # [m, n]
    own = (alpha * start).sum() / (start.sum() * len(alpha))
    others = (alpha * (1 - start)).abs().sum(-1).mean()
    mean, deviation = alpha.mean(0), alpha.std(0)
    _, mixtures, cells = alpha.shape
    return LayerCoefficients(
        name.removesuffix(".attention"),
        mixtures,
        cells,
        own.item(),
        others.item(),
        (alpha < 0).float().mean().item(),
        (deviation.square().mean() / mean.square().mean()).sqrt().item(),
    )
