"""Deformable convolution (Dai et al., 2017) and its modulated second version (Zhu et al., 2019).

torchvision's operator is the same function. Offsets are ``[B, G * K * 2, ..]``: group by group, and
for each of the K kernel positions the vertical before the horizontal offset. Masks are ``[B, G * K,
..]``. Samples more than a pixel outside of the image are zero.

Legend: B images, G deformable groups, K = kH * kW.
"""

from __future__ import annotations

import torch
import torchvision  # noqa: F401  (registers torch.ops.torchvision)
from torch import Tensor

from ...torch_private import torchvision_backward
from .widening import widen

__all__ = [
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "deform_conv_forward",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
]


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    **settings: int,
) -> None:
    """Fill ``output``; ``columns`` and ``ones`` are scratch space that is not used.

    Args:
        input: ``[B, C, H, W]``.
        weight: ``[C_out, C / group, kH, kW]``.
        offset: ``[B, deformable_group * K * 2, H_out, W_out]``.
        output: ``[B, C_out, H_out, W_out]``.
        settings: ``dW, dH`` (strides), ``padW, padH, dilationW, dilationH, group,
            deformable_group``; kernel size and ``im2col_step`` are not used.
    """
    output.copy_(_forward(input, weight, offset, None, None, _geometry_v1(settings)))


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
    """Fill ``gradInput`` and ``gradOffset``, and store the gradient of the weight in ``columns``.

    torchvision computes all three at once, and mmcv calls :func:`deform_conv_backward_parameters`
    next, with the same scratch space.
    """
    gradients = _backward(gradOutput, input, weight, offset, None, None, _geometry_v1(settings))
    gradInput.copy_(gradients[0])
    gradOffset.copy_(gradients[2])
    columns.resize_(gradients[1].shape).copy_(gradients[1])


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
    """Add the gradient of the weight, times ``scale``, to ``gradWeight``.

    It is in ``columns`` if :func:`deform_conv_backward_input` was called in this backward pass.
    ``columns`` is empty if neither input nor offset needs a gradient.
    """
    if columns.numel():
        gradient = columns
    else:
        # The gradient does not depend on the weight.
        gradient = _backward(
            gradOutput, input, gradWeight, offset, None, None, _geometry_v1(settings)
        )[1]
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
            deformable_group, with_bias``; kernel size is not used.
    """
    present = bias if settings["with_bias"] else None
    output.copy_(_forward(input, weight, offset, mask, present, _geometry_v2(settings)))


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
    present = bias if settings["with_bias"] else None
    gradients = _backward(grad_output, input, weight, offset, mask, present, _geometry_v2(settings))
    filled = [grad_input, grad_weight, grad_offset, grad_mask]
    if present is not None:
        filled.append(grad_bias)
    for into, gradient in zip(filled, gradients, strict=False):
        into.copy_(gradient)


def _geometry_v1(settings: dict[str, int]) -> tuple[int, ...]:
    names = ("dH", "dW", "padH", "padW", "dilationH", "dilationW", "group", "deformable_group")
    return tuple(settings[name] for name in names)


def _geometry_v2(settings: dict[str, int]) -> tuple[int, ...]:
    names = ("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w")
    return tuple(settings[name] for name in (*names, "group", "deformable_group"))


def _forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: tuple[int, ...],
) -> Tensor:
    tensors = _complete(input, weight, offset, mask, bias)
    return torch.ops.torchvision.deform_conv2d(*tensors, *geometry, mask is not None)


def _backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: tuple[int, ...],
) -> tuple[Tensor, ...]:
    """Gradients of input, weight, offset, mask and bias; ignore those of absent tensors."""
    tensors = _complete(input, weight, offset, mask, bias)
    (wide,) = widen(grad)
    gradients: tuple[Tensor, ...] = torchvision_backward("deform_conv2d")(
        wide.contiguous(), *tensors, *geometry, mask is not None
    )
    return gradients


def _complete(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None
) -> list[Tensor]:
    """All five in one type; torchvision needs tensors also for an absent mask and bias."""
    mask = input.new_zeros(len(input), 1) if mask is None else mask
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return [t.contiguous() for t in widen(input, weight, offset, mask, bias)]
