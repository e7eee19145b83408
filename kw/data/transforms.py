"""What happens to one image on the CPU: from a PIL image to a uint8 tensor [3, S, S].

Normalisation, random erasing and mixing work on the batch, on the device: see
:mod:`kw.data.preprocess`. A quarter of the bytes of float images then travels to the device.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize

from kw.config.schema import DataConfig

__all__ = ["build_transform"]

_NUMBER = r"\d+(\.\d+)?"
_POLICIES = re.compile(
    rf"rand(-(m|n|mmax)\d+|-(p|mstd){_NUMBER}|-inc[01]|-t(weights|3aw|3a))*"
    rf"|augmix(-(m|w|d)\d+|-(a|mstd){_NUMBER}|-b[01])*"
    rf"|(original|originalr|v0|v0r|3a)(-mstd{_NUMBER})?"
)


def build_transform(config: DataConfig, training: bool) -> Callable[[Image.Image], torch.Tensor]:
    """The transform of one split; S is ``config.input_size``.

    Training: random resized crop, mirroring, then timm's augmentation policy or else colour jitter
    (with the policies named ``3a``, timm's three-augment, both). Test: the shorter side is resized
    to floor(S / ``test_crop_ratio``), then the central square of S is cut out.

    Args:
        config: the data settings.
        training: whether to augment.

    Returns:
        RGB image of any size -> uint8 tensor [3, S, S].

    Raises:
        ValueError: an unknown augmentation policy, or a range that is not [low, high].
    """
    if not training:
        return create_transform(
            config.input_size,
            is_training=False,
            interpolation=config.interpolation,
            crop_pct=config.test_crop_ratio,
            normalize=False,
        )
    # timm reads a policy leniently: options that it does not know are ignored or fail an assertion.
    if config.auto_augment is not None and not _POLICIES.fullmatch(config.auto_augment):
        raise ValueError(
            f"data.auto_augment is {config.auto_augment!r}: expected a policy of timm such as "
            "rand-m9-mstd0.5-inc1, augmix-m3-w3, original, originalr, v0, v0r or 3a"
        )
    transform = create_transform(
        config.input_size,
        is_training=True,
        scale=_range(config.crop_scale, "data.crop_scale", maximum=1.0),
        ratio=_range(config.crop_ratio, "data.crop_ratio"),
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


def _range(values: Sequence[float], key: str, maximum: float = float("inf")) -> tuple[float, float]:
    if len(values) != 2 or not 0 < values[0] <= values[1] <= maximum:
        limit = f" <= {maximum:g}" if maximum < float("inf") else ""
        raise ValueError(
            f"{key} is {list(values)}: expected [low, high] with 0 < low <= high{limit}"
        )
    return float(values[0]), float(values[1])
