"""Mix the inputs instead of the kernels: one dense product with cells that all samples share.

The convolution is linear in input and kernel alike, so the sum over cells can be taken last::

    Z[b, go, j] = sum over s, gi of alpha[b, (s, go, gi), j] * shift_s(x[b, gi])
    y[b, go]    = sum over j of E_j Z[b, go, j]

No kernel is assembled. It is less work where a sample's kernel is more than n / m times as large as
its input (late stages, small images, finely cut kernels), and always one large product instead of
many small ones. A cell that spans space is a kernel: inputs are mixed without shifting, and the
dense product is an ordinary convolution.

Legend: B samples, b of a chunk times g groups, n cells, j of a chunk, GO, GI blocks along output
and input channels of a group, c_out, c_in channels of a cell, K taps, P output positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from .assembly import even_chunks, join, scratch_bytes
from .contraction import Contraction, Cost, Gradients, Needs, Problem
from .library import conv_backward
from .matmul import batch_matmul, matmul
from .spec import ConvSpec
from .windows import gather, scatter, wide


class MixInputs(Contraction):
    """Mix shifted inputs by small products, then one product with the cells, some at a time."""

    name = "mix_inputs"
    efficiency: ClassVar[dict[str, float]] = {"cpu": 0.45}

    def refusal(self, problem: Problem) -> str | None:
        part, groups = problem.spec.partition, problem.spec.groups
        per_group = part.kernel_shape[0] // groups
        if per_group % part.cell_out == 0:
            return None
        return (
            f"needs cells within a group: {part.cell_out} output channels of a cell do not divide "
            f"the {per_group} of each of the {groups} groups"
        )

    def _forward(self, x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
        parts = []
        for samples, chunks in _chunks(x, cells, spec):
            inputs = _inputs(x[samples], spec).to(cells.dtype)  # [b, (GI, K), (P, c_in)]
            mixing = _mixing(alpha[samples], spec).to(cells.dtype)  # [b, GO, n, (GI, K)]
            total: Tensor | None = None
            for some in chunks:
                mixed = _mix(mixing[:, :, some], inputs, x, spec)
                y = _apply(mixed, cells[some].to(x.dtype), spec)
                if total is not None:
                    total += y
                else:
                    total = y if len(chunks) == 1 else y.to(wide(y))
            assert total is not None
            parts.append(_output(total.to(x.dtype), x.shape[2:], spec))
        return join(parts)

    def _backward(
        self, grad: Tensor, x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec, needs: Needs
    ) -> Gradients:
        summed = wide(cells)
        into_cells = torch.zeros_like(cells, dtype=summed) if needs[2] else None
        into_x, into_alpha = [], []
        for samples, chunks in _chunks(x, cells, spec):
            inputs = _inputs(x[samples], spec).to(cells.dtype)
            mixing = _mixing(alpha[samples], spec).to(cells.dtype)
            into_inputs = torch.zeros_like(inputs, dtype=summed) if needs[0] else None
            into_mixing = torch.empty_like(mixing) if needs[1] else None
            part = _output_grad(grad[samples], spec)
            for some in chunks:
                coefficients = mixing[:, :, some].flatten(1, 2)  # [b, (GO, j), (GI, K)]
                mixed = _mix(mixing[:, :, some], inputs, x, spec) if needs[2] else None
                into_mixed, into_some = _apply_backward(
                    part, mixed, cells[some].to(x.dtype), spec, x, needs
                )
                if into_cells is not None and into_some is not None:
                    into_cells[some] += into_some
                if into_mixed is None:
                    continue
                into_mixed = into_mixed.to(cells.dtype)  # [b, (GO, j), (P, c_in)]
                if into_inputs is not None:
                    into_inputs += batch_matmul(coefficients.mT, into_mixed)
                if into_mixing is not None:
                    product = batch_matmul(into_mixed, inputs.mT)  # [b, (GO, j), (GI, K)]
                    into_mixing[:, :, some] = product.unflatten(1, (mixing.shape[1], -1))
            if into_inputs is not None:
                into_x.append(_inputs_grad(into_inputs, x[samples], spec))
            if into_mixing is not None:
                into_alpha.append(_mixing_grad(into_mixing, spec).to(alpha.dtype))
        return (
            join(into_x) if needs[0] else None,
            join(into_alpha) if needs[1] else None,
            None if into_cells is None else into_cells.to(cells.dtype),
        )

    def cost(self, problem: Problem) -> Cost:
        spec, part, batch = problem.spec, problem.spec.partition, problem.batch
        positions = math.prod(problem.size) if _is_whole(spec) else problem.positions
        out_blocks = part.grid[1]
        each = out_blocks * problem.cells * positions * part.cell_in  # values of Z, a sample
        mixing = batch * problem.cells * part.mixtures * positions * part.cell_in
        dense = batch * problem.cells_numel * out_blocks * problem.positions
        size = batch * each * problem.itemsize
        chunks = math.ceil(2 * size / scratch_bytes(problem.device))
        # Z is written, brought into the product's order, and read; in the backward pass again, and
        # its gradient likewise.
        copies = 2 if _is_whole(spec) else 4
        inputs = batch * part.grid[2] * math.prod(part.kernel) * positions * part.cell_in
        passes = 3 if problem.training else 1
        shared = problem.input_numel + problem.output_numel
        calls = batch if problem.device == "cpu" else 1
        return Cost(
            dense_macs=passes * dense + (4 if problem.training else 1) * mixing,
            bytes=passes * copies * size
            + problem.itemsize
            * passes
            * (batch * shared + 2 * inputs * spec.groups + 3 * problem.cells_numel),
            launches=passes * (chunks * (calls + 4) + math.prod(part.kernel) + 4),
        )


def _is_whole(spec: ConvSpec) -> bool:
    return math.prod(spec.partition.cell_kernel) > 1


def _chunks(x: Tensor, cells: Tensor, spec: ConvSpec) -> Iterator[tuple[slice, list[slice]]]:
    """Samples, and for them the cells, to work on at a time: mixed inputs must fit the limit,
    and exist twice: as mixed and in the order of the product."""
    part = spec.partition
    positions = (
        math.prod(x.shape[2:]) if _is_whole(spec) else math.prod(spec.output_size(x.shape[2:]))
    )
    each = 2 * part.grid[1] * positions * part.cell_in * x.element_size()
    limit = max(scratch_bytes(x.device.type) // each, 1)  # of pairs of a sample and a cell
    for samples in even_chunks(len(x), limit):
        count = samples.stop - samples.start
        yield samples, even_chunks(len(cells), max(limit // max(count, 1), 1))


def _inputs(x: Tensor, spec: ConvSpec) -> Tensor:
    """The inputs: ``[b, (GI, K), (P, c_in)]``, or ``[b, GI, (c_in, *size)]`` for whole cells."""
    part, size = spec.partition, x.shape[2:]
    batch, in_blocks = len(x) * spec.groups, part.grid[2]
    if _is_whole(spec):
        return x.reshape(batch, in_blocks, -1)
    blocks = x.unflatten(1, (-1, part.cell_in)).flatten(0, 1)  # [b GI, c_in, *size]
    windows = gather(blocks.movedim(1, -1), spec, size)  # [b GI, K, *output size, c_in]
    return windows.view(batch, in_blocks * windows.shape[1], -1)


def _inputs_grad(inputs: Tensor, x: Tensor, spec: ConvSpec) -> Tensor:
    """The transpose of :func:`_inputs`, shaped as ``x``."""
    if _is_whole(spec):
        return inputs.to(x.dtype).view(x.shape)
    part = spec.partition
    windows = inputs.view(-1, math.prod(part.kernel), *spec.output_size(x.shape[2:]), part.cell_in)
    blocks = scatter(windows, spec, x.shape[2:]).movedim(-1, 1)  # [b GI, c_in, *size]
    return blocks.reshape(x.shape).to(x.dtype)


def _mixing(alpha: Tensor, spec: ConvSpec) -> Tensor:
    """Coefficients in the order of the products: ``[B, m, n]`` -> ``[b, GO, n, (GI, K)]``."""
    spatial, out_blocks, in_blocks = spec.partition.grid
    groups = spec.groups
    grid = alpha.view(-1, spatial, groups, out_blocks // groups, in_blocks, alpha.shape[-1])
    mixing = grid.permute(0, 2, 3, 5, 4, 1)  # [B, g, GO, n, GI, S]
    return mixing.reshape(-1, out_blocks // groups, alpha.shape[-1], in_blocks * spatial)


def _mixing_grad(mixing: Tensor, spec: ConvSpec) -> Tensor:
    """Undoes :func:`_mixing`."""
    spatial, out_blocks, in_blocks = spec.partition.grid
    groups, cells = spec.groups, mixing.shape[2]
    grid = mixing.view(-1, groups, out_blocks // groups, cells, in_blocks, spatial)
    return grid.permute(0, 5, 1, 2, 4, 3).reshape(-1, spec.partition.mixtures, cells)


def _mix(mixing: Tensor, inputs: Tensor, x: Tensor, spec: ConvSpec) -> Tensor:
    """Mixed inputs Z in the order of :func:`_apply`, in x's type."""
    part, count = spec.partition, mixing.shape[2]
    mixed = batch_matmul(mixing.flatten(1, 2), inputs).to(x.dtype)  # [b, (GO, j), values]
    if _is_whole(spec):
        return mixed.view(-1, count * part.cell_in, *x.shape[2:])  # [(b, GO), (j, c_in), *size]
    mixed = mixed.view(-1, count, mixed.shape[-1] // part.cell_in, part.cell_in)
    return mixed.transpose(1, 2).reshape(-1, count * part.cell_in)  # [(b, GO, P), (j, c_in)]


def _apply(mixed: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
    """``[(b, GO, P), c_out]``, or ``[(b, GO), c_out, *output size]`` for whole cells."""
    weight = _weight(cells, spec)
    if _is_whole(spec):
        return spec.conv(mixed, weight, 1)
    return matmul(mixed, weight.t())


def _weight(cells: Tensor, spec: ConvSpec) -> Tensor:
    """Cells ``[j, cell]`` as one matrix or kernel ``[c_out, (j, c_in), k..]``."""
    part = spec.partition
    cells = cells.view(-1, part.cell_out, part.cell_in, math.prod(part.cell_kernel))
    weight = cells.transpose(0, 1).reshape(part.cell_out, -1, cells.shape[-1])
    return weight.view(part.cell_out, -1, *part.cell_kernel) if _is_whole(spec) else weight[..., 0]


def _apply_backward(
    grad: Tensor,
    mixed: Tensor | None,
    cells: Tensor,
    spec: ConvSpec,
    x: Tensor,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the mixed inputs ``[b, (GO, j), values]`` and of the cells ``[j, cell]``."""
    part, count = spec.partition, len(cells)
    weight = _weight(cells, spec)
    wanted = (needs[0] or needs[1], needs[2])
    into_mixed: Tensor | None
    into_weight: Tensor | None
    if _is_whole(spec):
        if mixed is None:  # only its shape is read
            shape = (len(grad), weight.shape[1], *x.shape[2:])
            mixed = grad.new_empty(1).expand(shape)
        into_mixed, into_weight = conv_backward(grad, mixed, weight, spec, 1, wanted)
    else:
        into_mixed = matmul(grad, weight) if wanted[0] else None  # [(b, GO, P), (j, c_in)]
        into_weight = matmul(grad.t(), mixed) if mixed is not None else None
    blocks = part.grid[1] // spec.groups
    if into_mixed is not None and _is_whole(spec):
        into_mixed = into_mixed.reshape(len(grad) // blocks, blocks * count, -1)
    elif into_mixed is not None:
        positions = math.prod(spec.output_size(x.shape[2:]))
        by_cell = into_mixed.view(-1, positions, count, part.cell_in).transpose(1, 2)
        into_mixed = by_cell.reshape(-1, blocks * count, positions * part.cell_in)
    if into_weight is not None:
        by_cell = into_weight.reshape(part.cell_out, count, -1).transpose(0, 1)
        into_weight = by_cell.reshape(count, -1)
    return into_mixed, into_weight


def _output(y: Tensor, size: torch.Size, spec: ConvSpec) -> Tensor:
    """The result of :func:`_apply` as ``[B, O, *output size]``."""
    out_blocks, out = spec.partition.grid[1], spec.out_channels
    if _is_whole(spec):
        return y.reshape(-1, out, *y.shape[2:])
    y = y.view(-1, out_blocks, *spec.output_size(size), spec.partition.cell_out)
    y = y.movedim(-1, 2)  # [B, g GO, c_out, *output size]
    return y[:, 0] if out_blocks == 1 else y.flatten(1, 2)


def _output_grad(grad: Tensor, spec: ConvSpec) -> Tensor:
    """The transpose of :func:`_output`."""
    blocks = grad.unflatten(1, (-1, spec.partition.cell_out)).flatten(0, 1)  # [(B, g GO), c_out,..]
    if _is_whole(spec):
        return blocks.contiguous()
    return blocks.flatten(2).transpose(1, 2).flatten(0, 1)  # [(b, GO, P), c_out]
