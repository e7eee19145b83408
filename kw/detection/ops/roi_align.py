"""RoIAlign (He et al., 2017): averages of samples between pixels in a region's bins.

torchvision's operator is the same function.

Legend: R regions, B images, C channels, H x W a map, P x Q bins, S samples of a bin along one axis.
"""

from __future__ import annotations

import torch
import torchvision  # noqa: F401  (registers torch.ops.torchvision)
from torch import Tensor

from .widening import gradients, widen

__all__ = ["roi_align_backward", "roi_align_forward"]

_MAXIMUM = 0


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
    """Fill ``output`` ``[R, C, P, Q]`` from maps ``[B, C, H, W]``.

    Args:
        rois: ``[R, 5]``: index of the image, x1, y1, x2, y2 in pixels of that image.
        aligned_height, aligned_width: P and Q.
        spatial_scale: pixels of the map per pixel of the image.
        sampling_ratio: S; 0 for the number of pixels in a bin, rounded up.
        pool_mode: 1 for averages; 0, for maxima, is not supported.
        aligned: whether the values of pixels are at their centres, which is correct; otherwise
            they are at their corners, and regions have at least one pixel.

    Raises:
        NotImplementedError: maxima are asked for.
    """
    if pool_mode == _MAXIMUM:
        raise NotImplementedError(
            "mmcv's operator 'roi_align' with pool_mode='max' is not among those that "
            "kw.detection.ops provides: set pool_mode='avg', or install an mmcv that was compiled "
            "for this version of PyTorch"
        )
    x, boxes = widen(input, rois)
    bins = (aligned_height, aligned_width)
    output.copy_(
        torch.ops.torchvision.roi_align(x, boxes, spatial_scale, *bins, sampling_ratio, aligned)
    )


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
    grad, boxes, maps = widen(grad_output, rois, grad_input)
    if grad.is_cuda and torch.are_deterministic_algorithms_enabled():
        # On GPUs torchvision adds in no fixed order, and then refuses to compute.
        grad, boxes, maps = grad.cpu(), boxes.cpu(), maps.cpu()

    def align(x: Tensor) -> Tensor:  # linear in the maps, whose values do not matter here
        bins = (aligned_height, aligned_width)
        return torch.ops.torchvision.roi_align(
            x, boxes, spatial_scale, *bins, sampling_ratio, aligned
        )

    grad_input.copy_(gradients(align, [maps], grad)[0])
