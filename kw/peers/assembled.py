"""FDConv's kernels: assembled for every sample from scaled frequencies, and convolved with.

Legend: B samples, I, O channels, g groups of the convolution, k kernel size, n groups of
frequencies.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..torch_private import is_traced
from ..warehouse.ops import ConvSpec, is_exporting
from ..warehouse.ops.assembly import even_chunks, join
from ..warehouse.ops.bmm import unfold_taps
from ..warehouse.ops.layout import lies_channels_last
from ..warehouse.ops.library import convolve, convolve_each
from .spectrum import scaled_inverse


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
    """Samples' kernels ``[B, O, I / g, k, k]``, in memory ``[B, O, k, k, I / g]``, without the
    factors of channels and filters; ``group`` is of :func:`.spectrum.frequency_groups`."""
    pooled, alpha, spatial, parts, weight, bias = operands
    out, in_, height, width = spec.partition.kernel_shape
    lines = pooled.unflatten(1, (spec.groups, -1))  # a group's channels by themselves
    lines = F.conv1d(lines, weight, bias, padding=weight.shape[-1] // 2, groups=spec.groups)
    dense = lines.sigmoid().unflatten(1, (out, -1))  # [B, O, k k, I / g]
    if spatial is not None:
        dense = dense * spatial[:, None, :, None]
    scale = alpha.gather(1, group.flatten().expand(alpha.shape[0], -1))
    matrix = scaled_inverse(parts, scale, in_ * width)  # [B, k O, k I / g]
    filters = matrix.view(matrix.shape[0], out, height, in_, width).transpose(3, 4)
    # In this order the product is laid out as the first factor.
    kernels = dense.unflatten(2, (height, width)) * filters
    return kernels.permute(0, 1, 4, 2, 3)


def convolve_assembled(x: Tensor, operands: Operands, group: Tensor, spec: ConvSpec) -> Tensor:
    """The convolution of every sample with its own kernel, without a bias, some samples at a time.

    Kernels are not kept: they are assembled again in the backward pass. The convolution has as many
    groups as samples; on CPUs, channels-last images are convolved one by one, in whose layout the
    kernels lie, unless torch would not give such an image to oneDNN.

    Arguments as for :func:`assemble`; ``[B, I, H, W]`` -> ``[B, O, H', W']`` of x's type.
    """
    if is_exporting() or is_traced():
        kernels = assemble(operands, group, spec).to(x.dtype)
        return (_convolve_exported if is_exporting() else _convolve_grouped)(x, kernels, spec)
    apply = convolve_each if _by_sample(x, spec) else _convolve_grouped

    def part(x: Tensor, *operands: Any) -> Tensor:
        kernels = assemble(Operands(*operands), group, spec)
        if kernels.requires_grad:
            kernels.register_hook(_as_factors)
        return apply(x, kernels.to(x.dtype), spec)

    if len(x) == 0:  # as static layers do; a detector's head may get no regions
        y = x.new_empty(0, spec.out_channels, *spec.output_size(x.shape[2:]))
        # No kernels: earlier versions of torch have no transform of no samples.
        return y + sum(each.sum().to(x.dtype) for each in (x, *operands) if each is not None)
    each = _SCRATCH.get(x.device.type, 256 << 20) // (4 * math.prod(spec.partition.kernel_shape))
    alone = partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)
    chunks = even_chunks(len(x), max(each, 1))
    return join([alone(x[some], *operands.of(some)) for some in chunks])


_LEAST_ONEDNN = 20480
"""Values from which on torch gives a single image to oneDNN."""

_SCRATCH = {"cpu": 2 << 20}
"""Bytes of kernels that are assembled at a time: on CPUs what a core's cache holds, since every
value is read and written several times; elsewhere 256 MiB."""


def _by_sample(x: Tensor, spec: ConvSpec) -> bool:
    on_cpu = x.device.type == "cpu" and spec.groups == 1
    return on_cpu and lies_channels_last(x) and x[0].numel() > _LEAST_ONEDNN


def _as_factors(grad: Tensor | None) -> Tensor | None:
    """A kernel's gradient, laid out as the factors that it is multiplied with next."""
    return None if grad is None else grad.movedim(2, -1).contiguous().movedim(-1, 2)


def _convolve_grouped(x: Tensor, kernels: Tensor, spec: ConvSpec) -> Tensor:
    return convolve(x, kernels.contiguous(), spec)


def _convolve_exported(x: Tensor, kernels: Tensor, spec: ConvSpec) -> Tensor:
    """By one batched product: exporters fix a convolution's groups, and with them the batch."""
    taps, size = unfold_taps(x, spec)  # [B, C, K, P]
    columns = taps.unflatten(1, (spec.groups, -1)).flatten(2, 3)  # [B, g, I / g K, P]
    y = kernels.flatten(2).unflatten(1, (spec.groups, -1)) @ columns  # [B, g, O / g, P]
    return y.flatten(1, 2).unflatten(2, size)
