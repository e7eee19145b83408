"""The on-chip back end: a few samples' kernels mixed and used at once, tile by tile, on a GPU.

Legend: B samples, S of a program, m mixtures, n cells, J cells padded, O, I channels, P positions.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from . import triton_on_chip_launch as launch
from .contraction import Contraction, Cost, Gradients, Needs, Problem
from .layout import empty
from .precision import allows_tf32
from .spec import ConvSpec
from .triton_conv import TritonConv, columns_of
from .triton_launch import is_amd, reaches_all
from .triton_on_chip_launch import Mixture
from .triton_tiles import ON_CHIP_CELLS, tiles_on_chip

_SHARED = 99 << 10
"""Bytes of shared memory for a program where torch does not say: those of the smallest GPUs."""

_TRITON = (3, 4)
"""The first Triton whose compiler can be used: 3.2 crashes on the kernel, and 3.3 lays the input
out so that reads from shared memory conflict. From 3.5 on the loop hardly spills."""

_SPILLING = 4
"""What float32 without tensor cores takes beside its multiply-adds: an estimate."""


class TritonOnChip(Contraction):
    """Keep a tile of the cells on chip, mix it for eight samples at a time, convolve with that.

    The cells are read once for eight samples, and kernels reach neither memory nor the L2 cache:
    the forward pass and the input's gradient move activations and cells alone. Every tile of 64
    positions mixes again, which suits layers with few positions; the time to mix grows with the
    number of cells, which suits small warehouses.

    Gradients of coefficients and cells go through memory, as those of ``triton`` do. On chip they
    would take 30 bytes of shared memory for every value of a kernel, twice the forward pass, to
    save six to memory.
    """

    name: ClassVar[str] = "on_chip"

    efficiency: ClassVar[dict[str, float]] = {"cuda": 0.4}
    """An estimate, not measured: three quarters of what shared memory lets through, which is 0.53
    of the rate of large products (:mod:`.triton_on_chip_kernel`)."""

    needs_measurement: ClassVar[bool] = True  # no GPU has run it yet

    def __init__(self) -> None:
        self.through_memory = TritonConv()

    def refusal(self, problem: Problem) -> str | None:
        if problem.cells > ON_CHIP_CELLS:
            return f"keeps tiles of up to {ON_CHIP_CELLS} cells on chip, not of {problem.cells}"
        if problem.cells_dtype not in (None, problem.dtype):
            return "mixes in the type of the input, not in float32 under 16 bit"
        part, tiles = problem.spec.partition, tiles_on_chip(64, problem.cells, problem.itemsize)
        sides = ((problem.input_numel, part.cell_in), (problem.output_numel, part.cell_out))
        values = max(n // width * _up(width, tiles.inner) for n, width in sides)
        rows = _up(problem.batch, tiles.samples) * part.mixtures
        if tiles.samples * values >= 1 << 30 or rows * tiles.all_cells >= 1 << 31:
            return "does eight samples, and coefficients, of fewer than 2^31 values (padded)"
        if is_amd():
            return "is for NVIDIA's GPUs; AMD's have too little shared memory"
        reason = self.through_memory.refusal(problem)
        if reason is not None or problem.device != "cuda":
            return reason
        if _triton() < _TRITON:
            return "needs Triton {}.{}, not {}.{}".format(*_TRITON, *_triton())
        if torch.cuda.is_available():
            wanted = tiles.shared(problem.itemsize)
            device = torch.cuda.get_device_properties(torch.cuda.current_device())
            there = getattr(device, "shared_memory_per_block_optin", _SHARED)
            if wanted > there:
                return f"needs {wanted >> 10} KB of shared memory; the device has {there >> 10}"
        return None

    def needs_trial(self, problem: Problem) -> bool:
        return problem.device == "cuda"  # elsewhere they are interpreted

    def _forward(self, x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
        y = empty(x, spec.out_channels, spec.output_size(x.shape[2:]), last=True)
        if len(x):
            with torch.cuda.device_of(x):
                mixture = _mixture(alpha, cells, spec)
                launch.convolve_on_chip(mixture, x, y)
        return y

    def _backward(
        self, grad: Tensor, x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec, needs: Needs
    ) -> Gradients:
        need_x, *rest = needs
        dx = dalpha = dcells = None
        if need_x:
            dx = empty(x, x.shape[1], x.shape[2:], last=True)
            if not reaches_all(spec, tuple(x.shape[2:])):
                dx.zero_()
            if len(x):
                with torch.cuda.device_of(x):
                    mixture = _mixture(alpha, cells, spec)
                    launch.convolve_on_chip_transposed(mixture, grad, dx)
        if any(rest):
            wanted = (False, rest[0], rest[1])
            _, dalpha, dcells = self.through_memory.backward(grad, x, alpha, cells, spec, wanted)
        return dx, dalpha, dcells

    def cost(self, problem: Problem) -> Cost:
        strides = math.prod(problem.spec.stride)
        read, made = (problem.batch * n for n in (problem.input_numel, problem.output_numel))
        cells = problem.cells_numel
        # The input is packed before; cells are in the L2 cache after the first read.
        cost = Cost(
            dense_macs=self._macs(problem, problem.positions, transposed=False),
            bytes=(3 * read + made + cells) * problem.itemsize,
            launches=5,
        )
        if problem.training:
            # A launch for every residue of the stride: they share the taps.
            positions = -(-math.prod(problem.size) // strides)
            rest = self.through_memory.cost_of_kernel_gradients(problem)
            cost += Cost(
                dense_macs=self._macs(problem, positions, transposed=True),
                bytes=(3 * made + read + cells) * problem.itemsize,
                launches=4 + strides + rest.launches,
                waiting_bytes=rest.bytes,
            )
        if problem.device == "cpu":  # interpreted: correct, but thousands of times slower
            return Cost(slow_macs=2000 * cost.dense_macs)
        if problem.dtype is torch.float32 and not allows_tf32("cuda"):
            # Without tensor cores, and with sums that the registers do not hold beside operands.
            return replace(cost, dense_macs=0, slow_macs=_SPILLING * cost.dense_macs)
        return cost

    def _macs(self, problem: Problem, positions: int, transposed: bool) -> float:
        """Multiply-adds of one launch with its padding: mixing, then the convolution."""
        part = problem.spec.partition
        tiles = tiles_on_chip(positions, problem.cells, problem.itemsize)
        spatial, out_blocks, in_blocks = part.grid
        outputs, inputs = (out_blocks, part.cell_out), (in_blocks, part.cell_in)
        written, read = (inputs, outputs) if transposed else (outputs, inputs)
        mixtures = -(-spatial * read[0] // tiles.mixtures) * tiles.mixtures
        values = _up(problem.batch, tiles.samples) * mixtures * math.prod(part.cell_kernel)
        values *= _up(read[1], tiles.inner) * written[0] * _up(written[1], tiles.channels)
        return values * -(-positions // tiles.positions) * (tiles.all_cells + tiles.positions)


@cache
def _triton() -> tuple[int, int]:
    """Triton's version; only called where it can be imported."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def _up(count: int, step: int) -> int:
    """The next multiple."""
    return -(-count // step) * step


def _mixture(alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Mixture:
    return Mixture(launch.pad_coefficients(alpha, cells.dtype), columns_of(cells, spec), spec)
