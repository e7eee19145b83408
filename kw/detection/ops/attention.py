"""Multi-scale deformable attention (Zhu et al., 2021), for Deformable DETR and DINO on GPUs.

On CPUs mmcv has its own. The operator calls :func:`torch.nn.functional.grid_sample` on the map of
each level. The backward pass samples again, because the samples would need most of the memory.

Legend: B images, K positions of all maps, M heads, D channels of a head, Q queries, L levels, P
points.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .widening import gradients, widen

__all__ = ["ms_deform_attn_backward", "ms_deform_attn_forward"]


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int,
) -> Tensor:
    """The sum of sampled values over the points in all maps, for each query and head.

    Args:
        value: ``[B, K, M, D]``, the maps one after another.
        spatial_shapes: int64 ``[L, 2]``, height and width of each map.
        level_start_index: int64 ``[L]``, where each map starts in K.
        sampling_loc: ``[B, Q, M, L, P, 2]``, x and y as fractions of a map; 0 outside of it.
        attn_weight: ``[B, Q, M, L, P]``.
        im2col_step: not used.

    Returns:
        ``[B, Q, M * D]``, in the type of ``value``.
    """
    shapes = _shapes(spatial_shapes, level_start_index)
    wide_value, locations, weights = widen(value, sampling_loc, attn_weight)
    return _attend(wide_value, locations, weights, shapes).to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Fill the last three tensors with the derivatives by value, locations and weights."""
    shapes = _shapes(spatial_shapes, level_start_index)
    found = gradients(
        partial(_attend, shapes=shapes), (value, sampling_loc, attn_weight), grad_output
    )
    for filled, gradient in zip(
        (grad_value, grad_sampling_loc, grad_attn_weight), found, strict=True
    ):
        filled.copy_(gradient)


def _shapes(spatial_shapes: Tensor, starts: Tensor) -> list[tuple[int, int, int]]:
    """Height, width and start of each map; synchronises with the device once."""
    return [tuple(row) for row in torch.cat([spatial_shapes, starts[:, None]], 1).tolist()]


def _attend(
    value: Tensor, locations: Tensor, weights: Tensor, shapes: list[tuple[int, int, int]]
) -> Tensor:
    batch, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    total = value.new_zeros(batch * heads, channels, queries)
    for level, (height, width, start) in enumerate(shapes):
        maps = value[:, start : start + height * width].permute(0, 2, 3, 1)
        maps = maps.reshape(batch * heads, channels, height, width)
        grid = locations[:, :, :, level].transpose(1, 2) * 2 - 1
        grid = grid.reshape(batch * heads, queries, points, 2)
        sampled = F.grid_sample(maps, grid, padding_mode="zeros", align_corners=False)
        share = weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        total = total + (sampled * share).sum(-1)
    return total.view(batch, heads * channels, queries).transpose(1, 2).contiguous()
