"""Every sample's kernel, assembled, and batched matrix products: one matrix a kernel position.

The matrices are stored in the order of the blocks, so the assembled kernels are used without a copy
(unless cells are cut along input channels, span space, or the layer is grouped). Blocks of a
pointwise layer that is cut along input channels are multiplied where they lie: forward the matrix
of each output block, assembled from transposed cells; backward the matrix of each input block,
assembled with input blocks outermost (:mod:`.pointwise`).

- Stride 1: every matrix is multiplied with the whole input, in one product a sample; the products
  are then shifted and summed. No unfolding; the input is read once.
- Other strides: every matrix is multiplied with the positions that its tap reads.

Legend: B samples, b of a chunk times g groups, K taps (kernel positions), O, I channels of a group,
Q input and P output positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from .assembly import (
    BlockGradients,
    even_chunks,
    join,
    mix,
    sample_chunks,
    scratch_bytes,
    to_blocks,
    to_taps,
)
from .contraction import Contraction, Cost, Gradients, Needs, Problem
from .layout import empty
from .library import RELAYOUT_MACS
from .matmul import batch_matmul
from .pointwise import (
    gradient_of_slices,
    is_direct,
    lie,
    pointwise,
    pointwise_slices,
    transposed,
    with_stride,
    without_stride,
)
from .spec import ConvSpec
from .windows import fold, gather, scatter, unfold

LEAST_ROWS = 32


def conv_bmm(x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
    """The convolution as one batched matrix product, of ordinary differentiable operations.

    Traced and exported with any number of samples and any size, and differentiated any number of
    times. Every other back end is faster or takes less memory. Columns are in the order of
    the blocks, so that assembled kernels are copied once, by rows of cells, or not at all.
    """
    part, groups = spec.partition, spec.groups
    taps, size = unfold_taps(x, spec)  # [B, g I, K, P]
    kernels = (alpha.to(cells.dtype) @ cells).to(x.dtype).unflatten(2, (part.cell_out, -1))
    # Runtimes copy where a permutation moves nothing, and count every change of shape.
    if groups > 1:
        taps = taps.unflatten(1, (groups, -1))
    if part.grid[0] > 1:  # else there is one tap, or the cell spans space and taps come last in it
        taps = taps.transpose(-3, -2)
    if part.grid[0] * part.grid[2] > 1:
        grid = kernels.unflatten(1, part.grid)  # [B, S, GO, GI, c_out, c_in ck]
        kernels = grid.permute(0, 2, 4, 1, 3, 5).flatten(3)
    kernels = kernels.flatten(1, 2)  # [B, g O, I K]
    if groups > 1:
        kernels = kernels.unflatten(1, (groups, -1))
    y = kernels @ taps.flatten(-3, -2)  # [B, O, P] or [B, g, O, P]
    return to_space(y.flatten(1, -2), spec, size)  # [B, g O, *output size]


def to_space(y: Tensor, spec: ConvSpec, size: torch.Size) -> Tensor:
    """``[B, O, P]`` -> ``[B, O, *size]``. ``torch.jit.trace`` fixes sizes that unflatten gets."""
    tracing = torch.jit.is_tracing()
    return y.reshape(-1, spec.out_channels, *size) if tracing else y.unflatten(2, size)


def unfold_taps(x: Tensor, spec: ConvSpec) -> tuple[Tensor, torch.Size]:
    """The input positions of every tap, for every channel: ``[B, C, K, P]``, and the output's size.

    By a depthwise convolution with one-hot kernels: exact, one operator, and the size is that of
    any convolution. Slices would compare sizes at every tap, over which tracing takes minutes.
    """
    channels, taps = spec.in_channels, math.prod(spec.partition.kernel)
    if spec.is_pointwise and not any(spec.padding) and spec.has_no_stride:
        return x.flatten(2).unsqueeze(2), x.shape[2:]
    one_hot = torch.eye(taps, dtype=x.dtype, device=x.device)
    one_hot = one_hot.repeat(channels, 1).view(-1, 1, *spec.partition.kernel)
    y = spec.conv(x, one_hot, channels)
    return y.unflatten(1, (channels, taps)).flatten(3), y.shape[2:]


class Bmm(Contraction):
    """Assemble, then one matrix product a sample, or a sample and tap when strided."""

    name = "bmm"
    efficiency: ClassVar[dict[str, float]] = {"cpu": 0.6, "cuda": 0.7}

    def refusal(self, problem: Problem) -> str | None:
        return None

    def _forward(self, x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
        parts = []
        x, spec = without_stride(x, spec)
        lies, _ = lie(spec, len(x), len(cells), x.shape[2:], x.device.type)
        across = transposed(cells, spec) if lies else cells
        for samples, rows in _chunks(x, cells, spec, training=False):
            some, values = _take_rows(spec, rows)
            if lies:
                # [b, (GO, GI), (c_in, c_out)]
                blocks = mix(alpha[samples], across[:, :, rows].flatten(1), x.dtype)
                matrices = blocks.view(len(blocks), spec.partition.grid[1], x.shape[1], -1)
                part = pointwise_slices(x[samples], matrices, some)
            else:
                taps = _group_taps(mix(alpha[samples], cells[:, values], x.dtype), some)
                part = _forward(x[samples], taps, some)
                del taps
            if rows == slice(0, spec.partition.cell_out):
                parts.append(part)
                continue
            if not parts or rows.start == 0:
                size, last = part.shape[2:], part.stride(1) == 1
                parts.append(empty(part, spec.out_channels, size, last))
            _output_rows(parts[-1], rows, spec).copy_(_output_rows(part, slice(None), some))
        return join(parts)

    def _backward(
        self, grad: Tensor, x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec, needs: Needs
    ) -> Gradients:
        wide = torch.promote_types(x.dtype, torch.float32)
        parts: list[Tensor] = []
        size, stride = x.shape[2:], spec.stride
        x, spec = without_stride(x, spec)
        _, lies = lie(spec, len(x), len(cells), x.shape[2:], x.device.type)
        grid = spec.partition.grid
        if lies:
            alpha = alpha.unflatten(1, grid[1:]).transpose(1, 2).flatten(1, 2)  # [B, (GI, GO), n]
        gradients = BlockGradients(alpha, cells, needs)
        for samples, rows in _chunks(x, cells, spec, training=True):
            some, values = _take_rows(spec, rows)
            part = _output_rows(grad[samples], rows, spec).flatten(1, 2)
            if needs[0]:
                blocks = mix(alpha[samples], cells[:, values], x.dtype)
                if lies:
                    matrices = blocks.view(len(blocks), grid[2], part.shape[1], -1)
                    into = pointwise_slices(part, matrices, some)  # [b, GI, O, c_in]
                    del matrices
                else:
                    into = _backward_input(part, _group_taps(blocks, some), some, x.shape[2:])
                del blocks
                if rows.start == 0:
                    whole = rows.stop == spec.partition.cell_out
                    parts.append(into if whole else into.to(wide))
                else:
                    parts[-1] += into
            if needs[1] or needs[2]:
                if lies:
                    found = gradient_of_slices(part, x[samples], some)
                else:
                    found = _ungroup_taps(_backward_taps(part, x[samples], some), some)
                gradients.add(found, samples, values)
        into_x = join(parts).to(x.dtype) if needs[0] else None
        if into_x is not None and spec.stride != stride:
            into_x = with_stride(into_x, size, stride)
        into_alpha = gradients.alpha
        if into_alpha is not None and lies:
            into_alpha = into_alpha.unflatten(1, (grid[2], -1)).transpose(1, 2).flatten(1, 2)
        return into_x, into_alpha, gradients.cells

    def cost(self, problem: Problem) -> Cost:
        spec, each = problem.spec, problem.kernel_numel
        folded = spec.has_no_stride and not spec.is_pointwise
        passes = 3 if problem.training else 1  # y; dX and dW
        products = 4 if problem.training else 1  # the kernels twice, d alpha, d cells
        scratch = _scratch(spec, problem.size, problem.training)
        chunks = math.ceil(
            problem.batch * scratch * problem.itemsize / scratch_bytes(problem.device)
        )
        macs = problem.conv_macs
        if folded:
            macs = macs * math.prod(problem.size) // problem.positions
        # A product writes or reads the blocks, and each of the convolution's reads or writes them;
        # the taps' inputs or outputs are written and read once a pass.
        moved, read, parts, across = self._kernels(problem)
        taps = (scratch - each * (1 if _in_place(spec) else 2)) // (2 if problem.training else 1)
        values = (products + passes) * each + 2 * moved + read
        values += passes * (problem.input_numel + problem.output_numel)
        values += 2 * passes * taps
        calls = parts if problem.device != "cpu" else passes * problem.batch / chunks
        if not folded and not spec.is_pointwise:
            calls *= math.prod(spec.partition.kernel) if problem.device == "cpu" else 1
        copies = 0 if spec.is_pointwise else passes * math.prod(spec.partition.kernel)
        cells = (products * chunks + 2 * across) * problem.cells_numel
        return Cost(
            dense_macs=passes * macs + products * problem.assembly_macs,
            slow_macs=RELAYOUT_MACS * problem.batch * (moved + passes * taps),
            bytes=problem.itemsize * (problem.batch * values + cells),
            launches=chunks * (products + calls + copies + 2) + across,
        )

    def _kernels(self, problem: Problem) -> tuple[int, int, int, bool]:
        """Of a sample: values of its kernel that are copied, values of activations that are read
        again, products; whether cells are transposed."""
        spec, each = problem.spec, problem.kernel_numel
        _, out_blocks, in_blocks = spec.partition.grid
        forward, backward = lie(spec, problem.batch, problem.cells, problem.size, problem.device)
        moved = 0 if forward or _in_place(spec) else each
        read = (out_blocks - 1) * spec.in_channels * problem.positions if forward else 0
        products = out_blocks if forward else 1
        if problem.training:
            moved += 0 if backward or _in_place(spec) else 2 * each
            read += 2 * (in_blocks - 1) * problem.output_numel if backward else 0
            products += 2 * (in_blocks if backward else 1)
        return moved, read, products, forward


def _chunks(
    x: Tensor, cells: Tensor, spec: ConvSpec, training: bool
) -> Iterator[tuple[slice, slice]]:
    """Samples and rows (output channels of a cell) to work on at a time.

    Every chunk of samples reads all cells, every chunk of rows all inputs; the smaller of the two
    is read repeatedly. Products with fewer rows than a vector register holds are inefficient.
    """
    scratch = _scratch(spec, x.shape[2:], training)
    part, batch = spec.partition, len(x)
    out_per_group = part.kernel_shape[0] // spec.groups
    rows = part.cell_out
    if cells.numel() > x.numel() and out_per_group % part.cell_out == 0:
        most = scratch_bytes(x.device.type) // (scratch * batch * x.element_size() // rows + 1)
        least = -(-LEAST_ROWS // part.grid[1])
        rows = min(max(most, least), rows)
    for samples in sample_chunks(batch, scratch * rows // part.cell_out, x):
        for some in even_chunks(part.cell_out, rows):
            yield samples, some


def _take_rows(spec: ConvSpec, rows: slice) -> tuple[ConvSpec, slice]:
    """The layer with these rows of every cell only, and the values of a cell that they are."""
    part, count = spec.partition, rows.stop - rows.start
    if count == part.cell_out:
        return spec, slice(None)
    each = part.cell_in * math.prod(part.cell_kernel)
    values = slice(rows.start * each, rows.stop * each)
    return replace(spec, partition=replace(part, cell_out=count)), values


def _output_rows(y: Tensor, rows: slice, spec: ConvSpec) -> Tensor:
    """``[b, O, *size]`` -> the output channels ``[b, GO, rows, *size]``, a view."""
    return y.unflatten(1, (spec.partition.grid[1], -1))[:, :, rows]


def _in_place(spec: ConvSpec) -> bool:
    part = spec.partition
    return part.grid[2] == 1 and spec.groups == 1 and math.prod(part.cell_kernel) == 1


def _scratch(spec: ConvSpec, size: Sequence[int], training: bool) -> int:
    """Scratch values of a sample: its kernel, and every tap's outputs (stride 1) or inputs."""
    out, in_, *kernel = spec.partition.kernel_shape
    kernel_numel = out * in_ * math.prod(kernel)
    if is_direct(spec):  # its inputs without those that a stride leaves out
        taps = 0 if spec.has_no_stride else math.prod(spec.output_size(size)) * in_ * spec.groups
    elif spec.has_no_stride:
        taps = math.prod(size) * math.prod(kernel) * out
    else:
        taps = math.prod(spec.output_size(size)) * math.prod(kernel) * max(out, in_ * spec.groups)
    return kernel_numel * (1 if _in_place(spec) else 2) + taps * (2 if training else 1)


