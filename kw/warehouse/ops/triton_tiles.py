"""How much one program of a Triton kernel makes: by rule, from shapes alone.

Trials would decide better, but a step must not wait for them, ranks of a job must agree, and a run
that is resumed must give the same bits.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

__all__ = ["Tiles", "tiles_of_convolution", "tiles_of_gradient"]


@dataclass(frozen=True)
class Tiles:
    """What one program makes and how.

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
# operands. On others the choice is a little worse, never wrong.
_MACS_PER_BYTE = 72
_PROGRAMS = 2 * 132


def tiles_of_convolution(
    batch: int, positions: int, channels: int, inner: int, itemsize: int
) -> Tiles:
    """Tiles of :func:`~.triton_kernels.convolve`."""
    rows, columns = _tile((64, 128, 256), batch, positions, channels, itemsize)
    step = _step(inner, 128 // itemsize)  # 128 bytes: a row of a swizzled operand
    large = rows * columns >= 128 * 128
    return Tiles(rows, columns, step, 8 if large else 4, 3 if large else 4)


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
