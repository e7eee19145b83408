"""What a back end is: a way to contract inputs, coefficients and cells, and what it costs.

Legend: B samples, m mixtures, n cells, O, I channels, P output positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from .spec import ConvSpec
from .summing import GradientSum

__all__ = ["Contraction", "Cost", "Needs", "Problem", "SummingContraction"]

Needs = tuple[bool, bool, bool]
"""Whether the gradient of the input, of the coefficients and of the cells is wanted."""


@dataclass(frozen=True)
class Problem:
    """One contraction to be done: the layer, the shapes, and on what.

    Attributes:
        spec: the layer.
        cells: number n of cells in its warehouse.
        batch: samples B.
        size: spatial size of the input.
        dtype: of the input and the cells, as the contraction sees them (after autocast).
        device: device type, ``"cpu"`` or ``"cuda"``, ...
        training: whether gradients will be asked for.
        channels_last: whether the input lies channels last.
        cells_dtype: of the cells, where it is not the input's: float32 under 16-bit inputs, for
            kernels that are assembled in float32 and rounded once.
    """

    spec: ConvSpec
    cells: int
    batch: int
    size: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    training: bool = False
    channels_last: bool = False
    cells_dtype: torch.dtype | None = None

    @cached_property
    def positions(self) -> int:
        """Output positions P of a sample."""
        return math.prod(self.spec.output_size(self.size))

    @cached_property
    def kernel_numel(self) -> int:
        """Values of one sample's kernel."""
        return math.prod(self.spec.partition.kernel_shape)

    @cached_property
    def input_numel(self) -> int:
        """Values of one sample's input."""
        return self.spec.in_channels * math.prod(self.size)

    @cached_property
    def output_numel(self) -> int:
        """Values of one sample's output."""
        return self.spec.out_channels * self.positions

    @cached_property
    def cells_numel(self) -> int:
        """Values of the warehouse."""
        part = self.spec.partition
        return self.cells * part.cell_out * part.cell_in * math.prod(part.cell_kernel)

    @property
    def conv_macs(self) -> int:
        """Multiply-adds of the convolution, all samples."""
        return self.batch * self.kernel_numel * self.positions

    @property
    def assembly_macs(self) -> int:
        """Multiply-adds of assembling every sample's kernel: ``B * n * |kernel|``."""
        return self.batch * self.cells * self.kernel_numel

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return self.dtype.itemsize


@dataclass(frozen=True)
class Cost:
    """What a contraction takes, from which the planner predicts its time.

    Attributes:
        dense_macs: multiply-adds in matrix products or convolutions at full rate.
        slow_macs: multiply-adds outside of them (depthwise, elementwise).
        bytes: read and written beyond the caches.
        launches: calls of library functions or kernels.
        waiting_bytes: moved by calls that have no time to multiply meanwhile, beside others that
            do little else: their time is added, where that of ``bytes`` hides behind arithmetic.
    """

    dense_macs: float = 0
    slow_macs: float = 0
    bytes: float = 0
    launches: float = 0
    waiting_bytes: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.dense_macs + other.dense_macs,
            self.slow_macs + other.slow_macs,
            self.bytes + other.bytes,
            self.launches + other.launches,
            self.waiting_bytes + other.waiting_bytes,
        )


class Contraction:
    """One way of computing ``y_b = conv(x_b, assemble(alpha_b, cells))`` and its gradients.

    Both methods run without autograd and outside of autocast. ``x`` has the dtype in which the
    output is returned; ``cells`` has the same or, for kernels that are assembled in float32 and
    rounded once, float32; ``alpha`` has that or float32. Gradients have their tensor's dtype.
    The output may lie contiguous or channels last; the caller brings it into the input's layout.
    Between forward and backward nothing is kept but the three inputs: assembled kernels are larger
    than the activations that they make, so the backward pass assembles them again.
    """

    name: ClassVar[str]

    efficiency: ClassVar[dict[str, float]] = {}
    """Share of a device's rate of multiply-adds that the back end's products reach, by device type;
    1 where nothing stands."""

    def refusal(self, problem: Problem) -> str | None:
        """Why this back end cannot do the problem, as the end of a sentence; ``None`` if it can."""
        raise NotImplementedError

    def forward(self, x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
        """``x [B, I, *space]``, ``alpha [B, m, n]``, ``cells [n, cell]`` -> ``[B, O, *space']``."""
        raise NotImplementedError

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        alpha: Tensor,
        cells: Tensor,
        spec: ConvSpec,
        needs: Needs,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of ``x``, ``alpha`` and ``cells`` for ``grad [B, O, *space']``; ``None`` where
        not wanted."""
        raise NotImplementedError

    def cost(self, problem: Problem) -> Cost:
        """Of the forward pass or, when training, of both passes."""
        raise NotImplementedError


class SummingContraction(Contraction):
    """One that can add the cells' gradient to what other layers of the warehouse have given."""

    def backward_summing(
        self,
        grad: Tensor,
        x: Tensor,
        alpha: Tensor,
        cells: Tensor,
        spec: ConvSpec,
        needs: Needs,
        total: GradientSum | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As :meth:`backward`; the cells' gradient is added to ``total``, if there is one, and
        ``None`` is returned for it."""
        raise NotImplementedError

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        alpha: Tensor,
        cells: Tensor,
        spec: ConvSpec,
        needs: Needs,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.backward_summing(grad, x, alpha, cells, spec, needs, None)
