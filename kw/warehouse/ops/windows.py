"""The input positions that every position of a kernel reads.

For a tap (one position of the kernel), output position ``o`` reads input position
``o * stride + tap * dilation - padding`` along every axis. Where that falls into the padding there
is nothing to read, so padding costs neither memory nor work.

Legend: B samples, g groups, C channels of a group, K taps, Q input and P output positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .spec import ConvSpec

Tap = tuple[tuple[slice, ...], tuple[slice, ...]]
"""Output positions that a tap serves, and the input positions that it reads for them."""


def tap_slices(spec: ConvSpec, size: Sequence[int]) -> list[Tap | None]:
    """For every tap, row-major, its positions; ``None`` if it reads nothing but padding."""
    return _tap_slices(spec, tuple(size))


@lru_cache(maxsize=4096)
def _tap_slices(spec: ConvSpec, size: tuple[int, ...]) -> list[Tap | None]:
    per_axis: list[list[tuple[slice, slice] | None]] = []
    for outputs, inputs, stride, padding, dilation, kernel in spec.axes(size):
        taps: list[tuple[slice, slice] | None] = []
        for tap in range(kernel):
            offset = tap * dilation - padding
            first = max(-(offset // stride), 0)
            last = min((inputs - 1 - offset) // stride, outputs - 1)
            start = first * stride + offset
            stop = last * stride + offset + 1
            met = (slice(first, last + 1), slice(start, stop, stride))
            taps.append(met if first <= last else None)
        per_axis.append(taps)
    return [
        None
        if any(axis is None for axis in tap)
        else (tuple(a[0] for a in tap if a), tuple(a[1] for a in tap if a))
        for tap in itertools.product(*per_axis)
    ]


def gather(x: Tensor, spec: ConvSpec, size: Sequence[int]) -> Tensor:
    """The input positions of every tap, zeros in padding.

    ``x [B, *size, C]`` -> ``[B, K, *output size, C]``.
    """
    taps = tap_slices(spec, size)
    windows = x.new_zeros(len(x), len(taps), *spec.output_size(size), x.shape[-1])
    for k, tap in enumerate(taps):
        if tap is not None:
            windows[:, k][_batched(tap[0])] = x[_batched(tap[1])]
    return windows


def scatter(windows: Tensor, spec: ConvSpec, size: Sequence[int]) -> Tensor:
    """The transpose of :func:`gather`; sums in float32 at least.

    ``[B, K, *output size, C]`` -> ``[B, *size, C]``.
    """
    x = windows.new_zeros(len(windows), *size, windows.shape[-1], dtype=wide(windows))
    for k, tap in enumerate(tap_slices(spec, size)):
        if tap is not None:
            x[_batched(tap[1])] += windows[:, k][_batched(tap[0])]
    return x.to(windows.dtype)


def fold(products: Tensor, spec: ConvSpec, size: Sequence[int]) -> Tensor:
    """Every tap's products, summed at their output positions, in float32 at least.

    ``[B, *size, K, C]`` -> ``[B, *output size, C]``.
    """
    shape = (len(products), *spec.output_size(size), products.shape[-1])
    y = products.new_zeros(shape, dtype=wide(products))
    for k, tap in enumerate(tap_slices(spec, size)):
        if tap is not None:
            y[_batched(tap[0])] += products[..., k, :][_batched(tap[1])]
    return y.to(products.dtype)


def unfold(grad: Tensor, spec: ConvSpec, size: Sequence[int]) -> Tensor:
    """The transpose of :func:`fold`: ``[B, *output size, C]`` -> ``[B, *size, K, C]``."""
    taps = tap_slices(spec, size)
    products = grad.new_zeros(len(grad), *size, len(taps), grad.shape[-1])
    for k, tap in enumerate(taps):
        if tap is not None:
            products[..., k, :][_batched(tap[1])] = grad[_batched(tap[0])]
    return products


def _batched(positions: tuple[slice, ...]) -> tuple[slice, ...]:
    return (slice(None), *positions)


def wide(x: Tensor) -> torch.dtype:
    """The type of sums: float32, or the tensor's where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)
