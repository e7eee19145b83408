"""A classifier as it is trained: network, batch preprocessing and loss."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .freezing import hold_frozen

__all__ = ["ImageClassifier"]


class ImageClassifier(nn.Module):
    """A network with its loss, the mean cross-entropy.

    Args:
        network: images ``[B, 3, H, W]`` -> logits ``[B, C]``. Checkpoints hold its state alone.
        preprocess: ``(batch, training) -> (images, targets)``; targets are int64 labels ``[B]`` or
            class probabilities ``[B, C]``.
    """

    def __init__(self, network: nn.Module, preprocess: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.preprocess = preprocess

    def train(self, mode: bool = True) -> ImageClassifier:
        """Training mode, but for what is frozen."""
        super().train(mode)
        if mode:
            hold_frozen(self.network)
        return self

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """A training batch -> ``{"loss": ...}``."""
        images, targets = self.preprocess(batch, True)
        return {"loss": F.cross_entropy(self.network(images).float(), targets)}
