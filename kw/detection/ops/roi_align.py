"""RoIAlign (He et al., 2017): averages, or maxima, of samples between pixels in a region's bins.

torchvision's operator computes averages. Its backward pass on GPUs adds in no fixed order, so it
raises an error if deterministic algorithms are required. For that case and for maxima, this file
has an implementation.

The averages are separable, because samples lie on a grid. An output is ``Y[r] @ map @ X[r].T``,
where row p of ``Y[r]`` has the mean weights of the map's lines in bin p; its derivative is two
matrix products.

Legend: R regions, B images, C channels, H x W a map, P x Q bins, S samples of a bin along one axis.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torchvision  # noqa: F401  (registers torch.ops.torchvision)
from torch import Tensor

from ...torch_private import torchvision_backward
from .widening import widen

__all__ = ["backward_in_order", "roi_align_backward", "roi_align_forward"]

_MAXIMUM = 0
_SCRATCH = 1 << 26  # values in memory in a step of the backward pass, about


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill ``output``, and for maxima the numbers of their samples.

    Args:
        input: ``[B, C, H, W]``.
        rois: ``[R, 5]``: index of the image, x1, y1, x2, y2 in pixels of that image.
        output: ``[R, C, P, Q]``.
        argmax_y, argmax_x: empty for averages; ``[R, C, P, Q]`` for maxima, which get the number
            of the sample along each axis, or -1 without samples. mmcv stores coordinates, which
            half precision would round.
        aligned_height, aligned_width: P and Q.
        spatial_scale: pixels of the map per pixel of the image.
        sampling_ratio: S; 0 for the number of pixels in a bin, rounded up.
        pool_mode: 0 for maxima, 1 for averages.
        aligned: whether the values of pixels are at their centres, which is correct; otherwise
            they are at their corners, and regions have at least one pixel.
    """
    x, boxes = widen(input, rois)
    if pool_mode != _MAXIMUM:
        bins = (aligned_height, aligned_width)
        output.copy_(
            torch.ops.torchvision.roi_align(x, boxes, spatial_scale, *bins, sampling_ratio, aligned)
        )
        return
    y_axis = _axis(boxes[:, 2::2], spatial_scale, aligned_height, sampling_ratio, aligned)
    x_axis = _axis(boxes[:, 1::2], spatial_scale, aligned_width, sampling_ratio, aligned)
    for r, image in enumerate(boxes[:, 0].long().tolist()):
        rows, columns = y_axis.weights(r, x.shape[2]), x_axis.weights(r, x.shape[3])
        s_y, s_x = rows.shape[1], columns.shape[1]
        if not s_y * s_x:  # a region without extent has no samples
            output[r], argmax_y[r], argmax_x[r] = 0, -1, -1
            continue
        samples = torch.einsum("psh,chw,qtw->cpqst", rows, x[image], columns)
        best = samples.flatten(3).max(3)
        output[r] = best.values
        argmax_y[r] = best.indices.div(s_x, rounding_mode="floor")
        argmax_x[r] = best.indices % s_x


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill ``grad_input`` ``[B, C, H, W]``; the other arguments are those of the forward pass."""
    grad, boxes = widen(grad_output, rois)
    shape = tuple(grad_input.shape)
    y_axis = _axis(boxes[:, 2::2], spatial_scale, aligned_height, sampling_ratio, aligned)
    x_axis = _axis(boxes[:, 1::2], spatial_scale, aligned_width, sampling_ratio, aligned)
    images = boxes[:, 0].long()
    if pool_mode == _MAXIMUM:
        gradient = _backward_of_maxima(grad, images, y_axis, x_axis, argmax_y, argmax_x, shape)
    elif grad.is_cuda and torch.are_deterministic_algorithms_enabled():
        gradient = backward_in_order(grad, images, y_axis, x_axis, shape)
    else:
        bins = (aligned_height, aligned_width)
        gradient = torchvision_backward("roi_align")(
            grad, boxes, spatial_scale, *bins, *shape, sampling_ratio, aligned
        )
    grad_input.copy_(gradient)


class _Axis(NamedTuple):
    """Positions of the samples of all regions along an axis, in pixels of the map; ``[R]`` each."""

    start: Tensor
    bin: Tensor  # extent
    samples: Tensor  # of a bin, int64
    bins: int

    def positions(self, r: int) -> Tensor:
        """The positions in region r, ``[bins, S]``."""
        number = torch.arange(self.bins * int(self.samples[r]), device=self.start.device)
        number = number.view(self.bins, -1).to(self.start) + 0.5
        return self.start[r] + number * (self.bin[r] / self.samples[r])

    def weights(self, r: int, length: int) -> Tensor:
        """The weight of each pixel in each sample of region r, ``[bins, S, length]``."""
        position = self.positions(r)
        counts = (position >= -1) & (position <= length)
        pixels = torch.arange(length, device=position.device)
        distance = (position.clamp(0, length - 1)[..., None] - pixels).abs()
        return (1 - distance).clamp(min=0) * counts[..., None]


def _axis(ends: Tensor, scale: float, bins: int, ratio: int, aligned: bool) -> _Axis:
    ends = ends * scale - (0.5 if aligned else 0)
    extent = ends[:, 1] - ends[:, 0]
    if not aligned:
        extent = extent.clamp(min=1)
    adaptive = (extent / bins).ceil().clamp(min=0).long()
    samples = torch.full_like(adaptive, ratio) if ratio > 0 else adaptive
    return _Axis(ends[:, 0], extent / bins, samples, bins)


def backward_in_order(
    grad: Tensor, images: Tensor, y_axis: _Axis, x_axis: _Axis, shape: tuple[int, ...]
) -> Tensor:
    """The derivative of averages by matrix products, which add in a fixed order.

    Args:
        grad: ``[R, C, P, Q]``.
        images: int64 ``[R]``.
        y_axis, x_axis: the samples.
        shape: ``B, C, H, W``.

    Returns:
        ``[B, C, H, W]``.
    """
    _, channels, height, width = shape
    result = grad.new_zeros(shape)
    limit = max(_SCRATCH // max(channels * width * y_axis.bins, 1), 1)
    for image in range(shape[0]):
        for chunk in (images == image).nonzero()[:, 0].split(limit):
            rows = torch.stack([_means(y_axis, r, height) for r in chunk.tolist()])
            columns = torch.stack([_means(x_axis, r, width) for r in chunk.tolist()])
            spread = torch.einsum("rcpq,rqw->rpcw", grad[chunk], columns)
            spread = rows.flatten(0, 1).T @ spread.flatten(2).flatten(0, 1)
            result[image] += spread.view(height, channels, width).transpose(0, 1)
    return result


def _means(axis: _Axis, r: int, length: int) -> Tensor:
    weights = axis.weights(r, length)
    return weights.sum(1) / max(weights.shape[1], 1)


def _backward_of_maxima(
    grad: Tensor,
    images: Tensor,
    y_axis: _Axis,
    x_axis: _Axis,
    argmax_y: Tensor,
    argmax_x: Tensor,
    shape: tuple[int, ...],
) -> Tensor:
    """Add each gradient to the four pixels around the sample of the maximum."""
    _, channels, height, width = shape
    y = _corners(y_axis, torch.arange(y_axis.bins, device=grad.device)[:, None], argmax_y, height)
    x = _corners(x_axis, torch.arange(x_axis.bins, device=grad.device), argmax_x, width)
    planes = images[:, None] * channels + torch.arange(channels, device=grad.device)
    result = grad.new_zeros(shape).view(-1)
    for row, row_weight in y:
        for column, column_weight in x:
            pixels = (planes[:, :, None, None] * height + row) * width + column
            result.index_add_(0, pixels.view(-1), (grad * row_weight * column_weight).view(-1))
    return result.view(shape)


def _corners(
    axis: _Axis, bins: Tensor, numbers: Tensor, length: int
) -> list[tuple[Tensor, Tensor]]:
    """The two pixels beside samples, and their weights; ``[R, C, P, Q]`` each."""
    start, extent, samples = (t.view(-1, 1, 1, 1) for t in axis[:3])
    position = start + (bins + (numbers + 0.5) / samples.clamp(min=1)) * extent
    counts = (numbers >= 0) & (position >= -1) & (position <= length)
    position = position.clamp(0, length - 1)
    low = position.floor()
    upper = position - low
    low = low.long()
    high = (low + 1).clamp(max=length - 1)
    return [(low, (1 - upper) * counts), (high, upper * counts)]
