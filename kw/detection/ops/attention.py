"""Multi-scale deformable attention (Zhu et al., 2021), for Deformable DETR and DINO on GPUs.

mmcv has it for CPUs, by :func:`torch.nn.functional.grid_sample`. The backward pass samples again,
because the samples would need most of the memory.

Legend: B images, K positions of all maps, M heads, D channels of a head, Q queries, L levels, P
points.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .widening import gradients, widen

__all__ = ["ms_deform_attn_backward", "ms_deform_attn_forward"]


def ms_deform_attn_forward(*tensors: Tensor, im2col_step: int) -> Tensor:
    """The sum of sampled values over the points in all maps, for each query and head.

    Args:
        tensors: ``value`` ``[B, K, M, D]``, the maps one after another; height and width of each
            map, int64 ``[L, 2]``; one that is not used; locations ``[B, Q, M, L, P, 2]``, x and y
            as fractions of a map, 0 outside of it; weights ``[B, Q, M, L, P]``.
        im2col_step: not used.

    Returns:
        ``[B, Q, M * D]``, in the type of ``value``.
    """
    value, spatial_shapes, _, locations, weights = tensors
    attended = _attend(spatial_shapes)(*widen(value, locations, weights))
    return attended.to(value.dtype)


def ms_deform_attn_backward(*tensors: Tensor, im2col_step: int) -> None:
    """Fill the last three tensors with the derivatives by value, locations and weights."""
    value, spatial_shapes, _, locations, weights, grad_output, *filled = tensors
    found = gradients(_attend(spatial_shapes), (value, locations, weights), grad_output)
    for into, gradient in zip(filled, found, strict=True):
        into.copy_(gradient)


def _attend(spatial_shapes: Tensor) -> Callable[..., Tensor]:
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    sizes = spatial_shapes.tolist()  # synchronises with the device once
    return lambda value, *rest: multi_scale_deformable_attn_pytorch(value, sizes, *rest)
