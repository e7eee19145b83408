"""How much one program of a Triton kernel makes: by rule, from shapes alone.

Trials would decide better, but a step must not wait for them, ranks of a job must agree, and a run
that is resumed must give the same bits.
"""

from __future__ import annotations

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


def tiles_of_convolution(positions: int, channels: int, inner: int, itemsize: int) -> Tiles:
    """Tiles of :func:`~.triton_kernels.convolve`.

    With few positions a program only streams its kernel: small tiles, many steps on their way.
    With many, large tiles save traffic through the caches.
    """
    rows = 128 if positions > 256 else 64
    columns = _tile(channels, 128 if positions > 64 else 64)
    step = _tile(inner, 128 // itemsize)  # 128 bytes: a row of a swizzled operand
    large = rows * columns >= 128 * 128
    return Tiles(rows, columns, step, 8 if large else 4, 3 if large else 4)


def tiles_of_gradient(positions: int, outputs: int, inputs: int, itemsize: int) -> Tiles:
    """Tiles of :func:`~.triton_kernels.kernel_gradient`, whose sum runs over positions."""
    rows, columns = _tile(outputs, 128), _tile(inputs, 128)
    step = _tile(positions, 128 // itemsize)
    large = rows * columns >= 128 * 128
    return Tiles(rows, columns, step, 8 if large else 4, 3)


def _tile(size: int, largest: int) -> int:
    """The power of two that covers ``size`` with little waste.

    Against waste counts that narrow tiles fetch their other operand more often: 16 wide costs
    about double, 128 wide an eighth.
    """
    tiles = [t for t in (16, 32, 64, 128) if t <= largest]
    return min(tiles, key=lambda t: (-(-size // t) * (t + 16), -t))
