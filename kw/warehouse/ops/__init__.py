"""Contractions of inputs, coefficients and cells, and the choice among them.

``dynamic_conv`` is the entry point. Every back end has its own file: the yardsticks ``reference``
(the definition) and ``grouped`` (the usual implementation), and those that the selector may choose.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import valid_names
from .assembly import assemble
from .backends import BACKENDS, CONTRACTIONS, YARDSTICKS, selector
from .contraction import Contraction, Cost, Problem, check_operands
from .exported import conv_exported, exported_for
from .function import contract, may_share
from .precision import (
    assembly_precision,
    coefficient_type,
    compute_types,
    set_assembly_precision,
)
from .spec import ConvSpec

__all__ = [
    "BACKENDS",
    "CONTRACTIONS",
    "YARDSTICKS",
    "Contraction",
    "ConvSpec",
    "Cost",
    "Problem",
    "assemble",
    "assembly_precision",
    "check_backend",
    "dynamic_conv",
    "exported_for",
    "is_exporting",
    "selector",
    "set_assembly_precision",
]


def dynamic_conv(
    x: Tensor,
    alpha: Tensor,
    cells: Tensor,
    spec: ConvSpec,
    backend: str = "auto",
    rounded: Callable[[torch.dtype], Tensor] | None = None,
) -> Tensor:
    """Convolve every sample with the kernel that its coefficients assemble from the cells.

    ``y_b = conv(x_b, assemble(alpha_b, cells))``: linear in each of its three tensors. Under
    autocast inputs and cells are rounded to its type first (:func:`set_assembly_precision`).

    Args:
        x: input ``[B, I, *space]``.
        alpha: coefficients ``[B, m, n]``.
        cells: ``[n, c_out * c_in * cell_kernel]``.
        spec: partition, stride, padding, dilation, groups.
        backend: one of :data:`BACKENDS`, or ``"auto"``: the selector's choice for these shapes.
            Under ``torch.func`` and in forward mode plain operators take its place, which store a
            kernel for each sample.
        rounded: gives the cells in a type of 16 bit (:class:`~.rounded.RoundedCells`); without it
            they are rounded for this call.

    Returns:
        ``[B, O, *output space]``, without the bias.

    Raises:
        ValueError: an unknown back end, or one that cannot do this layer; a tensor whose
            shape, type or device does not fit the layer or the other tensors.
    """
    if backend in YARDSTICKS:
        if alpha.dtype == torch.bfloat16 == coefficient_type(x.device.type):  # a GPU's kernels
            alpha = alpha.to(cells.dtype)
        check_operands(x, alpha, cells, spec)
        if len(x) > 0:
            return YARDSTICKS[backend](x, alpha, cells, spec)
        backend = "auto"
    if backend != "auto" and backend not in CONTRACTIONS:
        check_backend(backend, spec)
    x, dtype = compute_types(x, cells)
    if is_exporting():
        # An exported graph may contain standard operators only.
        return conv_exported(x, alpha, cells.to(dtype), spec)
    if cells.dtype == dtype or rounded is None or not may_share(x, cells):
        return contract(x, alpha, cells.to(dtype), spec, backend)
    return contract(x, alpha, cells, spec, backend, rounded(dtype))


def check_backend(name: str, spec: ConvSpec, cells: Tensor | None = None) -> None:
    """Refuse a back end that does not exist or cannot do this layer.

    Args:
        name: one of :data:`BACKENDS`.
        spec: the layer.
        cells: its warehouse's cells, for device and type; default: on the CPU, float32.

    Raises:
        ValueError: naming the valid ones, or saying why.
    """
    if name not in BACKENDS:
        raise ValueError(f"back end {name!r} is unknown{valid_names(name, ('auto', *BACKENDS))}")
    if name in YARDSTICKS:
        return
    # The smallest input that the kernel fits on; limits on larger inputs are checked when they
    # occur.
    part = spec.partition
    size = tuple(d * (k - 1) + 1 for d, k in zip(spec.dilation, part.kernel, strict=True))
    dtype = torch.float32 if cells is None else cells.dtype
    device = "cpu" if cells is None else cells.device.type
    number = part.mixtures if cells is None else len(cells)
    selector.check(Problem(spec, number, 2, size, dtype, device), name)


def is_exporting() -> bool:
    """Whether an exporter traces, whose graph may contain standard operators only."""
    traced = torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()
    return traced or torch.compiler.is_exporting()
