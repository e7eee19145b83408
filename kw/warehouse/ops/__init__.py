"""Contractions of inputs, coefficients and cells, and the choice among them."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from torch import Tensor

from .grouped import assemble, conv_bmm, conv_grouped
from .reference import conv_reference
from .spec import ConvSpec

__all__ = ["BACKENDS", "ConvSpec", "assemble", "check_backend", "choose_backend", "dynamic_conv"]

BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, ConvSpec], Tensor]] = {
    "reference": conv_reference,
    "grouped": conv_grouped,
    "bmm": conv_bmm,
}


def dynamic_conv(
    x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec, backend: str = "auto"
) -> Tensor:
    """Convolve every sample with the kernel that its coefficients assemble from the cells.

    ``y_b = conv(x_b, assemble(alpha_b, cells))``: linear in each of its three tensors.

    Args:
        x: input ``[B, I, *space]``.
        alpha: coefficients ``[B, m, n]``.
        cells: ``[n, c_out * c_in * cell_kernel]``.
        spec: partition, stride, padding, dilation, groups.
        backend: a key of :data:`BACKENDS`, or ``"auto"``.

    Returns:
        ``[B, O, *output space]``, without the bias.

    Raises:
        ValueError: an unknown back end, or one that cannot do this layer.
    """
    name = choose_backend(spec) if backend == "auto" else backend
    check_backend(name, spec)
    return BACKENDS[name](x, alpha, cells, spec)


def choose_backend(spec: ConvSpec) -> str:
    """The back end that ``"auto"`` stands for."""
    return "bmm" if _is_pointwise(spec) else "grouped"


def check_backend(name: str, spec: ConvSpec) -> None:
    """Refuse a back end that does not exist or cannot do this layer.

    Raises:
        ValueError: naming the valid ones.
    """
    if name not in BACKENDS:
        near = difflib.get_close_matches(name, BACKENDS, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"back end {name!r} is unknown; {hint}known: auto, {', '.join(BACKENDS)}")
    if name == "bmm" and not _is_pointwise(spec):
        size = "x".join(map(str, spec.partition.kernel))
        raise ValueError(f"back end 'bmm' does pointwise kernels only, not {size}; use 'grouped'")


def _is_pointwise(spec: ConvSpec) -> bool:
    return all(k == 1 for k in spec.partition.kernel)
