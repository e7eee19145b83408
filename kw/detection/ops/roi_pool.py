"""RoIPool (Girshick, 2015) as mmcv defines it: maxima over the pixels that a bin touches.

torchvision's operator of this name differs: it first rounds regions to whole pixels, and gives
regions without extent a pixel. Here the corners are pixels of the region, which spans
``x1 * scale`` to ``(x2 + 1) * scale``; the output of a region without extent is zero.

Legend: R regions, C channels, H x W a map, P x Q bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .widening import widen

__all__ = ["roi_pool_backward", "roi_pool_forward"]

_SCRATCH = 1 << 24  # values that a step gathers, about


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Fill ``output`` and ``argmax``.

    Args:
        input: ``[B, C, H, W]``.
        rois: ``[R, 5]``: index of the image, x1, y1, x2, y2 in pixels of that image.
        output: ``[R, C, P, Q]``; 0 for bins outside of the map.
        argmax: int32 ``[R, C, P, Q]``, the index ``h * W + w`` of the maximum, the first of equal
            ones; -1 for bins outside of the map.
        pooled_height, pooled_width: P and Q.
        spatial_scale: pixels of the map per pixel of the image.
    """
    output.zero_()
    argmax.fill_(-1)
    (boxes,) = widen(rois)
    top, bottom = _bins(boxes[:, 2::2], spatial_scale, pooled_height, input.shape[2])
    left, right = _bins(boxes[:, 1::2], spatial_scale, pooled_width, input.shape[3])
    if not output.numel():
        return
    pixels_last = input.permute(0, 2, 3, 1)
    heights, widths = (bottom - top).amax(1), (right - left).amax(1)
    # Regions of similar size share a step, which gathers for each as much as for the largest.
    order = (heights * widths).argsort()
    for chunk in _chunks(order, (heights * widths).tolist(), output[0].numel()):
        rows = top[chunk, :, None] + torch.arange(int(heights[chunk].max()), device=top.device)
        columns = left[chunk, :, None] + torch.arange(int(widths[chunk].max()), device=top.device)
        touched = (rows < bottom[chunk, :, None])[:, :, None, :, None] & (
            columns < right[chunk, :, None]
        )[:, None, :, None, :]  # [r, P, Q, h, w]
        rows, columns = rows.clamp(max=input.shape[2] - 1), columns.clamp(max=input.shape[3] - 1)
        rows, columns = rows[:, :, None, :, None], columns[:, None, :, None, :]
        images = boxes[chunk, 0].long().view(-1, 1, 1, 1, 1)
        values = pixels_last[images, rows, columns]  # [r, P, Q, h, w, C]
        values = values.masked_fill(~touched[..., None], float("-inf")).flatten(3, 4)
        if not values.shape[3]:
            continue
        best = values.max(3)
        places = (rows * input.shape[3] + columns).flatten(3, 4)
        places = places.gather(3, best.indices.flatten(3)).masked_fill(
            ~touched.flatten(3).any(3)[..., None], -1
        )
        found = best.values.masked_fill(places < 0, 0)
        output[chunk] = found.permute(0, 3, 1, 2)
        argmax[chunk] = places.permute(0, 3, 1, 2).to(argmax.dtype)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Fill ``grad_input`` ``[B, C, H, W]``: gradients are added to the pixels of the maxima."""
    (grad,) = widen(grad_output)
    images, channels = rois[:, 0].long(), grad_input.shape[1]
    planes = images[:, None] * channels + torch.arange(channels, device=grad.device)
    pixels = planes[:, :, None, None] * grad_input[0, 0].numel() + argmax.clamp(min=0)
    result = grad.new_zeros(grad_input.numel())
    result.index_add_(0, pixels.flatten(), (grad * (argmax >= 0)).flatten())
    grad_input.copy_(result.view(grad_input.shape))


def _bins(ends: Tensor, scale: float, bins: int, length: int) -> tuple[Tensor, Tensor]:
    """First pixel of each bin, and the one after its last; int64 ``[R, bins]``, within the map."""
    start, end = ends[:, :1] * scale, (ends[:, 1:] + 1) * scale
    edges = torch.arange(bins, device=ends.device)
    extent = (end - start) / bins
    low = (start + edges * extent).floor().clamp(0, length).long()
    high = (start + (edges + 1) * extent).ceil().clamp(0, length).long()
    return low, torch.where(extent > 0, high, low)


def _chunks(order: Tensor, areas: list[int], outputs: int) -> list[Tensor]:
    """Cut regions, ordered by the area of their bins, into steps of at most ``_SCRATCH`` values."""
    chunks: list[list[int]] = [[]]
    for r in order.tolist():
        if chunks[-1] and (len(chunks[-1]) + 1) * areas[r] * outputs > _SCRATCH:
            chunks.append([])
        chunks[-1].append(r)
    return [torch.tensor(chunk, device=order.device) for chunk in chunks]
