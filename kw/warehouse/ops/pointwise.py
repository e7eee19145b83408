"""Pointwise layers as batched matrix products: of whole kernels, or of blocks where they lie.

Cells that are cut along input channels leave a kernel's rows in pieces. The matrix of one output
block is whole if the cells are transposed before they are mixed, ``[(GI, c_in), c_out]``; that of
one input block if input blocks are outermost among the mixtures, ``[(GO, c_out), c_in]``. Products
with them copy no kernel, and read the activations once a block.

Legend: B samples, b of a chunk, n cells, m mixtures, GO, GI blocks along output and input channels,
c_out, c_in channels of a cell, O, I channels, P positions, g groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .layout import empty, laid_out
from .matmul import batch_matmul
from .spec import ConvSpec

_ALWAYS_COPY = ("cpu",)
"""Device types whose products of parts of a kernel take longer than copying it does: on two AVX-512
cores up to 1.7 times."""
_CALL = 1 << 23
"""Values that a GPU reads from memory in the time of a call: 4 us, 16 MB."""


def is_direct(spec: ConvSpec) -> bool:
    """Whether inputs, but for those that a stride leaves out, and outputs are used as they lie."""
    return spec.is_pointwise and not any(spec.padding)


def lie(
    spec: ConvSpec, batch: int, cells: int, size: Sequence[int], device: str
) -> tuple[bool, bool]:
    """Whether blocks that are cut along input channels are multiplied where they lie, forward and
    backward: where reading the activations once a block, transposing the cells and calling a
    product for each block take less than copying the kernels."""
    part = spec.partition
    _, out_blocks, in_blocks = part.grid
    if device in _ALWAYS_COPY or not is_direct(spec) or spec.groups > 1 or in_blocks == 1:
        return False, False
    out, in_ = part.kernel_shape[:2]
    positions = math.prod(spec.output_size(size))
    spared = 2 * batch * out * in_
    forward = (out_blocks - 1) * (batch * positions * in_ + _CALL)
    forward += 2 * cells * part.cell_out * part.cell_in
    return forward < spared, (in_blocks - 1) * (batch * positions * out + _CALL) < spared


def transposed(cells: Tensor, spec: ConvSpec) -> Tensor:
    """Cells of a pointwise layer with output channels innermost, ``[n, c_in, c_out]``."""
    part = spec.partition
    return cells.unflatten(1, (part.cell_out, part.cell_in)).transpose(1, 2).contiguous()


def without_stride(x: Tensor, spec: ConvSpec) -> tuple[Tensor, ConvSpec]:
    """A pointwise layer without the positions that its stride leaves out, and its stride."""
    if not is_direct(spec) or spec.has_no_stride:
        return x, spec
    some = laid_out(x[_every(spec.stride)], x.stride(1) == 1)
    return some, replace(spec, stride=(1,) * len(spec.stride))


def with_stride(some: Tensor, size: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """Undoes :func:`without_stride` for the gradient."""
    x = empty(some, some.shape[1], size, some.stride(1) == 1).zero_()
    x[_every(stride)] = some
    return x


def _every(stride: tuple[int, ...]) -> tuple[slice, ...]:
    return slice(None), slice(None), *(slice(None, None, step) for step in stride)


def gradient_of_slices(grad: Tensor, x: Tensor, spec: ConvSpec) -> Tensor:
    """Gradient ``[b, (GI, GO), cell]`` of the blocks that lie with input blocks outermost."""
    part = spec.partition
    blocks = x.new_empty(len(x), part.grid[2], grad.shape[1], part.cell_in)
    for i, inputs in enumerate(x.flatten(2).split(part.cell_in, 1)):
        batch_matmul(grad.flatten(2), inputs.mT, blocks[:, i])
    return blocks.view(len(x), part.mixtures, -1)


def pointwise_slices(x: Tensor, matrices: Tensor, spec: ConvSpec) -> Tensor:
    """``matrices [b, slices, I, O / slices]``, transposed, times every position of ``x``."""
    slices, width = matrices.shape[1], matrices.shape[3]
    y = empty(x, slices * width, x.shape[2:], x.stride(1) == 1)
    for i, part in enumerate(y.split(width, 1)):
        pointwise(x, matrices[:, i].mT, spec, part)
    return y


def pointwise(x: Tensor, matrices: Tensor, spec: ConvSpec, out: Tensor | None = None) -> Tensor:
    """``matrices [b, O, I]`` times every position of ``x [samples, g I, *size]``, written to some
    channels ``out`` of a tensor laid out as ``x``, if it is given."""
    size = x.shape[2:]
    if x.dim() > 2 and x.stride(1) == 1 and spec.groups == 1:  # channels last
        rows = x.movedim(1, -1).reshape(len(x), -1, x.shape[1])
        into = None if out is None else out.movedim(1, -1).view(len(x), -1, out.shape[1])
        y = batch_matmul(rows, matrices.mT, into)  # [b, P, O]
        return y.view(len(x), *size, -1).movedim(-1, 1) if out is None else out
    columns = x.reshape(len(matrices), matrices.shape[2], -1)  # [b, I, P]
    into = None if out is None else out.view(*out.shape[:2], -1)
    y = batch_matmul(matrices, columns, into)
    return y.view(len(x), -1, *size) if out is None else out
