"""Pillow's image operations for a batch of bytes, each image with parameters of its own.

As timm's policies use them (:mod:`kw.data.policies`). Each is computed as Pillow does it, whole
numbers where Pillow has whole numbers; nothing is read from the device. Equalize is torchvision's;
its other functions take one strength for all images, or differ from Pillow.

Legend: images uint8 [G, 3, H, W], parameters [G, ...] on the same device; results are as images.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

# Pillow's Gaussian: so many box filters in a row, with weights of so many bits.
_BOXES, _BITS = 3, 24
_ONE = 1 << _BITS


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Replace each level by the table's; tables uint8 [G, 256], or [G, 3, 256] for each channel."""
    tables = tables.view(len(images), -1, 256).expand(-1, 3, -1)
    return tables.gather(2, images.flatten(2).long()).view_as(images)


def auto_contrast(images: Tensor) -> Tensor:
    """``ImageOps.autocontrast``: each channel stretched to 0 .. 255."""
    low, high = (each[..., None].double() for each in images.flatten(2).aminmax(dim=2))
    levels = torch.arange(256, dtype=torch.float64, device=images.device)
    # [G, 3, 1]; infinite where there is one level. A Python number would be multiplied by 1 / x.
    scale = levels[-1] / (high - low)
    tables = torch.where(high > low, levels * scale + -low * scale, levels)
    return look_up(images, tables.clamp_(0, 255).to(torch.uint8))


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """``ImageEnhance.Contrast``: between the mean grey and the image; factors [G, 1]."""
    sums = _grey(images).sum((1, 2, 3), dtype=torch.int64)
    count = images.shape[2] * images.shape[3]
    mean = (2 * sums + count) // (2 * count)  # rounded
    return _blend(mean.view(-1, 1, 1, 1), images, factors)


def adjust_colour(images: Tensor, factors: Tensor) -> Tensor:
    """``ImageEnhance.Color``: between the image in grey and the image; factors [G, 1]."""
    return _blend(_grey(images), images, factors)


def adjust_sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """``ImageEnhance.Sharpness``: between the smoothed image and the image; factors [G, 1].

    Pixels at the edge are not smoothed.
    """
    wide = images.int()
    rows = wide[..., :-2, :] + wide[..., 1:-1, :] + wide[..., 2:, :]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[..., 1:-1, 1:-1]
    wide[..., 1:-1, 1:-1] = (2 * sums + 13) // 26  # sums / 13, rounded
    return _blend(wide, images, factors)


def blur(images: Tensor, weights: Tensor) -> Tensor:
    """``ImageFilter.GaussianBlur``: box filters along each row, then along each column.

    Weights [G, 3] of a pixel, its neighbours and theirs: :func:`box_weights`.
    """
    near, beside, far = weights.view(-1, 3, 1, 1, 1).unbind(1)
    for axis in (3, 2):
        size = images.shape[axis]
        # Beyond the edge lies the edge's pixel.
        reach = torch.arange(-2, size + 2, device=images.device).clamp_(0, size - 1)
        for _ in range(_BOXES):
            padded = images.index_select(axis, reach).long()
            one, two, three, four, five = (padded.narrow(axis, i, size) for i in range(5))
            sums = near * three + beside * (two + four) + far * (one + five)
            images = ((sums + (_ONE >> 1)) >> _BITS).to(torch.uint8)
    return images


def box_weights(radius: float) -> tuple[int, int, int]:
    """Weights of a box filter in units of 2^-24, for a Gaussian's standard deviation of 0 to 2.

    Gwosdek et al.: Theoretical Foundations of Gaussian Convolution by Extended Box Filtering, SSVM
    2011, equations 7, 11 and 14.
    """
    variance = radius * radius / _BOXES
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part /= 6 * (variance - (whole + 1) ** 2)
    inside = int(np.float32(_ONE) / np.float32(2 * (whole + part) + 1))  # as Pillow, in float32
    edge = (_ONE - (2 * whole + 1) * inside) // 2
    return (inside, edge, 0) if whole == 0 else (inside, inside, edge)


def affine(images: Tensor, matrices: Tensor, cubic: bool) -> Tensor:
    """``Image.transform`` with ``AFFINE``: each pixel from the place that the matrix gives.

    Args:
        images: see above.
        matrices: float64 [G, 9]: Pillow's (a, b, c, d, e, f), and the colour of pixels whose place
            lies outside of the image.
        cubic: Pillow's ``BICUBIC``, else ``BILINEAR``.
    """
    height, width = images.shape[2:]
    device, kind = images.device, torch.float64
    x = torch.arange(width, dtype=kind, device=device) + 0.5
    y = (torch.arange(height, dtype=kind, device=device) + 0.5)[:, None]
    a, b, c, d, e, f, *fill = matrices[..., None, None].unbind(1)  # [G, 1, 1]
    across, down = a * x + b * y + c, d * x + e * y + f  # [G, H, W]
    inside = (across >= 0) & (across < width) & (down >= 0) & (down < height)
    columns, weights_x = _taps(across, width, cubic)
    rows, weights_y = _taps(down, height, cubic)
    pixels = images.flatten(2).float()
    result = torch.zeros_like(pixels)
    for row, weight_y in zip(rows, weights_y, strict=True):
        for column, weight_x in zip(columns, weights_x, strict=True):
            places = (row * width + column).flatten(1)[:, None]  # [G, 1, H * W]
            weights = (weight_y * weight_x).flatten(1)[:, None]
            result.addcmul_(pixels.gather(2, places.expand_as(pixels)), weights)
    # Pillow cuts fractions off: whole numbers must not come out a little less.
    result = result.add_(1e-3).clamp_(0, 255).view_as(images)
    outside = torch.stack(fill, 1).float()  # [G, 3, 1, 1]
    return torch.where(inside[:, None], result, outside).to(torch.uint8)


def rotation(degrees: float, width: int, height: int) -> tuple[float, ...]:
    """Pillow's matrix that rotates counterclockwise about the centre."""
    angle = -math.radians(degrees % 360)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y


def _taps(places: Tensor, size: int, cubic: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The pixels that are weighed along one axis, and their weights; both [G, H, W]."""
    places = places - 0.5
    first = places.floor()
    t = (places - first).float()
    first = first.long()
    if not cubic:
        return [(first + i).clamp_(0, size - 1) for i in range(2)], [1 - t, t]
    squared = t * t
    cubed = squared * t
    # Keys's kernel with a = -1.
    weights = [
        2 * squared - t - cubed,
        1 - 2 * squared + cubed,
        t + squared - cubed,
        cubed - squared,
    ]
    return [(first + i).clamp_(0, size - 1) for i in range(-1, 3)], weights


def _grey(images: Tensor) -> Tensor:
    """Pillow's conversion to ``L``; int32 [G, 1, H, W]."""
    red, green, blue = images.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _blend(other: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """``Image.blend``: cuts fractions off."""
    start = other.float()
    factors = factors.float().view(-1, 1, 1, 1)
    return (start + factors * (images.float() - start)).clamp_(0, 255).to(torch.uint8)
