"""PyTorch's convolutions for samples that each have their own kernel.

Legend: b samples, O, I channels, g groups, k kernel size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .assembly import assemble
from .spec import ConvSpec

RELAYOUT_MACS = 4
"""Multiply-adds outside of matrix products that take as long as moving one value elsewhere: from
channels last to channels first, from a block to its place in a kernel (0.5 ns on two cores)."""

LARGE_KERNEL = 9
"""Positions up to which a depthwise kernel's gradient takes equally long in both layouts on CPU.
That of a 7x7 kernel takes four times as long channels first (96 channels at 56x56, batch 8: 75 ms
against 19)."""


def slowdown(spec: ConvSpec) -> float:
    """Of a depthwise backward pass on CPU channels first, against channels last."""
    return 2.5 if math.prod(spec.partition.kernel) > LARGE_KERNEL else 1


def conv_grouped(x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
    """The yardstick ``grouped``: the usual implementation of dynamic convolution."""
    return _as_groups(x, assemble(alpha, cells, spec), spec)


def convolve(x: Tensor, kernels: Tensor, spec: ConvSpec) -> Tensor:
    """All samples at once, as groups: ``x [b, I, *size]``, ``kernels [b, O, I / g, k..]``."""
    if len(x) > 1:
        return _as_groups(x, kernels, spec)
    return spec.conv(x, kernels.flatten(0, 1), spec.groups)


def _as_groups(x: Tensor, kernels: Tensor, spec: ConvSpec) -> Tensor:
    batch, kernels = x.shape[0], kernels.flatten(0, 1)  # [b * O, I / g, k..]
    y = spec.conv(x.reshape(1, -1, *x.shape[2:]), kernels, batch * spec.groups)
    return y.view(batch, -1, *y.shape[2:])  # [b, O, ...]


def convolve_each(x: Tensor, kernels: Tensor, spec: ConvSpec) -> Tensor:
    """Sample by sample, which keeps channels last."""
    kernels = _laid_out(kernels, spec)
    return torch.cat([convolve(x[i : i + 1], kernels[i : i + 1], spec) for i in range(len(x))])


def _laid_out(kernels: Tensor, spec: ConvSpec) -> Tensor:
    # torch refuses gradients of a single filter that is not contiguous, beside such images.
    return kernels.contiguous() if spec.out_channels == 1 else kernels


def convolve_backward(
    grad: Tensor, x: Tensor, kernels: Tensor, spec: ConvSpec, mask: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`convolve`'s input and kernels, where the mask asks for them."""
    batch, shape = len(x), x.shape
    if batch > 1:
        grad, x = (t.reshape(1, -1, *t.shape[2:]) for t in (grad, x))
    kernels, groups = kernels.flatten(0, 1), batch * spec.groups
    into_x, into_kernels = conv_backward(grad, x, kernels, spec, groups, mask)
    if into_x is not None and batch > 1:
        into_x = into_x.reshape(shape)
    return into_x, None if into_kernels is None else into_kernels.unflatten(0, (batch, -1))


def convolve_each_backward(
    grad: Tensor, x: Tensor, kernels: Tensor, spec: ConvSpec, mask: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`convolve_each`'s input and kernels, where the mask asks for them."""
    kernels, ones = _laid_out(kernels, spec), [slice(i, i + 1) for i in range(len(x))]
    parts = [convolve_backward(grad[i], x[i], kernels[i], spec, mask) for i in ones]
    into_x, into_kernels = (
        torch.cat([p for p in side if p is not None]) if wanted else None
        for side, wanted in zip(zip(*parts, strict=True), mask, strict=True)
    )
    return into_x, into_kernels


def conv_backward(
    grad: Tensor, x: Tensor, kernel: Tensor, spec: ConvSpec, groups: int, mask: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :meth:`ConvSpec.conv`'s input and kernel, where the mask asks for them."""
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
        groups,
        (*mask, False),
    )
    return into_x, into_kernel
