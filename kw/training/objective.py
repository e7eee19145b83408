"""What a classifier's training minimises: its loss, with weights of the classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..config import ConfigError
from ..config.schema import Config
from ..data import Listing
from ..models.losses import balanced_weights
from ..registry import LOSSES

__all__ = ["build_loss"]


def build_loss(
    config: Config, listing: Listing, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a run: ``(logits [B, C] float32, targets) -> scalar``.

    Args:
        config: the run.
        listing: the training images.
        device: where the logits are.

    Raises:
        ConfigError: classes are to be balanced, and one has no image.
    """
    loss, settings = config.loss, dict(config.loss.args)
    if loss.class_weights == "balanced":
        try:
            weights = balanced_weights(listing.labels, config.model.num_classes)
        except ValueError as error:
            raise ConfigError(
                f"loss.class_weights: balanced: {error}; give a list of numbers"
            ) from error
        settings["class_weights"] = weights.to(device)
    elif loss.class_weights is not None:
        settings["class_weights"] = torch.tensor(loss.class_weights, device=device)
    return partial(LOSSES.find(loss.name), **settings)
