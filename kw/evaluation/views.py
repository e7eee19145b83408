"""A classifier evaluated on several views of each image, or on some of its classes.

Legend: B images, C classes, V views, S the network's input size, L the side of larger images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import five_crop, hflip

TTA = {"flip": (False, True), "five": (True, False), "ten": (True, True)}
"""Test-time augmentation by name: whether five crops are taken, whether each view is mirrored."""


class Views(nn.Module):
    """The mean prediction over views of an image; logits of left-out classes are minus infinity.

    What is averaged are the softmax probabilities of the classes that count, as Krizhevsky et al.
    (NeurIPS 2012) average over ten crops: four corners and the centre of a square image, and their
    mirror images. The output is the logarithm of the mean.

    Args:
        network: images ``[B, 3, S, S]`` -> logits ``[B, C]``.
        tta: a key of :data:`TTA`; ``None`` for the image as it is, whose logits stay as they are.
        size: S; with crops, images are ``[B, 3, L, L]``.
        subset: classes that count; ``None`` for all.
    """

    def __init__(
        self,
        network: nn.Module,
        tta: str | None = None,
        size: int = 0,
        subset: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.tta, self.size, self.subset = network, tta, size, subset

    def forward(self, images: Tensor) -> Tensor:
        """Images -> logits, or the logarithm of mean probabilities, ``[B, C]``."""
        if self.tta is None:
            return self._logits(images)
        crops, mirrored = TTA[self.tta]
        views = list(five_crop(images, [self.size, self.size])) if crops else [images]
        if mirrored:
            views += [hflip(view) for view in views]
        last = images.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        views = [view.contiguous(memory_format=layout) for view in views]
        each = [self._logits(view).float().log_softmax(1) for view in views]
        return torch.stack(each).logsumexp(0) - math.log(len(each))  # of [V, B, C]

    def _logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        if self.subset is None:
            return logits
        kept = torch.full_like(logits, -torch.inf)
        kept[:, self.subset] = logits[:, self.subset]
        return kept
