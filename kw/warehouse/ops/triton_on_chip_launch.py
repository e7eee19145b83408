"""How the on-chip kernel is launched: inputs packed, coefficients padded, strides.

Legend: B samples, C channels, m mixtures, n cells, K read channels of a tile, GO, GI blocks along
output and input channels, ck kernel positions inside of a cell.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .spec import ConvSpec
from .triton_launch import (
    AXES,
    Axis,
    arithmetic,
    forward_axes,
    pad,
    pad_axes,
    shift,
    taps_of,
    transposed_axes,
    written_positions,
)
from .triton_tiles import OnChipTiles, tiles_on_chip


class Mixture(NamedTuple):
    """The operands of mixing: coefficients ``[B, m, n padded]``, cells as columns
    ``[n, c_out * ck * c_in]``, the layer."""

    alpha: Tensor
    columns: Tensor
    spec: ConvSpec


class _Channels(NamedTuple):
    """Channels of one side: blocks, channels of a block, their stride in a cell, that of blocks
    among the mixtures."""

    blocks: int
    width: int
    stride: int
    mixture: int


class _Window(NamedTuple):
    """The positions that are read along one axis: the first, which may lie in the padding, and
    how many."""

    low: int
    size: int


def pad_coefficients(alpha: Tensor, dtype: torch.dtype) -> Tensor:
    """Coefficients ``[B, m, n]`` with samples for whole programs, and rows as long as a tile has
    cells, so that they are aligned."""
    batch, _, cells = alpha.shape
    tiles = tiles_on_chip(1, cells, dtype.itemsize)
    missing = tiles.all_cells - cells, -batch % tiles.samples
    # What lacks nothing is not copied, and need not lie in rows.
    return F.pad(alpha.to(dtype), (0, missing[0], 0, 0, 0, missing[1])).contiguous()


def convolve_on_chip(mixture: Mixture, x: Tensor, y: Tensor) -> None:
    """Write ``y [B, O, *space]``."""
    spec = mixture.spec
    axes = forward_axes(spec, tuple(x.shape[2:]))
    written, read = _sides(spec)
    packed, windows = _pack(x, read, [[axis] for axis in axes])
    _launch(mixture, packed, windows, y, axes, written, read)


def convolve_on_chip_transposed(mixture: Mixture, dy: Tensor, dx: Tensor) -> None:
    """Write ``dx [B, I, *space]``; positions that no tap reads are not written."""
    spec = mixture.spec
    per_axis = transposed_axes(spec, tuple(dx.shape[2:]))
    met = [[axis for axis in residues if axis.taps] for residues in per_axis]
    if all(met):
        read, written = _sides(spec)
        packed, windows = _pack(dy, read, met)
        for axes in itertools.product(*met):
            _launch(mixture, packed, windows, dx, list(axes), written, read)


def _sides(spec: ConvSpec) -> tuple[_Channels, _Channels]:
    """Output and input channels."""
    part = spec.partition
    _, out_blocks, in_blocks = part.grid
    row = math.prod(part.cell_kernel) * part.cell_in
    outputs = _Channels(out_blocks, part.cell_out, row, in_blocks)
    return outputs, _Channels(in_blocks, part.cell_in, 1, 1)


def _pack(x: Tensor, read: _Channels, axes: list[list[Axis]]) -> tuple[Tensor, list[_Window]]:
    """Pack the input for tiles: runs of K channels of neighbouring positions,
    ``[B, blocks, chunks, *window, K]``, with samples for whole programs; and the windows.

    Zeros surround the input as far as taps reach, so that the kernel compares no positions, and
    fill the last run of a block. A copy of the input, which is small where kernels are large.
    """
    tiles = tiles_on_chip(1, 1, x.itemsize)
    step, batch = tiles.inner, len(x)
    windows = []
    for choices in axes:
        reach = [(axis.taps - 1) * axis.hop for axis in choices]
        low = min(axis.start + min(r, 0) for axis, r in zip(choices, reach, strict=True))
        last = max(
            axis.start + (axis.count - 1) * axis.step + max(r, 0)
            for axis, r in zip(choices, reach, strict=True)
        )
        windows.append(_Window(low, last - low + 1))
    chunks = -(-read.width // step)
    x = x.unflatten(1, (read.blocks, read.width))
    if read.width % step:
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, chunks * step - read.width))
    x = x.unflatten(2, (chunks, step)).movedim(3, -1)  # [B, blocks, chunks, *space, K]
    inside = [
        (max(w.low, 0), min(w.low + w.size, n))
        for w, n in zip(windows, x.shape[3:-1], strict=True)
    ]  # fmt: skip
    groups = -(-batch // tiles.samples)
    shape = (groups * tiles.samples, *x.shape[1:3], *(w.size for w in windows), step)
    whole = all(b - a == w.size for (a, b), w in zip(inside, windows, strict=True))
    whole = whole and shape[0] == batch
    data = x.new_empty(shape) if whole else x.new_zeros(shape)
    if all(a < b for a, b in inside):
        source, target = x, data[:batch]
        for axis, ((a, b), w) in enumerate(zip(inside, windows, strict=True), 3):
            source = source.narrow(axis, a, b - a)
            target = target.narrow(axis, a - w.low, b - a)
        target.copy_(source)
    return data, windows


def _launch(
    mixture: Mixture,
    x: Tensor,
    windows: list[_Window],
    y: Tensor,
    axes: list[Axis],
    written: _Channels,
    read: _Channels,
) -> None:
    from . import triton_on_chip_kernel as kernels  # needs Triton, which refusals have asked for

    alpha, columns, spec = mixture
    part = spec.partition
    windows = [_Window(0, 1)] * (AXES - len(axes)) + windows
    axes = pad_axes(axes)
    x_b, x_block, x_chunk, *x_inner, _ = x.stride()
    x_space = pad(tuple(x_inner), 0)
    begin = zip(axes, windows, x_space, strict=True)
    x = shift(x, sum((axis.start - window.low) * s for axis, window, s in begin))
    batch, y_b, y_c, *_ = len(y), *y.stride()
    start, y_space = written_positions(y, axes)
    y = shift(y, start)

    # Kernel positions are mixtures, or lie inside of a cell.
    inside = math.prod(part.cell_kernel) > 1
    first, taps = taps_of(spec, axes, 1)
    c_tap = part.cell_in if inside else 0
    a_tap = 0 if inside else part.grid[1] * part.grid[2] * alpha.stride(1)

    tiles = tiles_on_chip(math.prod(axis.count for axis in axes), len(columns), x.itemsize)
    kernels.convolve_on_chip[(_programs(batch, axes, written, tiles),)](
        x, shift(alpha, first * a_tap), shift(columns, first * c_tap), y,
        x_block, x_chunk,
        *(axis.step * s for axis, s in zip(axes, x_space, strict=True)),
        *(axis.hop * s for axis, s in zip(axes, x_space, strict=True)),
        y_b, y_c,
        *y_space,
        columns.stride(0), written.stride, read.stride,
        *(tap * c_tap for tap in taps),
        alpha.stride(0), written.mixture * alpha.stride(1), read.mixture * alpha.stride(1),
        *(tap * a_tap for tap in taps),
        batch, *(axis.count for axis in axes),
        *(axis.taps for axis in axes),
        INSIDE=inside, N_BLOCK=written.width, K_BLOCK=read.width, K_BLOCKS=read.blocks,
        K_FAST=read.stride == 1, X_B=x_b, CELLS=len(columns),
        J=tiles.cells, J_REST=tiles.more_cells, **arithmetic(x),
        S=tiles.samples, G=tiles.mixtures,
        TILE_P=tiles.positions, TILE_N=tiles.channels, TILE_K=tiles.inner,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def _programs(batch: int, axes: list[Axis], written: _Channels, tiles: OnChipTiles) -> int:
    positions = math.prod(axis.count for axis in axes)
    channels = written.blocks * -(-written.width // tiles.channels)
    return -(-batch // tiles.samples) * -(-positions // tiles.positions) * channels
