"""Shared parts of the back ends: cells to blocks, blocks to kernels and back, chunks of samples.

Legend: B samples (b of a chunk), m mixtures, n cells, S, GO, GI blocks along space, output and
input channels, O, I channels, g groups, K kernel positions, P output positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..partition import Partition
from .contraction import Needs
from .matmul import accumulate, float32_matmul, matmul
from .spec import ConvSpec

# Scratch memory of a chunk, in bytes. On CPU glibc maps fresh pages for every tensor beyond 32 MiB,
# and clearing them takes longer than the work; smaller chunks read the cells more often. With 512
# channels at 7x7, batch 8, 32 MiB and 100 MiB were slower than this, by up to a half and to twice.
# A GPU's allocator keeps its memory, and larger chunks fill the device.
CPU_SCRATCH = 64 << 20
GPU_SCRATCH = 256 << 20


def scratch_bytes(device: str) -> int:
    """Largest scratch memory of a chunk on a device type, bytes."""
    return CPU_SCRATCH if device == "cpu" else GPU_SCRATCH


def sample_chunks(batch: int, values: int, like: Tensor) -> list[slice]:
    """Chunks of about equal size whose scratch (``values`` per sample) fits the limit."""
    most = scratch_bytes(like.device.type) // max(values * like.element_size(), 1)
    return even_chunks(batch, max(most, 1))


def even_chunks(count: int, most: int) -> list[slice]:
    """``count`` items in the fewest chunks of at most ``most`` items, of about equal size."""
    size = math.ceil(count / math.ceil(count / most)) if count > most else max(count, 1)
    return [slice(start, min(start + size, count)) for start in range(0, max(count, 1), size)]


def join(chunks: list[Tensor]) -> Tensor:
    """Concatenate the chunks' results; copies only if there are several."""
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


def assemble(alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
    """All samples' kernels, differentiably: one matrix product, then a permutation of blocks.

    Args:
        alpha: ``[B, m, n]``.
        cells: ``[n, cell]``.
        spec: the layer.

    Returns:
        ``[B, O, I / g, k_1 .. k_d]``.
    """
    return to_kernels(alpha.to(cells.dtype) @ cells, spec.partition)


def mix(alpha: Tensor, cells: Tensor, dtype: torch.dtype) -> Tensor:
    """Blocks ``[b, m, cell]`` of samples with coefficients ``[b, m, n]``; not differentiable.

    Mixed in the cells' type and then rounded to ``dtype``.
    """
    blocks = matmul(alpha.to(cells.dtype).flatten(0, 1), cells)
    return blocks.to(dtype).view(*alpha.shape[:2], -1)


def to_kernels(blocks: Tensor, part: Partition, channels_last: bool = False) -> Tensor:
    """Kernels from blocks ``[b, m, cell]``: ``[b, O, I / g, k_1 .. k_d]``; channels last, input
    channels lie innermost, which moves whole rows of the cells."""
    blocks = _grid(blocks, part)
    if not channels_last:
        return blocks.permute(0, 2, 4, 3, 5, 1, 6).reshape(-1, *part.kernel_shape)
    out, in_, *size = part.kernel_shape
    return blocks.permute(0, 2, 4, 1, 6, 3, 5).reshape(-1, out, *size, in_).movedim(-1, 2)


def to_taps(blocks: Tensor, part: Partition) -> Tensor:
    """Blocks ``[b, m, cell]`` as one matrix a kernel position: ``[b, K, O, I / g]``.

    Blocks are stored in that order, so no copy is made unless cells are cut along input channels
    or span space.
    """
    out, in_ = part.kernel_shape[:2]
    taps = _grid(blocks, part).permute(0, 1, 6, 2, 4, 3, 5)  # [b, S, ck, GO, c_out, GI, c_in]
    return taps.reshape(-1, math.prod(part.kernel), out, in_)


def to_blocks(taps: Tensor, part: Partition) -> Tensor:
    """Kernels by position, ``[b, K, O, I / g]``, as blocks ``[b, m, cell]``; undoes
    :func:`to_taps`, and takes a kernel ``[b, O, I / g, k..]`` as ``flatten(3).movedim(3, 1)``."""
    spatial, out_blocks, in_blocks = part.grid
    shape = (spatial, -1, out_blocks, part.cell_out, in_blocks, part.cell_in)
    grid = taps.unflatten(3, shape[4:]).unflatten(2, shape[2:4]).unflatten(1, shape[:2])
    return grid.permute(0, 1, 3, 5, 4, 6, 2).reshape(len(taps), part.mixtures, -1)


def _grid(blocks: Tensor, part: Partition) -> Tensor:
    # Either the grid or the cell spans space: S or ck is 1.
    cell_kernel = math.prod(part.cell_kernel)
    # [b, S, GO, GI, c_out, c_in, ck]
    return blocks.view(-1, *part.grid, part.cell_out, part.cell_in, cell_kernel)


class BlockGradients:
    """Gradients of coefficients and cells, summed from those of the blocks chunk by chunk.

    With blocks ``W = alpha E``: ``d alpha = dW E^T`` and ``dE = alpha^T dW``.
    """

    def __init__(self, alpha: Tensor, cells: Tensor, needs: Needs) -> None:
        self._inputs = alpha, cells
        # Sums over several chunks need more than half precision.
        wide = torch.promote_types(cells.dtype, torch.float32)
        self._alpha = torch.zeros_like(alpha, dtype=wide) if needs[1] else None
        self._cells = torch.zeros_like(cells, dtype=wide) if needs[2] else None

    def add(self, blocks: Tensor, samples: slice, values: slice = slice(None)) -> None:
        """Add gradients ``[b, m, values]`` of the blocks of some samples, of some values."""
        alpha, cells = self._inputs
        rows = blocks.flatten(0, 1).to(cells.dtype)
        if self._alpha is not None:
            # CPUs sum in float32, and round to 16 bit once.
            multiply = float32_matmul if rows.is_cuda else matmul
            product = multiply(rows, cells[:, values].t())
            self._alpha[samples] += product.view(-1, *alpha.shape[1:])
        if self._cells is not None:
            mixing = alpha[samples].flatten(0, 1).to(rows.dtype)
            accumulate(self._cells[:, values], mixing.t(), rows)

    @property
    def alpha(self) -> Tensor | None:
        """The gradient ``[B, m, n]``, or ``None`` if not needed."""
        return None if self._alpha is None else self._alpha.to(self._inputs[0].dtype)

    @property
    def cells(self) -> Tensor | None:
        """The gradient ``[n, cell]``, or ``None`` if not needed."""
        return None if self._cells is None else self._cells.to(self._inputs[1].dtype)
