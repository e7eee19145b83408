"""FDConv's kernels: assembled for every sample from scaled frequencies, and convolved with.

Legend: B samples, I, O channels, g groups of the convolution, k kernel size, n groups of
frequencies.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..torch_private import is_traced
from ..warehouse.ops import ConvSpec, is_exporting
from ..warehouse.ops.assembly import even_chunks, join
from ..warehouse.ops.bmm import unfold_taps
from ..warehouse.ops.function import differentiable
from ..warehouse.ops.layout import lies_channels_last
from ..warehouse.ops.library import (
    convolve,
    convolve_backward,
    convolve_each,
    convolve_each_backward,
)
from .spectrum import scaled_inverse

__all__ = ["Operands", "assemble", "convolve_assembled"]


class Operands(NamedTuple):
    """What kernels are assembled from.

    Attributes:
        pooled: the layer's input averaged over positions, ``[B, I]``.
        alpha: twice the factors of the groups of frequencies, ``[B, n]``: the dense factors below
            are half, and alpha has fewer values to double.
        spatial: factors of positions, ``[B, k k]``, or ``None`` in a pointwise layer.
        parts: the kernel's coefficients (:func:`.spectrum.spectrum_parts`).
        weight: of the 1-D convolution, ``[O k k, 1, length]``.
        bias: of the same.
    """

    pooled: Tensor
    alpha: Tensor
    spatial: Tensor | None
    parts: Tensor
    weight: Tensor
    bias: Tensor

    def of(self, some: slice) -> Operands:
        """Those of some samples."""
        spatial = None if self.spatial is None else self.spatial[some]
        return self._replace(pooled=self.pooled[some], alpha=self.alpha[some], spatial=spatial)


def assemble(operands: Operands, group: Tensor, spec: ConvSpec) -> Tensor:
    """Samples' kernels, without the factors of channels and filters.

    Args:
        operands: of the samples.
        group: the groups of the coefficients' parts (:func:`.spectrum.frequency_groups`).
        spec: the layer.

    Returns:
        ``[B, O, I / g, k, k]``, in memory ``[B, O, k, k, I / g]``.
    """
    pooled, alpha, spatial, parts, weight, bias = operands
    out, in_, height, width = spec.partition.kernel_shape
    lines = pooled.unflatten(1, (spec.groups, -1))  # a group's channels by themselves
    lines = F.conv1d(lines, weight, bias, padding=weight.shape[-1] // 2, groups=spec.groups)
    dense = lines.sigmoid().unflatten(1, (out, -1))  # [B, O, k k, I / g]
    if spatial is not None:
        dense = dense * spatial[:, None, :, None]
    scale = alpha.gather(1, group.flatten().expand(alpha.shape[0], -1))
    matrix = scaled_inverse(parts, scale, in_ * width)  # [B, k O, k I / g]
    filters = matrix.view(-1, out, height, in_, width).transpose(3, 4)
    # In this order the product is laid out as the first factor.
    kernels = dense.unflatten(2, (height, width)) * filters
    return kernels.permute(0, 1, 4, 2, 3)


def convolve_assembled(x: Tensor, operands: Operands, group: Tensor, spec: ConvSpec) -> Tensor:
    """The convolution of every sample with its own kernel, without a bias.

    Args:
        x: ``[B, I, H, W]``.
        operands: as for :func:`assemble`.
        group: likewise.
        spec: the layer.

    Returns:
        ``[B, O, H', W']``, of x's type.
    """
    if is_exporting() or is_traced():
        kernels = assemble(operands, group, spec).to(x.dtype)
        return (_convolve_exported if is_exporting() else _convolve_grouped)(x, kernels, spec)
    result: Tensor = _Convolution.apply(x, *operands, group, spec)
    return result


_LEAST_ONEDNN = 20480
"""Values from which on torch gives a single image to oneDNN."""

_SCRATCH = {"cpu": 2 << 20}
"""Bytes of kernels that are assembled at a time: on CPUs what a core's cache holds, since every
value is read and written several times; elsewhere 256 MiB."""


class _Convolution(torch.autograd.Function):
    """Assemble the samples' kernels and convolve, some samples at a time; only the operands are
    stored, and kernels are assembled again in the backward pass.

    The convolution has as many groups as samples; on CPUs, channels-last images are convolved one
    by one, in whose layout the kernels lie, unless torch would not give such an image to oneDNN.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *given, group, spec = rest
        operands = Operands(*given)
        ctx.save_for_backward(x, *operands, group)
        ctx.spec = spec
        if len(x) == 0:  # as static layers do; a detector's head may get no regions
            return x.new_empty(0, spec.out_channels, *spec.output_size(x.shape[2:]))
        apply = convolve_each if _by_sample(x, spec) else _convolve_grouped
        chunks = _chunks(x, spec)
        parts = [
            apply(x[some], assemble(operands.of(some), group, spec).to(x.dtype), spec)
            for some in chunks
        ]
        return join(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *given, group = ctx.saved_tensors
        operands = Operands(*given)
        spec, needs = ctx.spec, ctx.needs_input_grad
        everything: list[Any] = [x, *operands]
        if len(x) == 0:
            zeros = [
                torch.zeros_like(t) if n else None
                for t, n in zip(everything, needs[:7], strict=True)
            ]
            return *zeros, None, None
        if torch.is_grad_enabled():  # for gradients of gradients

            def compute(x: Tensor, *given: Any) -> Tensor:
                kernels = assemble(Operands(*given), group, spec).to(x.dtype)
                return _convolve_grouped(x, kernels, spec)

            return *differentiable(compute, everything, needs[:7], grad), None, None
        back = convolve_each_backward if _by_sample(x, spec) else convolve_backward
        into_x = []
        shared: list[Any] = [None] * len(operands)
        for some in _chunks(x, spec):
            detached: list[Any] = [None if t is None else t.detach() for t in operands.of(some)]
            leaves = Operands(*detached)
            wanted = [t for t, n in zip(detached, needs[1:7], strict=True) if n]
            with torch.enable_grad():
                for leaf in wanted:
                    leaf.requires_grad_()
                kernels = assemble(leaves, group, spec)
            mask = (needs[0], bool(wanted))
            rounded = kernels.detach().to(x.dtype)
            dx, dkernels = back(grad[some], x[some], _laid_out(rounded, x, spec), spec, mask)
            if dx is not None:
                into_x.append(dx)
            if dkernels is None:
                continue
            # Laid out as the factors that it is multiplied with next.
            dkernels = dkernels.to(kernels.dtype).movedim(2, -1).contiguous().movedim(-1, 2)
            found = iter(torch.autograd.grad(kernels, wanted, dkernels))
            for place, leaf in enumerate(leaves):
                if leaf is None or not leaf.requires_grad:
                    continue
                each = next(found)
                if place < _PER_SAMPLE:
                    shared[place] = [*(shared[place] or []), each]
                else:
                    shared[place] = each if shared[place] is None else shared[place].add_(each)
        results = [torch.cat(s) if isinstance(s, list) else s for s in shared]
        return join(into_x) if into_x else None, *results, None, None


_PER_SAMPLE = 3
"""Fields of :class:`Operands` that belong to samples: the first ones."""


def _chunks(x: Tensor, spec: ConvSpec) -> list[slice]:
    each = math.prod(spec.partition.kernel_shape) * 4
    return even_chunks(len(x), max(_SCRATCH.get(x.device.type, 256 << 20) // each, 1))


def _by_sample(x: Tensor, spec: ConvSpec) -> bool:
    on_cpu = x.device.type == "cpu" and spec.groups == 1
    return on_cpu and lies_channels_last(x) and x[0].numel() > _LEAST_ONEDNN


def _laid_out(kernels: Tensor, x: Tensor, spec: ConvSpec) -> Tensor:
    return kernels if _by_sample(x, spec) else kernels.contiguous()


def _convolve_grouped(x: Tensor, kernels: Tensor, spec: ConvSpec) -> Tensor:
    return convolve(x, kernels.contiguous(), spec)


def _convolve_exported(x: Tensor, kernels: Tensor, spec: ConvSpec) -> Tensor:
    """By one batched product: exporters fix a convolution's groups, and with them the batch."""
    taps, size = unfold_taps(x, spec)  # [B, C, K, P]
    columns = taps.unflatten(1, (spec.groups, -1)).flatten(2, 3)  # [B, g, I / g K, P]
    y = kernels.flatten(2).unflatten(1, (spec.groups, -1)) @ columns  # [B, g, O / g, P]
    return y.flatten(1, 2).unflatten(2, size)