def _group_taps(blocks: Tensor, spec: ConvSpec) -> Tensor:
    """Blocks as matrices ``[b, K, O, I]``, a group being a sample of its own."""
    taps = to_taps(blocks, spec.partition)
    if spec.groups == 1:
        return taps
    # [samples, K, g, O, I] -> [samples, g, K, O, I]
    return taps.unflatten(2, (spec.groups, -1)).transpose(1, 2).flatten(0, 1)


def _ungroup_taps(taps: Tensor, spec: ConvSpec) -> Tensor:
    """Undoes :func:`_group_taps`."""
    if spec.groups > 1:
        taps = taps.unflatten(0, (-1, spec.groups)).transpose(1, 2).flatten(2, 3)
    return to_blocks(taps, spec.partition)


def _rows(x: Tensor, spec: ConvSpec) -> Tensor:
    """``[samples, g C, *size]`` with channels last and groups as samples: ``[b, *size, C]``."""
    rows = x.movedim(1, -1)
    if spec.groups == 1:
        return rows
    return rows.unflatten(-1, (spec.groups, -1)).movedim(-2, 1).flatten(0, 1)


def _from_rows(rows: Tensor, spec: ConvSpec) -> Tensor:
    """Undoes :func:`_rows`; channels stay last in memory if there are no groups."""
    if spec.groups > 1:
        rows = rows.unflatten(0, (-1, spec.groups)).movedim(1, -2).flatten(-2)
    return rows.movedim(-1, 1)


