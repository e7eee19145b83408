"""How the Triton kernels are launched: tiles, positions axis by axis, strides.

Legend: B samples, O, I channels, P positions, S, GO, GI blocks along space, output and input
channels, ck kernel positions inside of a cell, rows output channels of a cell in the chunk at hand.
"""

from __future__ import annotations

import importlib
import itertools
import math
import os
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .precision import allows_tf32
from .spec import ConvSpec
from .triton_tiles import Tiles, tiles_of_convolution, tiles_of_gradient

AXES = 3


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def kernel_module(name: str = "triton_kernels") -> Any:
    """A module of kernels or, as text, why there are none; imported at first use."""
    try:
        return importlib.import_module(f".{name}", __package__)
    except ImportError as error:
        return f"needs Triton, which cannot be imported ({error})"


def is_plain(spec: ConvSpec) -> bool:
    """Whether every output position reads the input at the same position only."""
    return spec.is_pointwise and not any(spec.padding) and all(s == 1 for s in spec.stride)


@dataclass(frozen=True)
class Axis:
    """Positions of a launch along one axis: written, read, and kernel positions.

    Position p is written at ``write_start + p * write_step``; its tap t reads ``p * step + start +
    t * hop`` and takes kernel position ``first + t * every``.
    """

    count: int
    size: int
    step: int
    start: int
    hop: int
    taps: int
    first: int = 0
    every: int = 1
    write_start: int = 0
    write_step: int = 1


def forward_axes(spec: ConvSpec, size: tuple[int, ...]) -> list[Axis]:
    """The convolution from input to output."""
    return [Axis(out, n, s, -p, d, k) for out, n, s, p, d, k in spec.axes(size)]


