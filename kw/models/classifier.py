"""The classifier as mmengine's runner sees it: network, batch preprocessing and loss."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from mmengine.model import BaseModel
from torch import Tensor, nn

from ..registry import MODELS
from .freezing import hold_frozen

__all__ = ["ImageClassifier"]


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """A network with its loss.

    Args:
        network: images ``[B, 3, H, W]`` -> logits ``[B, C]``. Checkpoints hold its state alone.
        data_preprocessor: ``(batch, training) -> (images, targets)``.
    """

    def __init__(self, network: nn.Module, data_preprocessor: nn.Module) -> None:
        super().__init__(data_preprocessor)
        self.network = network

    def init_weights(self) -> None:
        """Nothing: the network was initialised when it was built."""

    def train(self, mode: bool = True) -> ImageClassifier:
        """Training mode, but for what is frozen."""
        super().train(mode)
        if mode:
            hold_frozen(self.network)
        return self

    def forward(self, images: Tensor, targets: Tensor, mode: str = "tensor") -> Any:
        """Loss or logits.

        Args:
            images: ``[B, 3, H, W]``.
            targets: int64 labels ``[B]`` or class probabilities ``[B, C]``.
            mode: ``"loss"`` gives ``{"loss": mean cross-entropy}``, ``"tensor"`` the logits.
        """
        logits = self.network(images)
        if mode == "loss":
            return {"loss": F.cross_entropy(logits.float(), targets)}
        return logits