def _forward(x: Tensor, taps: Tensor, spec: ConvSpec) -> Tensor:
    size = x.shape[2:]
    if is_direct(spec):
        return pointwise(x, taps[:, 0], spec)
    _, count, out, in_ = taps.shape
    rows = _rows(x, spec)
    if spec.has_no_stride:
        rows = rows.reshape(len(rows), -1, in_)  # [b, Q, I]
        products = batch_matmul(rows, taps.reshape(len(taps), -1, in_).mT)  # [b, Q, K O]
        y = fold(products.view(len(rows), *size, count, out), spec, size)
    else:
        windows = gather(rows, spec, size).view(len(rows) * count, -1, in_)  # [b K, P, I]
        products = batch_matmul(windows, taps.flatten(0, 1).mT)  # [b K, P, O]
        y = products.view(len(rows), count, -1, out)
        y = (y.sum(1) if count > 1 else y[:, 0]).view(len(rows), *spec.output_size(size), out)
    return _from_rows(y, spec)


def _backward_input(grad: Tensor, taps: Tensor, spec: ConvSpec, size: Sequence[int]) -> Tensor:
    if is_direct(spec):
        return pointwise(grad, taps[:, 0].mT, spec)
    _, count, out, in_ = taps.shape
    rows = _rows(grad, spec)
    if spec.has_no_stride:
        spread = unfold(rows, spec, size).view(len(rows), -1, count * out)  # [b, Q, K O]
        into = batch_matmul(spread, taps.reshape(len(taps), -1, in_))  # [b, Q, I]
        return _from_rows(into.view(len(rows), *size, in_), spec)
    rows = rows.reshape(len(rows), 1, -1, out).expand(-1, count, -1, -1).flatten(0, 1)
    into = batch_matmul(rows, taps.flatten(0, 1))  # [b K, P, I]
    into = into.view(-1, count, *spec.output_size(size), in_)
    return _from_rows(scatter(into, spec, size), spec)


def _backward_taps(grad: Tensor, x: Tensor, spec: ConvSpec) -> Tensor:
    """Gradient ``[b, K, O, I]`` of the matrices."""
    size, count = x.shape[2:], math.prod(spec.partition.kernel)
    rows, into = _rows(x, spec), _rows(grad, spec)
    in_, out = rows.shape[-1], into.shape[-1]
    if is_direct(spec):
        rows, into = (t.movedim(-1, 1).flatten(2) for t in (rows, into))  # [b, C, P]
        return batch_matmul(into, rows.mT).unsqueeze(1)
    if spec.has_no_stride:
        spread = unfold(into, spec, size).view(len(into), -1, count * out)  # [b, Q, K O]
        taps = batch_matmul(spread.mT, rows.reshape(len(rows), -1, in_))  # [b, K O, I]
        return taps.view(-1, count, out, in_)
    windows = gather(rows, spec, size).view(len(rows) * count, -1, in_)  # [b K, P, I]
    into = into.reshape(len(into), 1, -1, out).expand(-1, count, -1, -1).flatten(0, 1)
    return batch_matmul(into.mT, windows).view(-1, count, out, in_)
