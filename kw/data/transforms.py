"""The transforms of one image on the CPU: from a PIL image to a uint8 tensor [C, H, W].

Images that are tensors (:mod:`kw.data.channels`) stay in their type.

Normalisation, random erasing and mixing work on the batch, on the device: see
:mod:`kw.data.preprocess`. Copies to the device then have a quarter of the bytes of float images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import PIL
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, posterize
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode
from torchvision.transforms import Compose, RandomHorizontalFlip, Resize
from torchvision.transforms import functional as F

from kw.config.data_schema import DataConfig
from kw.data.fast import Box, FastMiddle, FastRandomCrop, FastTransform, not_empty
from kw.registry import TRANSFORMS

_PILLOW = int(PIL.__version__.partition(".")[0])
_LONG = 8  # times the shorter side: of longer images only the middle is resized


def build_transform(config: DataConfig, training: bool) -> Compose:
    """The transform of one split; H x W is ``config.shape``, S their value where they are equal.

    Training: those of ``data.transforms``, random resized crop, mirroring, then timm's augmentation
    policy or else colour jitter (with the policies ``3a``, timm's three-augment, both), unless
    :class:`~kw.data.preprocess.BatchPreprocessor` applies these to whole batches. Test: the shorter
    side is resized to floor(S / ``test_crop_ratio``), then the central square of S is cut out.
    Where H and W differ, the image is resized until it just covers floor(H / ``test_crop_ratio``) x
    floor(W / ``test_crop_ratio``), as timm does.

    Returns:
        Image of any size -> uint8 tensor [C, H, W], or float32 with ``data.pixels: uint16``.
    """
    height, width = config.shape
    # Filters may leave the range of their input; torch clips bytes, and not floats.
    clip = [] if config.pixels == "uint8" else [partial(torch.clamp, min=0, max=255)]
    if not training:
        test = create_transform(
            _size(config),
            is_training=False,
            interpolation=config.interpolation,
            crop_pct=config.test_crop_ratio,
            normalize=False,
        )
        # Up to 1.0.30 timm's transform of sizes that are not square is always bilinear.
        test.transforms[0].interpolation = str_to_interp_mode(config.interpolation)
        if height != width or not config.are_pictures:
            return Compose([_CutLong(height / width), *test.transforms, *clip])
        resize, *rest = test.transforms
        return Compose([_ResizeMiddle(resize, height, config.interpolation), *rest])
    cut, policy, to_tensor = training_steps(config)
    cut[0].get_params = _draw_part
    if config.augments_on_device:
        policy = []
    for op in policy_operations(policy):
        if op.aug_fn is posterize:
            op.aug_fn = _posterize
    first = [TRANSFORMS.find(name)(**args) for name, args in config.transforms.items()]
    return Compose([*first, *cut, *policy, *to_tensor, *clip])


def _draw_part(image: Any, scale: Sequence[float], ratio: Sequence[float]) -> Box:
    """timm's random part of an image, as it draws it, but never an empty one."""
    _, height, width = F.get_dimensions(image)
    part = RandomResizedCropAndInterpolation.get_params(image, scale, ratio)
    return not_empty(part, (width, height))


class _CutLong:
    """Of very long images only the middle goes on to be resized: it is cropped next.

    Args:
        shape: height / width of the crop.
    """

    def __init__(self, shape: float) -> None:
        self.shape = shape

    def __call__(self, image: Any) -> Any:
        _, height, width = F.get_dimensions(image)
        tall = min(height, math.ceil(_LONG * width * self.shape))
        wide = min(width, math.ceil(_LONG * height / self.shape))
        return image if (tall, wide) == (height, width) else F.center_crop(image, [tall, wide])


def build_fast_transform(config: DataConfig, training: bool) -> FastTransform:
    """The transform of one split for images that are not decoded yet (:mod:`kw.data.fast`)."""
    steps = build_transform(config, training).transforms
    if not training:
        height, width = (math.floor(side / config.test_crop_ratio) for side in config.shape)
        return FastMiddle((height, width), config.shape, config.interpolation, _LONG)
    crop, *rest = steps
    policy = [step for step in rest if not isinstance(step, RandomHorizontalFlip)]
    # The last step makes a tensor; policies and jitter before it work on Pillow images.
    return FastRandomCrop(
        crop,
        config.interpolation,
        config.horizontal_flip,
        Compose(policy) if len(policy) > 1 else None,
    )


def _size(config: DataConfig) -> int | tuple[int, int]:
    """The input's size as timm takes it: its transforms of squares take one number."""
    height, width = config.shape
    return height if height == width else (height, width)


def training_steps(config: DataConfig) -> tuple[list[Any], list[Any], list[Any]]:
    """timm's transforms in training: crop and mirroring, policy and colour jitter, to a tensor."""
    parts = create_transform(
        _size(config),
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
        separate=True,
    )
    cut, policy, to_tensor = (part.transforms for part in parts)
    return cut, policy, to_tensor


def policy_operations(steps: Iterable[Any]) -> Iterator[AugmentOp]:
    """The operations of the policies among transforms."""
    for step in steps:
        # RandAugment and AugMix keep them flat, AutoAugment in sub-policies.
        yield from getattr(step, "ops", ())
        yield from chain(*getattr(step, "policy", ()))


class _ResizeMiddle:
    """Resizing of the shorter side; of very long images only the middle, which is cropped next.

    A picture of 2 x 60,000 pixels would otherwise become one of two billion.
    """

    def __init__(self, resize: Resize, crop: int, interpolation: str) -> None:
        self.resize, self.crop = resize, crop
        self.filter = Image.Resampling[interpolation.upper()]

    def __call__(self, image: Image.Image) -> Image.Image:
        short, long = sorted(image.size)
        size = int(self.resize.size)  # of the shorter side
        scaled = int(size * long / short)
        if scaled <= _LONG * size:
            return self.resize(image)
        # Outputs beside the middle that its edges' filters reach: three of the source's pixels.
        beside = math.ceil(3 * max(1.0, size / short))
        start = round((scaled - self.crop) / 2)
        first, last = max(start - beside, 0), min(start + self.crop + beside, scaled)
        low, high = first * long / scaled, last * long / scaled  # in the source's pixels
        edges = max(math.floor(low), 0), min(math.ceil(high), long)
        is_wide = image.width == long
        whole = (scaled, size) if is_wide else (size, scaled)
        part = image.crop(
            (edges[0], 0, edges[1], short) if is_wide else (0, edges[0], short, edges[1])
        )
        # Each step rounds to whole numbers: first the one that Pillow would take first.
        horizontal_first = _PILLOW < 12 or whole[0] * image.height <= image.width * whole[1]
        for horizontal in (horizontal_first, not horizontal_first):
            count, start_at, end_at = size, 0.0, float(short)
            if horizontal == is_wide:
                count, start_at, end_at = last - first, low - edges[0], high - edges[0]
            if horizontal:
                box = (start_at, 0.0, end_at, float(part.height))
                part = part.resize((count, part.height), self.filter, box)
            else:
                box = (0.0, start_at, float(part.width), end_at)
                part = part.resize((part.width, count), self.filter, box)
        cut = start - first, start - first + self.crop
        return part.crop((cut[0], 0, cut[1], size) if is_wide else (0, cut[0], size, cut[1]))


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's operation, with a black image for 0 bits (full strength).

    Pillow 13 refuses 0 bits. With rand-m9-mstd0.5-inc1 that is one image in 700.
    """
    return posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)
