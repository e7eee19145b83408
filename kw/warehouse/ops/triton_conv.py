"""The Triton back end: in chunks, one matrix product assembles, Triton kernels convolve.

Legend: B samples, m mixtures, n cells, S, GO, GI blocks along space, output and input channels,
ck kernel positions inside of a cell, O, I channels, P positions, rows output channels of a cell.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from . import triton_launch as launch
from .assembly import GPU_SCRATCH, even_chunks
from .contraction import Contraction, Cost, Gradients, Needs, Problem
from .layout import channels_last, empty
from .matmul import float32_matmul, matmul
from .precision import allows_tf32
from .spec import ConvSpec
from .triton_launch import Chunk
from .triton_tiles import tiles_of_convolution

LEAST_ROWS = 16
"""Fewest rows of a chunk (the narrowest tile of channels); below it, samples are divided."""

_OFFSETS = 1 << 31
"""Offsets within a sample and its kernel have 32 bits in the kernels; those of samples have 64."""

_TAPS = 32
"""Positions of a kernel along an axis: those that meet the input are bits of one number."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class TritonConv(Contraction):
    """Assemble with one library matrix product, convolve with kernels that read its result.

    Work is cut into chunks of rows of a cell, all samples at once: a slice of the cells' columns,
    so that the cells are read once however many chunks there are and nothing is copied to slice
    them. Only when that does not suffice are samples divided too. The backward pass goes through
    the same chunks: it assembles one, takes the input's gradient through it, overwrites it with
    the kernels' gradient and contracts that with cells and coefficients.

    Bytes beyond activations: the forward pass writes and reads every sample's kernel once; the
    backward pass twice, and reads the second, its gradient, once more. None of it is kept.

    Args:
        scratch: bytes of assembled kernels at a time.
    """

    name: ClassVar[str] = "triton"

    def __init__(self, scratch: int = GPU_SCRATCH) -> None:
        self.scratch = scratch

    def refusal(self, problem: Problem) -> str | None:
        if problem.spec.groups > 1:
            return f"does ungrouped convolutions only, not {problem.spec.groups} groups"
        return refusal_of_kernels(problem)

    def needs_trial(self, problem: Problem) -> bool:
        return problem.device == "cuda"  # elsewhere they are interpreted

    def _forward(self, x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
        x = _readable(x, spec)
        last = not x.is_contiguous()
        y = empty(x, spec.out_channels, spec.output_size(x.shape[2:]), last)
        columns = columns_of(cells, spec)
        by_sample, by_row = self._chunks(spec, len(x), _itemsize(x, cells))
        with torch.cuda.device_of(x):
            for samples in by_sample:
                mixing = _mixing(alpha[samples], cells.dtype)
                for rows in by_row:
                    blocks = matmul(mixing.t(), columns[:, _span(rows, columns, spec)])
                    chunk = Chunk(blocks.to(x.dtype), spec, rows)  # [b * m, rows * ck * c_in]
                    launch.convolve(chunk, x[samples], y[samples])
                    del blocks, chunk  # before the next is made
        return y

    def _backward(
        self, grad: Tensor, x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec, needs: Needs
    ) -> Gradients:
        need_x, need_alpha, need_cells = needs
        x, grad = _readable(x, spec), _readable(grad, spec)
        columns = columns_of(cells, spec)
        by_sample, by_row = self._chunks(spec, len(x), _itemsize(x, cells))
        # Chunks of rows each add what their output channels give to the input.
        add = len(by_row) > 1
        dx = dcolumns = None
        if need_x:
            kind = torch.float32 if add else x.dtype
            dx = empty(x, x.shape[1], x.shape[2:], not x.is_contiguous(), kind)
            if add or not launch.reaches_all(spec, tuple(x.shape[2:])):
                dx.zero_()
        if need_cells:
            kind = torch.float32 if len(by_sample) > 1 else cells.dtype
            dcolumns = torch.empty_like(columns, dtype=kind)
        dalpha = torch.zeros_like(alpha, dtype=torch.float32) if need_alpha else None
        with torch.cuda.device_of(x):
            for samples in by_sample:
                mixing = _mixing(alpha[samples], cells.dtype)
                for rows in by_row:
                    span = _span(rows, columns, spec)
                    if dx is not None:
                        blocks = matmul(mixing.t(), columns[:, span]).to(x.dtype)
                        chunk = Chunk(blocks, spec, rows)  # [b * m, rows * ck * c_in]
                        launch.convolve_transposed(chunk, grad[samples], dx[samples], add)
                    else:
                        shape = (mixing.shape[1], span.stop - span.start)
                        chunk = Chunk(x.new_empty(shape), spec, rows)
                    if dalpha is not None or dcolumns is not None:
                        launch.kernel_gradient(chunk, grad[samples], x[samples])
                        dw = chunk.blocks.to(cells.dtype)
                        if dalpha is not None:
                            part = float32_matmul(columns[:, span], dw.t())  # [n, b * m]
                            dalpha[samples] += part.t().view_as(dalpha[samples])
                        if dcolumns is not None:
                            _put(dcolumns[:, span], mixing, dw, add=samples.start > 0)
                        del dw
                    del chunk  # before the next is made
        return (
            None if dx is None else dx.to(x.dtype),
            None if dalpha is None else dalpha.to(alpha.dtype),
            None if dcolumns is None else _cells(dcolumns.to(cells.dtype), spec),
        )

    def cost(self, problem: Problem) -> Cost:
        conv, kernels, activations, moved, cells = self._sizes(problem)
        chunks = self._chunk_count(problem)
        # Taps find the input in the caches, whose traffic is not counted here.
        part = Cost(
            dense_macs=problem.assembly_macs + conv,
            bytes=kernels * (moved + problem.itemsize) + activations + cells,
            launches=2 * chunks,
        )
        cost = part
        if problem.training:
            residues = math.prod(problem.spec.stride)
            cost += replace(part, launches=(1 + residues) * chunks)  # the input's gradient
            cost += self.cost_of_kernel_gradients(problem)
        if problem.dtype is torch.float32 and not allows_tf32("cuda"):
            # Without tensor cores Triton's products are far slower than the libraries'.
            products = (3 if problem.training else 1) * conv
            cost = replace(cost, dense_macs=cost.dense_macs - products, slow_macs=products)
        if problem.device == "cpu":  # interpreted: correct, but thousands of times slower
            return Cost(slow_macs=1000 * (cost.dense_macs + cost.slow_macs))
        return cost

    def cost_of_kernel_gradients(self, problem: Problem) -> Cost:
        """Of the gradients of coefficients and cells, which go through those of the kernels."""
        conv, kernels, activations, moved, cells = self._sizes(problem)
        return Cost(
            dense_macs=2 * problem.assembly_macs + conv,
            bytes=kernels * (2 * moved + problem.itemsize) + activations + 2 * cells,
            launches=5 * self._chunk_count(problem) + 4,
        )

    def _sizes(self, problem: Problem) -> tuple[float, float, float, float, float]:
        """Multiply-adds of a convolution, values of all kernels, bytes of activations, bytes per
        value of a kernel that a product writes or reads, bytes of the cells."""
        out, inner = problem.spec.partition.kernel_shape[:2]
        tiles = tiles_of_convolution(problem.batch, problem.positions, out, inner, problem.itemsize)
        rounded = -(-problem.positions // tiles.rows) * tiles.rows
        kernels = problem.batch * problem.kernel_numel
        activations = problem.batch * (problem.input_numel + problem.output_numel)
        mixed = problem.cells_dtype or problem.dtype
        # What rounding float32 kernels reads and writes counts with every product.
        moved = problem.itemsize + (2 * mixed.itemsize if mixed != problem.dtype else 0)
        return (
            kernels * rounded,
            kernels,
            activations * problem.itemsize,
            moved,
            problem.cells_numel * mixed.itemsize,
        )

    def _chunk_count(self, problem: Problem) -> int:
        mixed = problem.cells_dtype or problem.dtype
        size = problem.itemsize + (mixed.itemsize if mixed != problem.dtype else 0)
        return math.prod(map(len, self._chunks(problem.spec, problem.batch, size)))

    def _chunks(self, spec: ConvSpec, batch: int, itemsize: int) -> tuple[list[slice], list[slice]]:
        """Samples, and rows of a cell, such that the kernels of each pair fit into the scratch."""
        part = spec.partition
        row = math.prod(part.kernel_shape) * itemsize // part.cell_out  # in every block
        least = min(LEAST_ROWS, part.cell_out)
        samples = max(min(self.scratch // (row * least), batch), 1)
        rows = part.cell_out
        while rows > least and rows * row * samples > self.scratch:
            rows = -(-rows // 2)
        return even_chunks(batch, samples), even_chunks(part.cell_out, rows)


def refusal_of_kernels(problem: Problem) -> str | None:
    """Reason why Triton kernels do not support a problem, whatever its groups; ``None`` if they
    do."""
    if problem.device != "cuda" and not launch.interpreted():
        return f"runs on CUDA devices, not on {problem.device!r}"
    if problem.dtype not in _DTYPES:
        known = ", ".join(str(t).removeprefix("torch.") for t in _DTYPES)
        return f"computes in {known}, not {str(problem.dtype).removeprefix('torch.')}"
    if len(problem.size) > launch.AXES:
        return f"does up to {launch.AXES} spatial axes, not {len(problem.size)}"
    if (taps := max(problem.spec.partition.kernel)) > _TAPS:
        return f"does kernels of up to {_TAPS} positions along an axis, not of {taps}"
    if max(problem.input_numel, problem.output_numel, problem.kernel_numel) >= _OFFSETS:
        return "does samples and kernels of fewer than 2^31 values"
    if problem.device == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            return f"needs a device of compute capability 8.0, not {major}.{minor}"
    found = launch.kernel_module()
    return found if isinstance(found, str) else None


def _span(rows: slice, columns: Tensor, spec: ConvSpec) -> slice:
    """The columns that hold those rows of the cells."""
    width = columns.shape[1] // spec.partition.cell_out
    return slice(rows.start * width, rows.stop * width)


def _mixing(alpha: Tensor, dtype: torch.dtype) -> Tensor:
    """Coefficients ``[n, b * m]``.

    Lying this way every matrix product has sides that libraries can load in whole vectors; the
    number of cells, such as 27 or 108, would otherwise be the length of rows.
    """
    return alpha.flatten(0, 1).t().to(dtype).contiguous()


def _put(total: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """``total = a @ b``, or added to what is there."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=int(add))  # 0: the old values are not read
    elif add:
        total += matmul(a, b)
    else:
        total.copy_(matmul(a, b))


def columns_of(cells: Tensor, spec: ConvSpec) -> Tensor:
    """Cells with input channels innermost, ``[n, c_out * ck * c_in]``.

    Whole cells are permuted, once for all samples, so that assembled kernels need not be.
    """
    part = spec.partition
    inside = math.prod(part.cell_kernel)
    cells = cells.contiguous()
    if inside == 1:
        return cells
    return cells.view(len(cells), part.cell_out, part.cell_in, inside).transpose(2, 3).flatten(1)


def _cells(columns: Tensor, spec: ConvSpec) -> Tensor:
    """The inverse of :func:`columns_of`."""
    part = spec.partition
    inside = math.prod(part.cell_kernel)
    if inside == 1:
        return columns
    columns = columns.view(len(columns), part.cell_out, inside, part.cell_in)
    return columns.transpose(2, 3).flatten(1)


def _itemsize(x: Tensor, cells: Tensor) -> int:
    """Bytes of scratch for a value of a kernel, which may be mixed in float32 and then rounded."""
    return x.itemsize + (cells.itemsize if cells.dtype != x.dtype else 0)


def _readable(x: Tensor, spec: ConvSpec) -> Tensor:
    """``x`` channels last, or contiguous where that is read as fast.

    It is where positions are read as they lie and rows of them begin aligned. Otherwise every value
    is read once per tap and alone: bringing channels together costs less than that.
    """
    if x.movedim(1, -1).is_contiguous():
        return x
    if x.is_contiguous() and launch.is_plain(spec) and x[0, 0].numel() % 16 == 0:
        return x
    return channels_last(x)
