"""RoIAlign (He et al., 2017): averages of samples between pixels in a region's bins.

torchvision's operator is the same function.

Legend: R regions, B images, C channels, H x W a map, P x Q bins, S samples of a bin along one axis.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchvision  # noqa: F401  (registers torch.ops.torchvision)
from torch import Tensor

from .widening import gradients, widen

__all__ = ["roi_align_backward", "roi_align_forward"]

_MAXIMUM = 0


def roi_align_forward(*tensors: Tensor, pool_mode: int, **settings: Any) -> None:
    """Fill ``output`` ``[R, C, P, Q]`` from maps ``[B, C, H, W]``.

    Args:
        tensors: the maps; regions ``[R, 5]``: index of the image, x1, y1, x2, y2 in pixels of that
            image; ``output``; two that are not used.
        pool_mode: 1 for averages; 0, for maxima, is not supported.
        settings: of :func:`_align`.

    Raises:
        NotImplementedError: maxima are asked for.
    """
    if pool_mode == _MAXIMUM:
        raise NotImplementedError(
            "mmcv's operator 'roi_align' with pool_mode='max' is not among those that "
            "kw.detection.ops provides: set pool_mode='avg', or install an mmcv that was compiled "
            "for this version of PyTorch"
        )
    maps, regions, output, _, _ = tensors
    output.copy_(_align(settings)(*widen(maps, regions)))


def roi_align_backward(*tensors: Tensor, pool_mode: int, **settings: Any) -> None:
    """Fill ``grad_input`` ``[B, C, H, W]``, the last tensor; the first is the output's gradient,
    the others are those of the forward pass."""
    grad_output, regions, _, _, grad_input = tensors
    grad, boxes, maps = widen(grad_output, regions, grad_input)
    if grad.is_cuda and torch.are_deterministic_algorithms_enabled():
        # On GPUs torchvision adds in no fixed order, and then refuses to compute.
        grad, boxes, maps = grad.cpu(), boxes.cpu(), maps.cpu()
    # Linear in the maps, whose values do not matter here.
    align = partial(_align(settings), boxes=boxes)
    grad_input.copy_(gradients(align, [maps], grad)[0])


def _align(settings: dict[str, Any]) -> Callable[..., Tensor]:
    """By ``aligned_height, aligned_width``: P and Q; ``spatial_scale``: pixels of the map per pixel
    of the image; ``sampling_ratio``: S, 0 for the number of pixels in a bin, rounded up;
    ``aligned``: whether the values of pixels are at their centres, which is correct; otherwise they
    are at their corners, and regions have at least one pixel."""
    bins = settings["aligned_height"], settings["aligned_width"]
    rest = settings["spatial_scale"], *bins, settings["sampling_ratio"], settings["aligned"]
    return lambda maps, boxes: torch.ops.torchvision.roi_align(maps, boxes, *rest)
