"""A classifier as it is trained: network, batch preprocessing and loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .freezing import hold_frozen
from .losses import cross_entropy


class ImageClassifier(nn.Module):
    """A network with its loss.

    Args:
        network: images ``[B, 3, H, W]`` -> logits ``[B, C]``. Checkpoints hold its state alone.
        preprocess: ``(batch, training) -> (images, targets)``; targets are int64 labels ``[B]`` or
            class probabilities ``[B, C]``.
        loss: ``(logits [B, C] float32, targets) -> scalar``.
        teacher: ``(images, logits [B, C] float32, loss) -> losses by name`` takes the loss further.
            It is no module, so that its network is not trained, stored or distributed with this.
    """

    def __init__(
        self,
        network: nn.Module,
        preprocess: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
        teacher: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.preprocess = preprocess
        self.loss = loss
        assert not isinstance(teacher, nn.Module)
        self.teacher = teacher

    def train(self, mode: bool = True) -> ImageClassifier:
        """Training mode; frozen modules stay in evaluation mode."""
        super().train(mode)
        if mode:
            hold_frozen(self.network)
        return self

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """A training batch -> ``{"loss": ...}``; beside a teacher also the parts of it."""
        images, targets = self.preprocess(batch, True)
        logits = self.network(images).float()
        loss = self.loss(logits, targets)
        return {"loss": loss} if self.teacher is None else self.teacher(images, logits, loss)
