"""Deformable convolution (Dai et al., 2017) and its modulated second version (Zhu et al., 2019).

torchvision's operator is the same function, and infers the groups. Offsets are ``[B, G * K * 2,
..]``: group by group, and for each of the K kernel positions the vertical before the horizontal
offset. Masks are ``[B, G * K, ..]``. Samples more than a pixel outside of the image are zero.

Legend: B images, G deformable groups, K = kH * kW.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torchvision.ops import deform_conv2d

from .widening import gradients, widen

__all__ = [
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "deform_conv_forward",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
]


# Of strides, padding and dilations, in the two versions.
_FIRST = ("dH", "dW", "padH", "padW", "dilationH", "dilationW")
_SECOND = ("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w")


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    **settings: int,
) -> None:
    """Fill ``output`` ``[B, C_out, H_out, W_out]``; ``columns`` and ``ones`` are scratch space that
    is not used.

    Args:
        input: ``[B, C, H, W]``.
        weight: ``[C_out, C / group, kH, kW]``.
        offset: ``[B, deformable_group * K * 2, H_out, W_out]``.
        settings: ``dW, dH`` (strides), ``padW, padH, dilationW, dilationH, group,
            deformable_group``, kernel size and ``im2col_step``; only the first six are used.
    """
    output.copy_(_convolution(_FIRST, settings)(*widen(input, weight, offset)))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **settings: int,
) -> None:
    """Fill ``gradInput`` and ``gradOffset``, and store the gradient of the weight in ``columns``:
    mmcv calls :func:`deform_conv_backward_parameters` next, with the same scratch space."""
    convolve = _convolution(_FIRST, settings)
    by_input, by_weight, by_offset = gradients(convolve, (input, weight, offset), gradOutput)
    gradInput.copy_(by_input)
    gradOffset.copy_(by_offset)
    columns.resize_(by_weight.shape).copy_(by_weight)


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    scale: float = 1.0,
    **settings: int,
) -> None:
    """Add the gradient of the weight, times ``scale``, to ``gradWeight``. ``columns`` has it, or is
    empty if neither input nor offset needs a gradient."""
    if columns.numel():
        gradient = columns
    else:
        # The gradient does not depend on the weight.
        convolve = _convolution(_FIRST, settings)
        gradient = gradients(convolve, (input, gradWeight, offset), gradOutput)[1]
    gradWeight.add_(gradient, alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    **settings: int,
) -> None:
    """Fill ``output``; ``ones`` and ``columns`` are scratch space that is not used.

    Args:
        input, weight, offset, output: as in :func:`deform_conv_forward`.
        bias: ``[C_out]``; empty, and not used, without ``with_bias``.
        mask: ``[B, deformable_group * K, H_out, W_out]``, multiplies the samples.
        settings: ``stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group,
            deformable_group, with_bias`` and kernel size; groups and size are not used.
    """
    inputs = [input, weight, offset, mask, *([bias] if settings["with_bias"] else [])]
    output.copy_(_convolution(_SECOND, settings)(*widen(*inputs)))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    **settings: int,
) -> None:
    """Fill the five gradients; that of the bias only ``with_bias``."""
    inputs = [input, weight, offset, mask]
    filled = [grad_input, grad_weight, grad_offset, grad_mask]
    if settings["with_bias"]:
        inputs, filled = [*inputs, bias], [*filled, grad_bias]
    found = gradients(_convolution(_SECOND, settings), inputs, grad_output)
    for into, gradient in zip(filled, found, strict=True):
        into.copy_(gradient)


def _convolution(names: tuple[str, ...], settings: dict[str, int]) -> Callable[..., Tensor]:
    sides = [settings[name] for name in names]
    geometry = {
        "stride": (sides[0], sides[1]),
        "padding": (sides[2], sides[3]),
        "dilation": (sides[4], sides[5]),
    }

    def convolve(
        input: Tensor, weight: Tensor, offset: Tensor, mask: Any = None, bias: Any = None
    ) -> Tensor:
        return deform_conv2d(input, offset, weight, bias, mask=mask, **geometry)

    return convolve
