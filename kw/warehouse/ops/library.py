"""PyTorch's convolutions for samples that each have their own kernel.

Legend: b samples, O, I channels, g groups, k kernel size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .spec import ConvSpec

__all__ = [
    "LARGE_KERNEL",
    "RELAYOUT_MACS",
    "convolve",
    "convolve_backward",
    "convolve_each",
    "convolve_each_backward",
    "convolve_shared",
    "convolve_shared_backward",
    "slowdown",
]

RELAYOUT_MACS = 4
"""Multiply-adds outside of matrix products that take as long as moving one value elsewhere: from
channels last to channels first, from a block to its place in a kernel (0.5 ns on two cores)."""

LARGE_KERNEL = 9
"""Positions up to which a depthwise kernel's gradient takes equally long in both layouts on CPU.
That of a 7x7 kernel takes four times as long channels first (96 channels at 56x56, batch 8: 75 ms
against 19)."""

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def slowdown(spec: ConvSpec) -> float:
    """Of a depthwise backward pass on CPU channels first, against channels last."""
    return 2.5 if math.prod(spec.partition.kernel) > LARGE_KERNEL else 1


def convolve(x: Tensor, kernels: Tensor, spec: ConvSpec) -> Tensor:
    """All samples at once, as groups: ``x [b, I, *size]``, ``kernels [b, O, I / g, k..]``."""
    batch = len(x)
    y = _CONV[len(spec.stride)](
        x.reshape(1, -1, *x.shape[2:]) if batch > 1 else x,  # [1, b * I, ...]
        kernels.flatten(0, 1),  # [b * O, I / g, k..]
        None,
        spec.stride,
        spec.padding,
        spec.dilation,
        batch * spec.groups,
    )
    return y.view(batch, -1, *y.shape[2:]) if batch > 1 else y  # [b, O, ...]


def convolve_each(x: Tensor, kernels: Tensor, spec: ConvSpec) -> Tensor:
    """Sample by sample, which keeps channels last."""
    return torch.cat([convolve(x[i : i + 1], kernels[i : i + 1], spec) for i in range(len(x))])


def convolve_backward(
    grad: Tensor, x: Tensor, kernels: Tensor, spec: ConvSpec, mask: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`convolve`'s input and kernels, where the mask asks for them."""
    batch, dims = len(x), len(spec.stride)
    into_x, into_kernels, _ = torch.ops.aten.convolution_backward(
        grad.reshape(1, -1, *grad.shape[2:]) if batch > 1 else grad,
        x.reshape(1, -1, *x.shape[2:]) if batch > 1 else x,
        kernels.flatten(0, 1),
        None,
        spec.stride,
        spec.padding,
        spec.dilation,
        False,
        (0,) * dims,
        batch * spec.groups,
        (*mask, False),
    )
    return (
        into_x.reshape(x.shape) if mask[0] and batch > 1 else into_x,
        into_kernels.unflatten(0, (batch, -1)) if mask[1] else None,
    )


def convolve_each_backward(
    grad: Tensor, x: Tensor, kernels: Tensor, spec: ConvSpec, mask: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`convolve_each`'s input and kernels, where the mask asks for them."""
    ones = [slice(i, i + 1) for i in range(len(x))]
    parts = [convolve_backward(grad[i], x[i], kernels[i], spec, mask) for i in ones]
    into_x, into_kernels = (
        torch.cat([p for p in side if p is not None]) if wanted else None
        for side, wanted in zip(zip(*parts, strict=True), mask, strict=True)
    )
    return into_x, into_kernels


def convolve_shared(x: Tensor, kernel: Tensor, spec: ConvSpec) -> Tensor:
    """One ungrouped kernel ``[O, I, k..]`` for all samples."""
    conv = _CONV[len(spec.stride)]
    return conv(x, kernel, None, spec.stride, spec.padding, spec.dilation)


def convolve_shared_backward(
    grad: Tensor, x: Tensor, kernel: Tensor, spec: ConvSpec, mask: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`convolve_shared`'s input and kernel, where the mask asks for them."""
    into_x, into_kernel, _ = torch.ops.aten.convolution_backward(
        grad,
        x,
        kernel,
        None,
        spec.stride,
        spec.padding,
        spec.dilation,
        False,
        (0,) * len(spec.stride),
        1,
        (*mask, False),
    )
    return into_x, into_kernel
