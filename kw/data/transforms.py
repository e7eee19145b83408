"""What happens to one image on the CPU: from a PIL image to a uint8 tensor [3, S, S].

Normalisation, random erasing and mixing work on the batch, on the device: see
:mod:`kw.data.preprocess`. A quarter of the bytes of float images then travels to the device.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize

from kw.config.schema import DataConfig

__all__ = ["build_transform"]


def build_transform(config: DataConfig, training: bool) -> Callable[[Image.Image], torch.Tensor]:
    """The transform of one split; S is ``config.input_size``.

    Training: random resized crop, mirroring, then timm's augmentation policy or else colour jitter
    (with the policies named ``3a``, timm's three-augment, both). Test: the shorter side is resized
    to floor(S / ``test_crop_ratio``), then the central square of S is cut out.

    Args:
        config: the data settings, checked (:mod:`kw.config.rules`).
        training: whether to augment.

    Returns:
        RGB image of any size -> uint8 tensor [3, S, S].
    """
    if not training:
        return create_transform(
            config.input_size,
            is_training=False,
            interpolation=config.interpolation,
            crop_pct=config.test_crop_ratio,
            normalize=False,
        )
    transform = create_transform(
        config.input_size,
        is_training=True,
        scale=(config.crop_scale[0], config.crop_scale[1]),
        ratio=(config.crop_ratio[0], config.crop_ratio[1]),
        hflip=config.horizontal_flip,
        color_jitter=config.color_jitter,  # type: ignore[arg-type]  # timm takes None: no jitter
        auto_augment=config.auto_augment,
        interpolation=config.interpolation,
        # Filler of rotated and shifted images; nothing is normalised here.
        mean=tuple(config.mean),
        normalize=False,
    )
    for step in transform.transforms:
        # RandAugment and AugMix keep their operations flat, AutoAugment in sub-policies.
        for op in [*getattr(step, "ops", ()), *chain(*getattr(step, "policy", ()))]:
            if op.aug_fn is posterize:
                op.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's operation, which asks for 0 bits at full strength: a black image.

    Pillow 13 refuses 0 bits. With rand-m9-mstd0.5-inc1 that is one image in 700.
    """
    return posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)
