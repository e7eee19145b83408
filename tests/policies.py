"""Pictures to augment, and timm's functions on them one by one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from timm.data import auto_augment as timm_policies

from kw.config.data_schema import DataConfig
from kw.data.policies import Step
from kw.data.transforms import _posterize, policy_operations, training_steps

RAND = "rand-m9-mstd0.5-inc1"


def configured(policy: str | None = RAND, **settings: Any) -> DataConfig:
    return DataConfig(root="unused", auto_augment=policy, **{"input_size": 24, **settings})


def pictures(height: int, width: int) -> torch.Tensor:
    """Noise, ramps, smooth shapes, dark noise and one colour; uint8 [5, 3, H, W]."""
    rng = np.random.default_rng(height * 1000 + width)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    y, x = np.mgrid[:height, :width]
    ramps = np.stack([x * 255 // width, y * 255 // height, (x + y) * 3 % 256], -1)
    shapes = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2)))
    plain = np.full_like(noise, (77, 0, 255))
    images = [noise, ramps.astype(np.uint8), shapes, noise // 8 + 20, plain]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def to_pillow(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def from_pillow(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def with_timm(image: Image.Image, step: Step, config: DataConfig) -> Image.Image:
    """timm's own function on a Pillow image."""
    arguments = () if step.name in ("auto_contrast", "equalize", "invert") else (step.value,)
    function = getattr(timm_policies, step.name)
    return (_posterize if step.name == "posterize" else function)(
        image,
        *arguments,
        fillcolor=tuple(round(255 * mean) for mean in config.mean),
        resample=Image.Resampling[config.interpolation.upper()],
    )


def timms_steps(config: DataConfig) -> list[Any]:
    """timm's policy and colour jitter, which runs with the installed Pillow."""
    steps = training_steps(config)[1]
    for op in policy_operations(steps):
        if op.aug_fn is timm_policies.posterize:
            op.aug_fn = _posterize
    return steps


def names(steps: Iterable[Step]) -> tuple[str, ...]:
    return tuple(step.name for step in steps)
