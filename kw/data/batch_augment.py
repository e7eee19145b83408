"""Random resized crop and mirroring of a batch of tensors.

The same distributions as :func:`kw.data.transforms.build_transform`, which works on one Pillow
image at a time, but other draws. The result for an image depends on its own seed only, not on the
batch. Draws are made on the host: no synchronisation with the device.

Legend: B images, C channels, H x W their size, S x T that of the network's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kw.config.data_schema import DataConfig
from kw.data.resample import axis_weights, resample
from kw.data.seeding import uniform_draws

_ATTEMPTS = 10  # at a rectangle that fits, as in torchvision and timm


class Choices(NamedTuple):
    """The augmentation of each image of a batch; NumPy arrays, a value per image."""

    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray
    mirror: np.ndarray
    """bool"""


class BatchAugment:
    """Augment batches of images that have one size, as checked data settings say."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    def choose(self, seeds: Sequence[int], height: int, width: int) -> Choices:
        """Draw the augmentation of images H x W, from one 64-bit seed per image."""
        draws = uniform_draws(seeds, 2 * _ATTEMPTS + 3)
        areas, ratios = draws[:, :_ATTEMPTS], draws[:, _ATTEMPTS : 2 * _ATTEMPTS]
        y, x, mirror = draws[:, 2 * _ATTEMPTS :].T
        tall, wide, centred = self._extents(areas, ratios, height, width)
        return Choices(
            top=_place(y, height, tall, centred),
            left=_place(x, width, wide, centred),
            height=tall,
            width=wide,
            mirror=mirror < self.config.horizontal_flip,
        )

    def _extents(
        self, areas: np.ndarray, ratios: np.ndarray, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Height and width of the rectangles from draws [B, attempts]; where none of them fits the
        image, the largest rectangle of an allowed shape, and True."""
        low, high = self.config.crop_scale
        area = (low + (high - low) * areas) * (height * width)
        least, most = self.config.crop_ratio
        ratio = np.exp(np.log(least) + (np.log(most) - np.log(least)) * ratios)
        wide = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        tall = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (wide >= 1) & (wide <= width) & (tall >= 1) & (tall <= height)
        first = fits.argmax(-1)[:, None]
        wide, tall = (np.take_along_axis(each, first, -1)[:, 0] for each in (wide, tall))
        shape = min(max(width / height, least), most)
        none = ~fits.any(-1)
        wide[none] = max(1, min(width, round(height * shape)))
        tall[none] = max(1, min(height, round(width / shape)))
        return tall, wide, none

    def __call__(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """uint8 [B, C, H, W] on any device, and a 64-bit seed per image -> uint8 [B, C, S, T]."""
        return self.apply(images, self.choose(seeds, *images.shape[-2:]))

    def apply(self, images: Tensor, choices: Choices) -> Tensor:
        """Apply drawn augmentations; arguments as for calling."""
        height, width = images.shape[-2:]
        (tall, wide), how = self.config.shape, self.config.interpolation
        # One copy to the device for all four.
        place = torch.from_numpy(
            np.stack([choices.top, choices.height, choices.left, choices.width])
        ).to(images.device, non_blocking=True)
        rows = axis_weights(place[0], place[1], height, tall, how)
        columns = axis_weights(place[2], place[3], width, wide, how)
        mirror = torch.from_numpy(choices.mirror).to(images.device, non_blocking=True)
        columns = torch.where(mirror[:, None, None], columns.flip(1), columns)
        cut = resample(images, rows, columns).round_().clamp_(0, 255)
        return cut.to(torch.uint8, memory_format=torch.contiguous_format)


def _place(draws: np.ndarray, room: int, extent: np.ndarray, centred: np.ndarray) -> np.ndarray:
    """First position of a rectangle: one of ``room - extent + 1``, or the middle one."""
    free = room - extent
    return np.where(centred, free // 2, (draws * (free + 1)).astype(np.int64))
