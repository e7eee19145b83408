"""The base class of back ends: a contraction of inputs, coefficients and cells, and its cost.

Legend: B samples, m mixtures, n cells, O, I channels, P output positions.
"""

from __future__ import annotations

import math
import operator
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from .spec import ConvSpec
from .summing import GradientSum

Needs = tuple[bool, bool, bool]
"""Whether the gradients of the input, of the coefficients and of the cells are needed."""

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""These gradients, ``None`` where not needed."""


@dataclass(frozen=True)
class Problem:
    """One contraction: the layer, the shapes, the types and the device.

    Attributes:
        spec: the layer.
        cells: number n of cells in its warehouse.
        batch: samples B.
        size: spatial size of the input.
        dtype: of the input and the cells, as the contraction sees them (after autocast).
        device: device type, ``"cpu"`` or ``"cuda"``, ...
        training: whether a backward pass follows.
        channels_last: whether the input is in channels-last memory format.
        cells_dtype: of the cells, where it differs from the input's: float32 under 16-bit inputs,
            for kernels that are assembled in float32 and rounded once.
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
    """The work of a contraction, from which the selector predicts its time.

    Attributes:
        dense_macs: multiply-adds in matrix products or convolutions at full rate.
        slow_macs: multiply-adds outside of them (depthwise, elementwise).
        bytes: memory traffic beyond the caches.
        launches: calls of library functions or kernels.
        waiting_bytes: traffic of calls that do no arithmetic. Its time is added; the time of
            ``bytes`` overlaps with arithmetic.
    """

    dense_macs: float = 0
    slow_macs: float = 0
    bytes: float = 0
    launches: float = 0
    waiting_bytes: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*map(operator.add, astuple(self), astuple(other)))


def check_operands(
    x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec, grad: Tensor | None = None
) -> None:
    """Refuse tensors that do not fit together or do not fit the layer.

    Args:
        x: ``[B, I, *space]``, of a floating-point type.
        alpha: ``[B, m, n]``, of the cells' type, or float32 beside 16 bit.
        cells: ``[n, cell]``, of the input's type, or float32 beside 16 bit.
        spec: the layer.
        grad: of the output: ``[B, O, *output space]``, of the input's type.

    Raises:
        ValueError: another shape or type, or another device than the input's, naming the tensor.
    """
    part = spec.partition
    dims = len(part.kernel)
    if x.dim() != dims + 2 or x.shape[1] != spec.in_channels:
        _refuse("the input", x, f"[batch, {spec.in_channels}] and {dims} spatial axes")
    cell = part.cell_out * part.cell_in * math.prod(part.cell_kernel)
    if cells.dim() != 2 or cells.shape[1] != cell:
        _refuse("the cells", cells, f"[cells, {cell}]")
    shape = (x.shape[0], part.mixtures, cells.shape[0])
    if alpha.shape != shape:
        _refuse("the coefficients", alpha, f"[samples, mixtures, cells] = {list(shape)}")
    if not x.is_floating_point():
        _refuse("the input", x, "a floating-point type")
    _check_type("the cells", cells, x)
    _check_type("the coefficients", alpha, cells)
    tensors = [("the cells", cells), ("the coefficients", alpha)]
    if grad is not None:
        made = (x.shape[0], spec.out_channels, *spec.output_size(x.shape[2:]))
        if grad.shape != made or grad.dtype != x.dtype:
            _refuse("the output's gradient", grad, f"{list(made)}, {x.dtype}")
        tensors.append(("the output's gradient", grad))
    for name, tensor in tensors:
        if tensor.device != x.device:
            _refuse(name, tensor, f"the input's device, {x.device}")


def _check_type(name: str, tensor: Tensor, beside: Tensor) -> None:
    if tensor.dtype != beside.dtype and not (
        tensor.dtype == torch.float32 and beside.dtype in (torch.float16, torch.bfloat16)
    ):
        also = "" if beside.dtype.itemsize >= 4 else " or torch.float32"
        _refuse(name, tensor, f"{beside.dtype}{also}")


def _refuse(name: str, tensor: Tensor, expected: str) -> NoReturn:
    raise ValueError(
        f"{name}: expected {expected}; found {list(tensor.shape)}, {tensor.dtype} on "
        f"{tensor.device}"
    )


class Contraction:
    """One way of computing ``y_b = conv(x_b, assemble(alpha_b, cells))`` and its gradients.

    Both methods run without autograd and outside of autocast, and check their arguments: a back
    end with kernels of its own would read beyond the end of a tensor that is too small. ``x`` has
    the dtype in which the output is returned; ``cells`` has the same or, for kernels that are
    assembled in float32 and rounded once, float32; ``alpha`` has that or float32. Gradients have
    their tensor's dtype. The output may be contiguous or channels last; the caller converts it to
    the input's layout. Only the three inputs are stored for the backward pass, which assembles the
    kernels again: they are larger than the activations.
    """

    name: ClassVar[str]

    efficiency: ClassVar[dict[str, float]] = {}
    """Share of a device's rate of multiply-adds that the back end's products reach, by device type;
    1 where there is no entry."""

    needs_measurement: ClassVar[bool] = False
    """Whether the selector chooses it only where ``kw doctor`` has measured it."""

    def refusal(self, problem: Problem) -> str | None:
        """Reason why this back end does not support the problem; ``None`` if it does."""
        raise NotImplementedError

    def needs_trial(self, problem: Problem) -> bool:
        """Whether the back end is compared with a library's before its first use
        (:mod:`.admission`); for kernels that are compiled on the user's machine."""
        return False

    def forward(self, x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
        """``x [B, I, *space]``, ``alpha [B, m, n]``, ``cells [n, cell]`` -> ``[B, O, *space']``.

        Raises:
            ValueError: the tensors do not fit the layer (:func:`check_operands`).
        """
        check_operands(x, alpha, cells, spec)
        return self._forward(x, alpha, cells, spec)

    def backward(
        self, grad: Tensor, x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec, needs: Needs
    ) -> Gradients:
        """Gradients of ``x``, ``alpha`` and ``cells`` for ``grad [B, O, *space']``; ``None`` where
        not needed.

        Raises:
            ValueError: the tensors do not fit the layer (:func:`check_operands`).
        """
        check_operands(x, alpha, cells, spec, grad)
        return self._backward(grad, x, alpha, cells, spec, needs)

    def _forward(self, x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
        """:meth:`forward` of tensors that fit."""
        raise NotImplementedError

    def _backward(
        self, grad: Tensor, x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec, needs: Needs
    ) -> Gradients:
        """:meth:`backward` of tensors that fit."""
        raise NotImplementedError

    def cost(self, problem: Problem) -> Cost:
        """Cost of the forward pass or, when training, of both passes."""
        raise NotImplementedError


class SummingContraction(Contraction):
    """A back end that can add the cells' gradient to the gradients of other layers."""

    def backward_summing(
        self,
        grad: Tensor,
        x: Tensor,
        alpha: Tensor,
        cells: Tensor,
        spec: ConvSpec,
        needs: Needs,
        total: GradientSum | None,
    ) -> Gradients:
        """As :meth:`backward`, for checked tensors; the cells' gradient is added to
        ``total``, if there is one, and ``None`` is returned for it."""
        raise NotImplementedError

    def _backward(
        self, grad: Tensor, x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec, needs: Needs
    ) -> Gradients:
        return self.backward_summing(grad, x, alpha, cells, spec, needs, None)
