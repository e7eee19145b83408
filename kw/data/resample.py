"""Cutting a rectangle out of every image of a batch and resizing it, as two matrix products.

Resampling is linear and separable: an output row is a weighted sum of input rows, and the weights
depend on the rectangle only. With a matrix of weights per image, every image of a batch may have
its own rectangle. The weights are Pillow's, which torchvision's antialiased resizing shares.

Legend: B images, H x W their size, S side of the output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: Tensor) -> Tensor:
    x, a = x.abs(), -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def _lanczos(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0)


_FILTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "bilinear": _triangle,
    "bicubic": _cubic,
    "lanczos": _lanczos,
}


def axis_weights(
    start: Tensor, extent: Tensor, source: int, target: int, interpolation: str
) -> Tensor:
    """The weights of every input position for every output position, along one axis.

    Args:
        start: first input position of each image's rectangle, integers [B].
        extent: positions of the rectangle, integers [B].
        source: positions of the input.
        target: positions of the output.
        interpolation: ``bilinear``, ``bicubic``, ``lanczos`` or ``nearest``.

    Returns:
        float32 [B, target, source]; each row sums to 1 and is zero outside the rectangle.
    """
    inside = torch.arange(source, device=start.device) - start[:, None]  # [B, source]
    scale = (extent / target)[:, None]  # input positions per output position, [B, 1]
    centre = (torch.arange(target, device=start.device) + 0.5) * scale  # [B, target]
    if interpolation == "nearest":
        return (inside[:, None] == centre.floor()[..., None]).float()
    distance = inside[:, None] + 0.5 - centre[..., None]  # [B, target, source]
    # When shrinking, the filter is widened so that it averages instead of skipping positions.
    weights = _FILTERS[interpolation](distance / scale.clamp(min=1)[..., None])
    valid = (inside >= 0) & (inside < extent[:, None])
    weights = weights * valid[:, None]
    return weights / weights.sum(-1, keepdim=True)


def resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply the weights of both axes, rows [B, S, H] and columns [B, S, W], to images [B, 3, H, W]
    of any type: float32 [B, 3, S, S]. A filter with negative weights may leave their range."""
    channels, height = images.shape[1:3]
    wide = images.flatten(1, 2).float() @ columns.transpose(1, 2)  # [B, 3 H, S]
    wide = wide.unflatten(1, (channels, height)).transpose(1, 2).flatten(2)  # [B, H, 3 S]
    return (rows @ wide).unflatten(2, (channels, -1)).transpose(1, 2)  # [B, 3, S, S]
