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


# Of strides, padding and dilations, in the two versions; both also give groups and kernel size.
_FIRST = ("dH", "dW", "padH", "padW", "dilationH", "dilationW")
_SECOND = ("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w")


def deform_conv_forward(*tensors: Tensor, **settings: int) -> None:
    """Fill ``output`` ``[B, C_out, H_out, W_out]``.

    Args:
        tensors: ``input`` ``[B, C, H, W]``, ``weight`` ``[C_out, C / group, kH, kW]``, ``offset``
            ``[B, G * K * 2, H_out, W_out]``, ``output``, and two for scratch, not used.
        settings: of :data:`_FIRST`, and others that the shapes say.
    """
    input, weight, offset, output, _, _ = tensors
    output.copy_(_convolution(_FIRST, settings)(*widen(input, weight, offset)))


def deform_conv_backward_input(*tensors: Tensor, **settings: int) -> None:
    """Fill the gradients of input and offset, and store that of the weight in the scratch space:
    mmcv calls :func:`deform_conv_backward_parameters` next, with the same."""
    input, offset, grad, grad_input, grad_offset, weight, scratch = tensors
    found = gradients(_convolution(_FIRST, settings), (input, weight, offset), grad)
    grad_input.copy_(found[0])
    grad_offset.copy_(found[2])
    scratch.resize_(found[1].shape).copy_(found[1])


def deform_conv_backward_parameters(*tensors: Tensor, scale: float = 1.0, **settings: int) -> None:
    """Add the gradient of the weight, times ``scale``, to ``grad_weight``. The scratch space has
    it, or is empty if neither input nor offset needs a gradient."""
    input, offset, grad, grad_weight, scratch, _ = tensors
    if scratch.numel():
        gradient = scratch
    else:
        # The gradient does not depend on the weight.
        inputs = input, grad_weight, offset
        gradient = gradients(_convolution(_FIRST, settings), inputs, grad)[1]
    grad_weight.add_(gradient, alpha=scale)


def modulated_deform_conv_forward(*tensors: Tensor, **settings: int) -> None:
    """Fill ``output``.

    Args:
        tensors: ``input``, ``weight``, ``bias`` (``[C_out]``; empty without ``with_bias``),
            scratch, ``offset``, ``mask`` (``[B, G * K, H_out, W_out]``, multiplies the samples),
            ``output``, scratch.
        settings: of :data:`_SECOND`, ``with_bias``, and others that the shapes say.
    """
    input, weight, bias, _, offset, mask, output, _ = tensors
    inputs = [input, weight, offset, mask, *([bias] if settings["with_bias"] else [])]
    output.copy_(_convolution(_SECOND, settings)(*widen(*inputs)))


def modulated_deform_conv_backward(*tensors: Tensor, **settings: int) -> None:
    """Fill the five gradients; that of the bias only ``with_bias``."""
    input, weight, bias, _, offset, mask, _, *filled, grad = tensors
    grad_input, grad_weight, grad_bias, grad_offset, grad_mask = filled
    pairs = [(input, grad_input), (weight, grad_weight), (offset, grad_offset), (mask, grad_mask)]
    if settings["with_bias"]:
        pairs.append((bias, grad_bias))
    inputs = [given for given, _ in pairs]
    found = gradients(_convolution(_SECOND, settings), inputs, grad)
    for (_, into), gradient in zip(pairs, found, strict=True):
        into.copy_(gradient)


def _convolution(names: tuple[str, ...], settings: dict[str, int]) -> Callable[..., Tensor]:
    sides = [settings[name] for name in names]
    stride, padding, dilation = (tuple(sides[i : i + 2]) for i in (0, 2, 4))

    def convolve(
        input: Tensor, weight: Tensor, offset: Tensor, mask: Any = None, bias: Any = None
    ) -> Tensor:
        return deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)

    return convolve
