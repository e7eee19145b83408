"""The types in which a contraction computes.

Two settings trade accuracy for speed. Their effect on a network's output is measured against
float64 by ``scripts/compare_backends.py``, see docs/experiments.md.

- ``torch.set_float32_matmul_precision`` is torch's own: under ``"high"`` float32 matrix products
  on NVIDIA GPUs take inputs of 10 mantissa bits (TF32). PyTorch may follow it on CPUs too,
  where the processor has such products.
- :func:`set_assembly_precision` sets the type of assembly under autocast: ``"autocast"``,
  the default, rounds coefficients and cells to 16 bit before they are mixed; ``"float32"`` mixes
  them in float32 and rounds the assembled kernel once.
"""

from __future__ import annotations

import difflib

import torch
from torch import Tensor

__all__ = ["ASSEMBLY_PRECISIONS", "assembly_precision", "compute_types", "set_assembly_precision"]

ASSEMBLY_PRECISIONS = ("autocast", "float32")
_assembly = ASSEMBLY_PRECISIONS[0]


def set_assembly_precision(precision: str) -> None:
    """Set the type in which kernels are assembled under autocast: ``"autocast"`` or ``"float32"``.

    Raises:
        ValueError: another value.
    """
    global _assembly
    if precision not in ASSEMBLY_PRECISIONS:
        near = difflib.get_close_matches(str(precision), ASSEMBLY_PRECISIONS, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        known = ", ".join(ASSEMBLY_PRECISIONS)
        raise ValueError(f"assembly precision {precision!r} is unknown; {hint}known: {known}")
    _assembly = precision


def assembly_precision() -> str:
    """The present setting of :func:`set_assembly_precision`."""
    return _assembly


def compute_types(x: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Input and cells in the types of the contraction.

    Raises:
        ValueError: they differ, and autocast is off.
    """
    device = x.device.type
    is_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if is_autocast and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
        # A model in 16 bit has no float32 cells.
        return x, cells if _assembly == "float32" else cells.to(dtype)
    if x.dtype != cells.dtype:
        raise ValueError(
            f"the input is {x.dtype} and the layer's cells are {cells.dtype}; convert one of "
            "them, or use torch.autocast"
        )
    return x, cells
