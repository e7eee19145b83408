"""Preprocessing of a batch on the device: policies, normalisation, erasing, mixing, targets.

Legend: B batch, N channels, H x W input size, C classes.

Random erasing: Zhong et al., AAAI 2020. Mixup: Zhang et al., ICLR 2018. CutMix: Yun et al., ICCV
2019. All three are timm's. Images are erased before they are mixed, as in the training codes of
DeiT and ConvNeXt, from which the 300-epoch recipe comes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from kw.config.data_schema import DataConfig
from kw.data.policies import BatchPolicy
from kw.data.seeding import derive_seed, seeded


def training_size(config: DataConfig, epoch: int) -> int:
    """Side of the training images of an epoch (from 0), pixels."""
    growth, (full, _) = config.progressive, config.shape  # a square, where they grow
    if growth is None or epoch >= growth.epochs:
        return full
    wanted = growth.start + (full - growth.start) * epoch / growth.epochs
    return max(growth.start, int(wanted // growth.multiple) * growth.multiple)


class BatchPreprocessor(nn.Module):
    """A loader's batch -> images and targets, on this module's device.

    No synchronisation with the device: random choices that decide control flow are drawn on the
    host.

    Args:
        config: the data settings, checked (:mod:`kw.config.rules`).
        num_classes: C.
        label_smoothing: probability mass spread evenly over all classes, in training; for images of
            several classes over "yes" and "no" of each class.
        seed: seed of policies, erasing and mixing.
        channels_last: return images in NHWC memory layout.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        config: DataConfig,
        num_classes: int,
        label_smoothing: float = 0.0,
        seed: int = 0,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        # In units of bytes, so that images need no division by 255 first.
        for key, values in (("mean", config.mean), ("std", config.std)):
            buffer = torch.tensor(values).mul_(255).view(1, -1, 1, 1)
            self.register_buffer(key, buffer, persistent=False)
        self.config = config
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.seed = seed
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.erasing = config.random_erasing
        self.policy: BatchPolicy | None = None
        if config.augments_on_device and (config.auto_augment or config.color_jitter):
            self.policy = BatchPolicy(config)
        self.mixup: Mixup | None = None
        if config.mix_probability > 0 and (config.mixup > 0 or config.cutmix > 0):
            self.mixup = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                prob=config.mix_probability,
                switch_prob=config.mix_switch_probability,
                label_smoothing=label_smoothing,
                num_classes=num_classes,
            )

    def forward(self, batch: dict[str, Any], training: bool) -> tuple[Tensor, Tensor]:
        """Move, normalise and, in training, augment, erase and mix.

        Args:
            batch: from a loader; ``images`` is uint8 [B, N, H, W], or float32 in units of bytes,
                and is not changed. Its ``key``, unique in the run, seeds its random choices; an
                image's own those of a policy.
            training: whether to augment, erase, mix and smooth.

        Returns:
            Images, float32 [B, N, H, W], in training those of ``data.progressive`` smaller, and
            targets: int64 labels [B], or float32 probabilities [B, C] where training mixes or
            smooths. Labels [B, C] of images of several classes stay what they are in evaluation,
            and are float32 in training.

        Raises:
            ValueError: mixing was asked for and B is odd.
        """
        device = self.mean.device
        images = batch["images"].to(device, non_blocking=True)
        if training and self.policy is not None:
            seeds = [derive_seed("policy", self.seed, *each) for each in batch["keys"]]
            images = self.policy(images, seeds)
        # Change the layout of the bytes first; the subtraction then writes the only float copy in
        # that layout.
        images = images.contiguous(memory_format=self.memory_format)
        images = torch.sub(images, self.mean).div_(self.std)
        labels = batch["labels"].to(device, non_blocking=True)
        if not training:
            return images, labels
        if self.config.progressive is not None:
            images = self._resized(images, training_size(self.config, batch["key"][0]))
        if self.erasing is not None or self.mixup is not None:
            with seeded("batch", self.seed, *batch["key"], device=device):
                return self._augment(images, labels)
        return images, self._targets(labels)

    def _resized(self, images: Tensor, side: int) -> Tensor:
        if images.shape[-1] == side:
            return images
        images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        return images.contiguous(memory_format=self.memory_format)

    def _augment(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.erasing is not None:
            erase = RandomErasing(
                self.erasing.probability,
                mode=self.erasing.mode,
                max_count=self.erasing.count,
                device=images.device,
            )
            images = erase(images)
        if self.mixup is None:
            return images, self._targets(labels)
        if len(images) % 2:
            raise ValueError(
                f"mixup and cutmix pair the images of a batch: batch_size is {len(images)}, "
                "expected an even number (or data.mixup and data.cutmix 0)"
            )
        if labels.ndim == 1:
            return self.mixup(images, labels)
        targets, share = self._targets(labels), self.mixup._mix_batch(images)
        return images, share * targets + (1 - share) * targets.flip(0)

    def _targets(self, labels: Tensor) -> Tensor:
        if labels.ndim == 2:
            return labels.float() * (1 - self.label_smoothing) + self.label_smoothing / 2
        if not self.label_smoothing:
            return labels
        return mixup_target(labels, self.num_classes, smoothing=self.label_smoothing)  # [B, C]
