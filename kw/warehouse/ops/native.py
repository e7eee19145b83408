"""Back end ``native``: compiled code for CPUs that assembles kernels in cache and uses them there.

In late layers a sample's kernel is larger than its activations; writing it to memory and reading it
back takes longer than the convolution. Here only a slice of some samples' kernels exists at a time,
in the second-level cache. The C++ in ``cpp/`` is compiled on first use.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import os
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from . import compiled
from .contraction import Cost, Gradients, Needs, Problem, SummingContraction
from .layout import empty, lies_channels_last
from .spec import ConvSpec
from .summing import GradientSum

log = logging.getLogger(__name__)

_POSITIONS = 1 << 28  # times taps: entries of four bytes in the tables of make_phases (common.h)
_ARGUMENTS = {"kw_mix": (5, 4), "kw_gradients": (7, 4)}  # pointers, integers


class Native(SummingContraction):
    """Compiled for this machine; float32 on a CPU, kernels without groups, up to three axes.

    Without a compiler, or with ``KW_NATIVE=0`` in the environment, it refuses.
    """

    name: ClassVar[str] = "native"

    def refusal(self, problem: Problem) -> str | None:
        """Why not; compiles the library where there is no other reason."""
        if problem.device != "cpu":
            return f"runs on a CPU only, not on {problem.device}"
        if problem.dtype != torch.float32:
            return f"computes in float32 only, not in {str(problem.dtype).removeprefix('torch.')}"
        if problem.spec.groups > 1:
            return f"does convolutions without groups only, not with {problem.spec.groups}"
        if len(problem.spec.partition.kernel) > 3:
            return "does at most three spatial axes"
        taps = math.prod(problem.spec.partition.kernel)
        if taps * max(math.prod(problem.size), problem.positions) > _POSITIONS:
            return "does images of at most 2^28 positions over the kernel's taps"
        if os.environ.get("KW_NATIVE") == "0":
            return "is turned off by KW_NATIVE=0"
        return _no_library()

    def _forward(self, x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
        x, alpha, cells = map(_dense, (x, alpha, cells))
        last = lies_channels_last(x)
        y = empty(x, spec.out_channels, spec.output_size(x.shape[2:]), last)
        layer = _layer(spec, len(x), len(cells), tuple(x.shape[2:]))
        _call("kw_mix", layer, (x, alpha, cells, y), (False, last, last))
        return y

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
        x, grad, alpha, cells = map(_dense, (x, grad, alpha, cells))
        last, grad_last = lies_channels_last(x), lies_channels_last(grad)
        layer = _layer(spec, len(x), len(cells), tuple(x.shape[2:]))
        x_grad = empty(x, x.shape[1], x.shape[2:], last) if needs[0] else None
        alpha_grad = torch.empty_like(alpha) if needs[1] else None
        earlier = None if total is None else total.value
        cells_grad = earlier
        if needs[2] and earlier is None:
            cells_grad = torch.empty_like(cells)
        if x_grad is not None:
            _call("kw_mix", layer, (grad, alpha, cells, x_grad), (True, grad_last, last))
        if needs[1] or needs[2]:
            tensors = (x, grad, alpha, cells, alpha_grad, cells_grad)
            _call("kw_gradients", layer, tensors, (earlier is not None, last, grad_last))
        if total is not None:
            total.value, cells_grad = cells_grad, None
        return x_grad, alpha_grad, cells_grad

    def cost(self, problem: Problem) -> Cost:
        """Multiply-adds and little else: cells are read once, activations reordered."""
        macs = problem.conv_macs + problem.assembly_macs
        activations = problem.batch * (problem.input_numel + problem.output_numel)
        if problem.training:
            # Twice the assembly for the input, and once each for coefficients and cells.
            macs = 3 * problem.conv_macs + 4 * problem.assembly_macs
        passes = 3 if problem.training else 1
        # Packing the cells is a transpose: measured as long as a dozen multiply-adds a value.
        macs += 12 * passes * problem.cells_numel
        values = passes * (2 * activations + problem.cells_numel)
        return Cost(dense_macs=macs, bytes=values * problem.itemsize, launches=passes)


@functools.cache
def _library() -> ctypes.CDLL:
    loaded = compiled.library()
    for name, (pointers, integers) in _ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * integers
        function.restype = ctypes.c_int64
    return loaded


@functools.cache
def _no_library() -> str | None:
    try:
        _library()
    except compiled.CompileError as error:
        log.warning("back end 'native' is not available: %s", error)
        return str(error)
    return None


def _call(
    name: str,
    layer: ctypes.Array[ctypes.c_int64],
    tensors: Sequence[Tensor | None],
    flags: Sequence[bool],
) -> None:
    pointers = (None if t is None else t.data_ptr() for t in tensors)
    if getattr(_library(), name)(layer, *pointers, *flags, torch.get_num_threads()):
        raise MemoryError("back end 'native': no memory is left for what it computes on the way")


@functools.lru_cache(maxsize=4096)
def _layer(
    spec: ConvSpec, batch: int, cells: int, size: tuple[int, ...]
) -> ctypes.Array[ctypes.c_int64]:
    """``struct Layer`` of ``cpp/common.h``."""
    part = spec.partition

    def axes(values: Sequence[int], fill: int = 1) -> list[int]:
        return [fill] * (3 - len(values)) + list(values)

    kernel = axes(part.kernel)
    values = [batch, cells, part.cell_out, part.cell_in, *part.grid]
    values += [kernel[0] * kernel[1] * kernel[2], *axes(size), *axes(spec.output_size(size))]
    values += [*kernel, *axes(spec.stride), *axes(spec.padding, 0), *axes(spec.dilation)]
    return (ctypes.c_int64 * len(values))(*values)


def _dense(x: Tensor) -> Tensor:
    """The tensor without gaps, images perhaps with their channels last; copied where it must be."""
    x = x.resolve_neg()  # of an imaginary part's view: the sign is in no byte
    return x if x.dim() > 3 and lies_channels_last(x) else x.contiguous()
