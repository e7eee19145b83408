"""Tile sizes of the Triton kernels, by rule, from shapes alone.

Autotuning would find better tiles, but a step must not wait for it, the ranks of a job must agree,
and a resumed run must give the same bits.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """The tile of one program.

    Attributes:
        rows: of its result: positions; for the kernel gradient output channels.
        columns: of its result: written channels; for the kernel gradient input channels.
        inner: summed in one step: read channels; for the kernel gradient positions.
        warps: of 32 threads.
        stages: steps whose operands are on their way or in use.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """For Triton's compiler."""
        return {"num_warps": self.warps, "num_stages": self.stages}


# Of a Hopper GPU: multiply-adds that its tensor cores do while the L2 cache delivers one byte (790
# TFLOP/s, 5.5 TB/s), and two programs for each multiprocessor, since one alone waits for its first
# operands. On other GPUs the choice is a little slower, never wrong.
_MACS_PER_BYTE = 72
_PROGRAMS = 2 * 132


def tiles_of_convolution(
    batch: int, positions: int, channels: int, inner: int, itemsize: int
) -> Tiles:
    """Tiles of :func:`~.triton_kernels.convolve`."""
    rows, columns = _tile((64, 128, 256), batch, positions, channels, itemsize)
    step = _step(inner, 128 // itemsize)  # 128 bytes: a row of a swizzled operand
    # All stages but one are in shared memory, of which the smallest GPUs have 99 KB.
    warps, stages = 8 if rows * columns >= 128 * 128 else 4, 3 if rows + columns >= 256 else 4
    return Tiles(rows, columns, step, warps, stages)


def tiles_of_gradient(
    batch: int, positions: int, outputs: int, inputs: int, itemsize: int
) -> Tiles:
    """Tiles of :func:`~.triton_kernels.kernel_gradient`, ``batch`` being samples times taps."""
    rows, columns = _tile((16, 32, 64, 128), batch, outputs, inputs, itemsize)
    step = _step(positions, 128 // itemsize)
    large = rows * columns >= 128 * 128
    return Tiles(rows, columns, step, 8 if large else 4, 3)


def _tile(
    rows: tuple[int, ...], batch: int, height: int, width: int, itemsize: int
) -> tuple[int, int]:
    """Rows and columns of the tile that covers ``batch`` results soonest, by its roofline.

    Large tiles read their operands less often; small ones waste less beyond the edges, and there
    are enough of them for every multiprocessor.
    """

    def time(tile: tuple[int, int]) -> tuple[float, int]:
        tiles = -(-height // tile[0]) * -(-width // tile[1])
        read = (tile[0] + tile[1]) * itemsize * _MACS_PER_BYTE
        # Tensor cores take 64 rows and half of their rate is lost to narrow operands.
        macs = max(tile[0], 64) * max(tile[1], 32)
        return max(batch * tiles, _PROGRAMS) * max(read, macs), -tile[0] * tile[1]

    return min(itertools.product(rows, (16, 32, 64, 128)), key=time)


def _step(size: int, largest: int) -> int:
    """The power of two that covers the summed side with little waste; short steps have their own
    cost, of about sixteen values each."""
    return min((16, 32, 64), key=lambda t: -(-size // t) * (t + 16) if t <= largest else 1 << 60)


ON_CHIP_CELLS = 128
"""Most cells of which a tile is kept on chip: beyond them it takes more than all shared memory, and
mixing them so much longer than memory does that nothing would be gained."""


@dataclass(frozen=True)
class OnChipTiles:
    """The tile of one program of :func:`~.triton_on_chip_kernel.convolve_on_chip`.

    Attributes:
        positions: of its result, for every sample.
        inner: read channels of a tile of cells.
        cells: of a tile, padded.
        more_cells: behind those, padded; 0 for none.
        samples: that it makes.
        mixtures: that it makes at a time; with the samples the 16 rows that an instruction takes.
        channels: of its result.
        warps: of 32 threads; each has samples of its own.
        stages: tiles of input in shared memory, and one on its way to the registers.
    """

    positions: int
    inner: int
    cells: int
    more_cells: int
    samples: int = 8
    mixtures: int = 2
    channels: int = 32
    warps: int = 4
    stages: int = 2

    @property
    def all_cells(self) -> int:
        """Cells of a tile, padded."""
        return self.cells + self.more_cells

    def shared(self, itemsize: int) -> int:
        """Bytes of shared memory: cells, input, mixed tile, coefficients."""
        columns = self.channels * self.inner
        step = self.samples * self.mixtures
        x = step * self.positions * self.inner * (self.stages - 1)
        w = step * columns
        return itemsize * (self.all_cells * (columns + step) + x + w)


def tiles_on_chip(positions: int, cells: int, itemsize: int) -> OnChipTiles:
    """Tiles of :func:`~.triton_on_chip_kernel.convolve_on_chip`.

    Sums are what limits them: 8 samples, 64 positions and 32 channels take 128 registers of each
    thread. Runs of 32 bytes of cells are whole sectors of memory. Four warps, since programs of
    that size fit twice on a multiprocessor, and one multiplies while the other waits; and since
    with eight Triton lays the input out so that its reads from shared memory conflict.
    """
    first, more = next(
        (first, more)
        for first, more in ((16, 0), (32, 0), (32, 16), (64, 0), (64, 16), (64, 32), (128, 0))
        if cells <= first + more or first == ON_CHIP_CELLS
    )
    tile = min(max(16, 1 << (positions - 1).bit_length()), 64)
    return OnChipTiles(tile, 32 // itemsize, first, more)
