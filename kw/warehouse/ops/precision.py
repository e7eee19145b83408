"""The types in which a contraction computes.

Settings trade accuracy for speed. Their effect on a network's output is measured against float64 by
``scripts/compare_backends.py``, see docs/experiments.md.

- On GPUs float32 products take inputs of 10 mantissa bits (TF32) where torch's convolutions may:
  ``torch.backends.cudnn.conv.fp32_precision``. Torch's default is that they may, and a dynamic
  convolution then costs and rounds as the static one beside it. Matrix products of static linear
  layers follow another setting of torch.
- On CPUs ``torch.set_float32_matmul_precision`` counts, where the processor has such products.
- :func:`set_assembly_precision` sets the type of assembly under autocast: ``"autocast"``,
  the default, rounds coefficients and cells to 16 bit before they are mixed; ``"float32"`` mixes
  them in float32 and rounds the assembled kernel once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...errors import valid_names

ASSEMBLY_PRECISIONS = ("autocast", "float32")
_assembly = ASSEMBLY_PRECISIONS[0]
_lock = threading.Lock()
_before: list[str] = []


def set_assembly_precision(precision: str) -> None:
    """Set the type in which kernels are assembled under autocast: ``"autocast"`` or ``"float32"``.

    Raises:
        ValueError: another value.
    """
    global _assembly
    if precision not in ASSEMBLY_PRECISIONS:
        known = valid_names(precision, ASSEMBLY_PRECISIONS)
        raise ValueError(f"assembly precision {precision!r} is unknown{known}")
    _assembly = precision


def assembly_precision() -> str:
    """The present setting of :func:`set_assembly_precision`."""
    return _assembly


def allows_tf32(device: str) -> bool:
    """Whether float32 products of contractions may be rounded to TF32 on a type of device."""
    cudnn: Any = torch.backends.cudnn
    return device == "cuda" and bool(cudnn.conv.fp32_precision == "tf32")


@contextmanager
def as_convolutions_round(x: Tensor) -> Iterator[None]:
    """Let matrix products of float32 be rounded on a GPU as convolutions are."""
    if x.dtype != torch.float32 or x.device.type != "cuda":
        yield
        return
    products: Any = torch.backends.cuda.matmul

    def put(value: str) -> None:
        # What is set there no longer follows torch.backends.fp32_precision.
        if products.fp32_precision != value:
            products.fp32_precision = value

    with _lock:  # threads share the setting: the last one restores what the first one found
        _before.append(products.fp32_precision)
        put("tf32" if allows_tf32("cuda") else "ieee")
    try:
        yield
    finally:
        with _lock:
            put(_before.pop())


def matmul_precision() -> str:
    """Torch's setting for float32 matrix products, by either of its interfaces."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set through the new one
        return str(torch.backends.cuda.matmul.fp32_precision)


def autocast_type(device: str) -> torch.dtype | None:
    """The type that autocast computes in on a kind of device; None where it is off."""
    # The meta device has none. torch.amp.is_autocast_available says so, but earlier versions of
    # torch.compile cannot trace it.
    is_on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_on else None


def compute_types(x: Tensor, cells: Tensor) -> tuple[Tensor, torch.dtype]:
    """The input in the type of the contraction, and the type that the cells take.

    Raises:
        ValueError: they differ, and autocast is off.
    """
    dtype = autocast_type(x.device.type)
    if dtype is not None and x.dtype != torch.float64:
        # A model in 16 bit has no float32 cells.
        return x.to(dtype), cells.dtype if _assembly == "float32" else dtype
    if x.dtype != cells.dtype:
        raise ValueError(
            f"the input is {x.dtype} and the layer's cells are {cells.dtype}; convert one of "
            "them, or use torch.autocast"
        )
    return x, cells.dtype


def coefficient_type(device: str) -> torch.dtype:
    """The type in which kernels on a GPU get their coefficients: bfloat16 where autocast assembles
    in it, else float32.

    Gradients of coefficients are sums over whole kernels, for which float16's range is too small.
    """
    is_rounded = _assembly == "autocast" and autocast_type(device) == torch.bfloat16
    return torch.bfloat16 if is_rounded else torch.float32