def transposed_axes(spec: ConvSpec, size: tuple[int, ...]) -> list[list[Axis]]:
    """The gradient of the input, per axis one entry for every residue of the stride.

    Input position i meets output ``(i + p - k d) / s`` where that is whole. For inputs ``i_0 + j
    s`` these are the taps k of one arithmetic progression.
    """
    result = []
    for out, n, s, p, d, kernel in spec.axes(size):
        residues = []
        for start in range(min(s, n)):
            taps = [k for k in range(kernel) if (start + p - k * d) % s == 0]
            first = taps[0] if taps else 0
            every = taps[1] - first if len(taps) > 1 else 1
            residues.append(
                Axis(
                    count=-(-(n - start) // s),
                    size=out,
                    step=1,
                    start=(start + p - first * d) // s,
                    hop=-(every * d) // s if len(taps) > 1 else 0,
                    taps=len(taps),
                    first=first,
                    every=every,
                    write_start=start,
                    write_step=s,
                )
            )
        result.append(residues)
    return result


def reaches_all(spec: ConvSpec, size: tuple[int, ...]) -> bool:
    """Whether some tap reads every position of the input."""
    return all(axis.taps for residues in transposed_axes(spec, size) for axis in residues)


class Chunk(NamedTuple):
    """Kernels of some samples and rows of a cell: ``[B, S, GO, GI, rows, ck, c_in]``."""

    blocks: Tensor
    spec: ConvSpec
    span: slice

    @property
    def start(self) -> int:
        """The first row."""
        return self.span.start

    @property
    def rows(self) -> int:
        """Their number."""
        return self.span.stop - self.span.start

    @property
    def strides(self) -> dict[str, int]:
        """Of samples, kernel positions, output blocks, rows, input blocks; input channels have 1.

        Kernel positions are blocks or lie inside of a cell, whichever there are several of.
        """
        part = self.spec.partition
        spatial, out_blocks, in_blocks = part.grid
        inside = math.prod(part.cell_kernel)
        block = self.rows * inside * part.cell_in
        return {
            "b": spatial * out_blocks * in_blocks * block,
            "tap": out_blocks * in_blocks * block if spatial > 1 else part.cell_in,
            "o_block": in_blocks * block,
            "o": inside * part.cell_in,
            "i_block": block,
        }


def convolve(chunk: Chunk, x: Tensor, y: Tensor) -> None:
    """Write the chunk's output channels of ``y [B, O, *space]``."""
    spec, part = chunk.spec, chunk.spec.partition
    axes = forward_axes(spec, tuple(x.shape[2:]))
    x, y, axes = _collapse(spec, x, y, axes)
    w = chunk.strides
    _launch_convolution(
        chunk, x, y[:, chunk.start :], axes, False,
        n=(part.grid[1], chunk.rows, w["o_block"], w["o"], part.cell_out),
        k=(part.grid[2], part.cell_in, w["i_block"], 1, part.cell_in),
    )  # fmt: skip


def convolve_transposed(chunk: Chunk, dy: Tensor, dx: Tensor, add: bool) -> None:
    """Write, or add to, ``dx [B, I, *space]`` what the chunk's output channels of ``dy`` give.

    Positions of ``dx`` that no tap reads are not written.
    """
    spec, part = chunk.spec, chunk.spec.partition
    w = chunk.strides
    for axes in itertools.product(*transposed_axes(spec, tuple(dx.shape[2:]))):
        if all(axis.taps for axis in axes):
            read, written, flat = _collapse(spec, dy, dx, list(axes))
            _launch_convolution(
                chunk, read[:, chunk.start :], written, flat, add,
                n=(part.grid[2], part.cell_in, w["i_block"], 1, part.cell_in),
                k=(part.grid[1], chunk.rows, w["o_block"], w["o"], part.cell_out),
            )  # fmt: skip


def kernel_gradient(chunk: Chunk, dy: Tensor, x: Tensor) -> None:
    """Write the chunk's kernel gradients into its blocks."""
    kernels = kernel_module()
    spec, part = chunk.spec, chunk.spec.partition
    axes = forward_axes(spec, tuple(x.shape[2:]))
    x, dy, axes = _collapse(spec, x, dy, axes)
    dy = dy[:, chunk.start :]
    axes = pad_axes(axes)
    outputs, inputs = part.grid[1] * chunk.rows, part.kernel_shape[1]
    positions = math.prod(axis.count for axis in axes)
    taps = math.prod(part.kernel)
    tiles = tiles_of_gradient(len(x) * taps, positions, outputs, inputs, x.itemsize)
    programs = -(-outputs // tiles.rows) * -(-inputs // tiles.columns)
    programs *= len(x) * taps
    kernel = kernels.kernel_gradient_flat if x.stride(-1) == 1 else kernels.kernel_gradient
    x_unit, x_strides = _strides(x)
    y_unit, y_strides = _strides(dy)
    w = chunk.strides
    w_unit, w_strides = in_units(w["b"], w["tap"], w["o_block"], w["o"], w["i_block"])
    kernel[(programs,)](
        x, dy, chunk.blocks,
        *x_strides, *y_strides, *w_strides,
        part.grid[1], part.grid[2],
        *positions_of(axes),
        *(axis.taps for axis in axes),
        X_UNIT=x_unit, Y_UNIT=y_unit, W_UNIT=w_unit,
        O_BLOCK=chunk.rows, I_BLOCK=part.cell_in, Y_BLOCK=part.cell_out, **arithmetic(x),
        FLAT=is_plain(spec), DEEP=len(part.kernel) == AXES and not is_plain(spec),
        TILE_O=tiles.rows, TILE_I=tiles.columns, TILE_P=tiles.inner, **compiler_options(tiles),
    )  # fmt: skip


def _launch_convolution(
    chunk: Chunk,
    x: Tensor,
    y: Tensor,
    axes: list[Axis],
    add: bool,
    n: tuple[int, int, int, int, int],
    k: tuple[int, int, int, int, int],
) -> None:
    """``n`` and ``k`` describe written and read channels: blocks, channels of a block, strides of
    either in the kernels, channels between blocks in ``y`` and ``x``."""
    kernels = kernel_module()
    axes = pad_axes(axes)
    x_unit, x_strides = _strides(x)
    y_c, (start, steps) = y.stride(1), written_positions(y, axes)
    y_unit, (y_b, *y_space) = in_units(y.stride(0), *steps)
    y = shift(y, start)
    first, w_taps = taps_of(chunk.spec, axes, chunk.strides["tap"])
    w = shift(chunk.blocks, first)

    n_blocks, n_block, w_n_block, w_n, y_block = n
    k_blocks, k_block, w_k_block, w_k, x_block = k
    channels, inner = n_blocks * n_block, k_blocks * k_block
    positions = math.prod(axis.count for axis in axes)
    tiles = tiles_of_convolution(len(x), positions, channels, inner, x.itemsize)
    programs = -(-positions // tiles.rows) * -(-channels // tiles.columns) * len(x)
    convolution = kernels.convolve_flat if x.stride(-1) == 1 else kernels.convolve
    w_unit, w_strides = in_units(chunk.strides["b"], *w_taps, w_n_block, w_k_block)
    convolution[(programs,)](
        x, w, y,
        *x_strides, y_b, y_c, *y_space, *w_strides, n_blocks,
        *positions_of(axes),
        *(axis.taps for axis in axes),
        X_UNIT=x_unit, Y_UNIT=y_unit, W_UNIT=w_unit, W_N=w_n, W_K=w_k,
        N_BLOCK=n_block, K_BLOCK=k_block, Y_BLOCK=y_block, X_BLOCK=x_block,
        K=inner, ADD=add, **arithmetic(x),
        TILE_P=tiles.rows, TILE_N=tiles.columns, TILE_K=tiles.inner, **compiler_options(tiles),
    )  # fmt: skip


def _collapse(
    spec: ConvSpec, x: Tensor, y: Tensor, axes: list[Axis]
) -> tuple[Tensor, Tensor, list[Axis]]:
    """One axis for all positions where every position reads itself: addresses stay consecutive."""
    if not is_plain(spec):
        return x, y, axes
    x, y = x.view(*x.shape[:2], -1), y.view(*y.shape[:2], -1)  # [B, C, P]
    return x, y, [Axis(x.shape[2], x.shape[2], 1, 0, 0, 1)]


def pad(values: tuple[int, ...], fill: int) -> tuple[int, ...]:
    """A value for each of the kernels' axes, of which the first may be missing."""
    return (fill,) * (AXES - len(values)) + values


def pad_axes(axes: list[Axis]) -> list[Axis]:
    """As many axes as the kernels have; those that were missing have one position and tap."""
    return [Axis(1, 1, 1, 0, 0, 1)] * (AXES - len(axes)) + axes


def in_units(*strides: int) -> tuple[int, list[int]]:
    """The largest power of two up to 16 that divides all strides, and the strides in that unit.

    Of a number Triton knows whether 16 divides it, and no more. Where rows have 24 channels, it
    would load value by value.
    """
    unit = math.gcd(16, *strides)
    return unit, [stride // unit for stride in strides]


def _strides(t: Tensor) -> tuple[int, list[int]]:
    """Of samples, channels and three axes of space, but for channels in units, and the unit."""
    unit, (b, *space) = in_units(t.stride(0), *pad(t.stride()[2:], 0))
    return unit, [b, t.stride(1), *space]


def shift(t: Tensor, offset: int) -> Tensor:
    """A tensor that starts there, for its address only."""
    return t.as_strided((1,), (1,), t.storage_offset() + offset) if offset else t


def written_positions(y: Tensor, axes: list[Axis]) -> tuple[int, list[int]]:
    """The offset of the first position of ``y`` that a launch writes, and their strides."""
    axes_of_y = list(zip(axes, pad(y.stride()[2:], 0), strict=True))
    start = sum(axis.write_start * s for axis, s in axes_of_y)
    return start, [axis.write_step * s for axis, s in axes_of_y]


def taps_of(spec: ConvSpec, axes: list[Axis], apart: int) -> tuple[int, list[int]]:
    """The offset of a launch's first tap in kernels whose positions lie ``apart``, and strides."""
    kernel = pad(spec.partition.kernel, 1)
    per_axis = [(axis, apart * math.prod(kernel[i + 1 :])) for i, axis in enumerate(axes)]
    return sum(axis.first * s for axis, s in per_axis), [axis.every * s for axis, s in per_axis]


def positions_of(axes: list[Axis]) -> list[int]:
    """The kernels' arguments from ``count_0`` to ``hop_2``."""
    columns = ("count", "size", "step", "start", "hop")
    return [getattr(axis, name) for name in columns for axis in axes]


def arithmetic(x: Tensor) -> dict[str, Any]:
    """The type of products; sums are always in float32."""
    kernels = kernel_module()
    # The interpreter multiplies bfloat16 as if its bits were integers.
    dtype = torch.float32 if interpreted() else x.dtype
    # Triton for AMD's GPUs refuses the word TF32, on some of them for 16 bit as well.
    rounds = x.dtype == torch.float32 and allows_tf32("cuda") and not (interpreted() or is_amd())
    return {
        "DOT": getattr(kernels.tl, str(dtype).removeprefix("torch.")),
        "PRECISION": "tf32" if rounds else "ieee",
    }


def compiler_options(tiles: Tiles) -> dict[str, int]:
    """Warps and stages for Triton's compiler; on AMD's GPUs, which have 64 KB of shared memory, two
    stages."""
    return {**tiles.options, "num_stages": 2} if is_amd() else tiles.options


def is_amd() -> bool:
    """Whether this is torch for AMD's GPUs."""
    return torch.version.hip is not None
