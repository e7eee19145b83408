"""Dynamic convolutions from standard operators, for export with any number of samples.

ONNX fixes the groups of a convolution, so the usual form, one group a sample, exports for a fixed
batch only. The forms used instead, by layer:

- ``columns`` (:func:`.bmm.conv_bmm`): assembled kernels, one batched matrix product;
- ``mixed``: mixed inputs, one product with the shared cells, where that is less work (finely cut
  kernels on few positions; a classifier, which has one);
- ``grouped``: depthwise layers, where the runtime takes groups that depend on the batch, or the
  batch is fixed;
- ``computed``, for ONNX and OpenVINO: kernels with taps innermost, and with a fixed batch one
  convolution, a group a sample, else columns;
- ``taps``, for OpenVINO: a product a tap, summed, where there are fewer positions than channels;
- ``xnnpack``, for ExecuTorch, at a fixed batch and size: only operators that XNNPACK computes;
  ExecuTorch's own are simple loops;
- ``columns`` again: depthwise layers that ``torch.jit.trace`` traces, which fixes the groups;
- ``each``: depthwise layers elsewhere: a loop over the samples around an ordinary convolution.
  Batched products of one row are three to ten times slower there (docs/deployment.md).

Legend: B samples, m mixtures, n cells, GO, GI blocks along output and input channels, O, I
channels, K taps, P output positions.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...torch_private import scan
from .assembly import assemble
from .bmm import conv_bmm, to_space, unfold_taps
from .library import conv_grouped
from .spec import ConvSpec

MIXED = 1.3
"""Multiply-adds on mixed inputs that take as long as one multiply-add on assembled kernels."""

RUNTIMES = ("", "executorch", "int8", "onnx", "openvino")

_runtime: ContextVar[str] = ContextVar("runtime", default="")


@contextlib.contextmanager
def exported_for(runtime: str) -> Iterator[None]:
    """Within this context, layers take the forms that a runtime computes best.

    Args:
        runtime: ``"onnx"``, ``"openvino"``, ``"int8"`` (OpenVINO whose products with cells can be
            quantized: the cells are an operand as they are stored), ``"executorch"``, or ``""``:
            any other. The first four have convolutions with a constant number of groups only.

    Raises:
        ValueError: another runtime.
    """
    if runtime not in RUNTIMES:
        raise ValueError(
            f"runtime is {runtime!r}; expected one of {', '.join(map(repr, RUNTIMES))}"
        )
    token = _runtime.set(runtime)
    try:
        yield
    finally:
        _runtime.reset(token)


def conv_exported(x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
    """The convolution in the form that suits the layer; arguments as for
    :func:`kw.warehouse.ops.dynamic_conv`."""
    if _runtime.get() == "executorch" and all(isinstance(n, int) for n in x.shape):
        return _conv_xnnpack(x, alpha, cells, spec)
    if spec.is_depthwise and not torch.jit.is_tracing():
        each = _runtime.get() and not isinstance(x.shape[0], int)
        return (_conv_each if each else conv_grouped)(x, alpha, cells, spec)
    if _mixes(len(cells), spec, x.shape[2:]):
        return _conv_mixed(x, alpha, cells, spec)
    # Spatially cut kernels without groups: the paper's, of more than one tap.
    if _runtime.get() in ("onnx", "openvino") and spec.groups == 1 and spec.partition.grid[0] > 1:
        few = math.prod(spec.output_size([_hint(n) for n in x.shape[2:]])) < spec.in_channels
        if few and _runtime.get() == "openvino":
            return _conv_taps(x, alpha, cells, spec)
        return _conv_computed(x, alpha, cells, spec)
    return conv_bmm(x, alpha, cells, spec)


def _mixes(cells: int, spec: ConvSpec, size: Any) -> bool:
    """Whether mixing inputs is less work, at the size of the example that is traced."""
    part = spec.partition
    if spec.groups > 1 or math.prod(part.cell_kernel) > 1:
        return False
    positions = math.prod(spec.output_size([_hint(n) for n in size]))
    cell = part.cell_out * part.cell_in
    mixed = cells * positions * (part.mixtures * part.cell_in + cell * part.grid[1])
    return mixed <= MIXED * math.prod(part.kernel_shape) * (cells + positions)


def _hint(size: Any) -> int:
    """The example's size as an integer: comparing a symbolic size adds a guard."""
    hint: Any = size.node.hint if isinstance(size, torch.SymInt) else size
    return int(hint)


def _conv_mixed(x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
    part = spec.partition
    spatial, out_blocks, in_blocks = part.grid
    taps, size = unfold_taps(x, spec)  # [B, I, K, P]
    inputs = taps.transpose(1, 2).unflatten(2, (in_blocks, -1))  # [B, K, GI, c_in, P]
    inputs = inputs.flatten(1, 2).flatten(2)  # [B, K GI, c_in P]
    mixing = alpha.unflatten(1, (spatial, out_blocks, in_blocks)).permute(0, 2, 4, 1, 3)
    mixing = mixing.flatten(3).flatten(1, 2).to(cells.dtype)  # [B, GO n, K GI]
    mixed = (mixing @ inputs.to(cells.dtype)).to(x.dtype)
    mixed = mixed.unflatten(1, (out_blocks, -1)).unflatten(3, (part.cell_in, -1))
    shared = cells.to(x.dtype).view(-1, part.cell_out, part.cell_in).transpose(0, 1).flatten(1)
    columns = mixed.flatten(2, 3).flatten(0, 1)  # [B GO, n c_in, P]
    if torch.jit.is_tracing():
        y = shared @ columns  # [B GO, c_out, P]
    else:
        # With an example of one image, torch 2.15 fixes an open batch to 1 behind a product that
        # broadcasts.
        y = torch.bmm(shared.expand(columns.shape[0], -1, -1), columns)
    return to_space(y.unflatten(0, (-1, out_blocks)).flatten(1, 2), spec, size)


def _conv_computed(x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
    """Kernels computed with taps innermost, as convolutions take them: nothing is moved."""
    part = spec.partition
    mixing = alpha.unflatten(1, part.grid).permute(0, 2, 3, 4, 1)  # [B, GO, GI, n, K]
    kernels = cells.t() @ mixing.flatten(0, 2).to(cells.dtype)  # [B GO GI, c_out c_in, K]
    if part.grid[2] > 1:
        kernels = kernels.unflatten(1, (part.cell_out, -1)).unflatten(0, (-1, part.grid[2]))
        kernels = kernels.transpose(1, 2)  # [B GO, c_out, GI, c_in, K]
    kernels = kernels.reshape(-1, *part.kernel_shape[1:]).to(x.dtype)  # [B O, I, k..]
    batch = x.shape[0]
    if not isinstance(batch, int):
        columns, size = unfold_taps(x, spec)  # [B, I, K, P]
        kernels = kernels.unflatten(0, (-1, spec.out_channels)).flatten(2)  # [B, O, I K]
        return (kernels @ columns.flatten(1, 2)).unflatten(2, size)
    y = spec.conv(x.reshape(1, -1, *x.shape[2:]), kernels, batch)
    return y.reshape(batch, -1, *y.shape[2:])


def _conv_taps(x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
    """One product a tap, summed: moves the few outputs in place of the kernel."""
    part = spec.partition
    inputs, size = unfold_taps(x, spec)  # [B, I, K, P]
    blocks = (alpha.to(cells.dtype) @ cells).to(x.dtype)
    blocks = blocks.unflatten(2, (part.cell_out, part.cell_in)).unflatten(1, part.grid)
    kernels = blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)  # [B, K, O, I]
    return (kernels @ inputs.transpose(1, 2)).sum(1).unflatten(2, size)


def _conv_xnnpack(x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
    """Only operators that XNNPACK computes, for one batch and size.

    They have at most six axes, slices have no steps, products two or three axes. Depthwise layers:
    shifted inputs times kernels, summed. Stride 1: the kernels of all taps times the input, then
    shifted sums. Other strides: a product a tap, summed.
    """
    part, batch, groups = spec.partition, x.shape[0], spec.groups
    taps, size = math.prod(part.kernel), spec.output_size(x.shape[2:])
    kernels = (alpha.flatten(0, 1).to(cells.dtype) @ cells).to(x.dtype)  # [B m, cell]
    each = math.prod(part.cell_kernel)
    if part.grid[2] > 1 or each > 1:
        kernels = kernels.view(-1, *part.grid[1:], part.cell_out, part.cell_in, each)
        kernels = kernels.permute(0, 5, 1, 3, 2, 4)  # [B S, k, GO, c_out, GI, c_in]
    if spec.is_depthwise and spec.out_channels == spec.in_channels:
        kernels = kernels.reshape(batch, taps, -1, *(1 for _ in size))
        column = _columns(x, spec, size)
        return _sum_of_taps(
            lambda k, tap: kernels.narrow(1, k, 1).flatten(0, 1) * column(tap), spec, size
        )
    kernels = kernels.reshape(batch, taps, groups, -1, spec.in_channels // groups)
    if groups > 1:
        kernels = kernels.transpose(1, 2)
    in_ = kernels.shape[-1]
    if taps > 1 and spec.has_no_stride:
        products = torch.bmm(
            kernels.reshape(batch * groups, -1, in_), x.reshape(-1, in_, x[0, 0].numel())
        )
        products = _padded(products.view(batch * groups, taps, -1, *x.shape[2:]), spec)
        last = len(size) - 1
        y = _sum_of_taps(
            lambda k, tap: _cut(products.narrow(1, k, 1), spec, size, last, tap[last]), spec, size
        )
    else:
        column, windows = _columns(x, spec, size), []
        for tap in _taps(spec):
            window = column(tap)
            for axis in range(len(size) - 1):
                window = _cut(window, spec, size, axis, tap[axis])
            windows.append(window.reshape(batch * groups, 1, in_, -1))
        columns = (torch.cat(windows, 1) if taps > 1 else windows[0]).flatten(0, 1)
        products = torch.bmm(kernels.reshape(len(columns), -1, in_), columns)
        products = products.unflatten(0, (-1, taps))
        y = _total(products.narrow(1, k, 1) for k in range(taps))
    return y.reshape(batch, spec.out_channels, *size)


def _taps(spec: ConvSpec) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, spec.partition.kernel))


def _padded(x: Tensor, spec: ConvSpec) -> Tensor:
    """The input ``[.., *size]`` with its padding, to a multiple of the stride."""
    sizes = zip(x.shape[-len(spec.stride) :], spec.padding, spec.stride, strict=True)
    sides = [(p, p + -(n + 2 * p) % s) for n, p, s in sizes]
    return (
        F.pad(x, [side for pair in reversed(sides) for side in pair]) if any(map(any, sides)) else x
    )


def _columns(x: Tensor, spec: ConvSpec, size: Sequence[int]) -> Callable[[tuple[int, ...]], Tensor]:
    """What a tap reads of the input ``[B, C, *input size]``, as a function of the tap: cut to the
    output's size along the last axis, along the others still whole.

    Taps that differ only in the other axes share one cut. Strides become axes, which need no slices
    with steps.
    """
    x, stride, dims = _padded(x, spec), spec.stride, len(spec.stride)
    if any(s > 1 for s in stride):
        for axis in range(dims):
            x = x.unflatten(2 + 2 * axis, (-1, stride[axis]))
        phases = range(3, x.dim(), 2)
        x = x.permute(0, 1, *phases, *(phase - 1 for phase in phases))

    @functools.cache
    def phase(*offsets: int) -> Tensor:
        part = x
        for axis, offset in enumerate(offsets if x.dim() > 2 + dims else ()):
            part = part.narrow(2 + axis, offset, 1)
        return part.reshape(*x.shape[:2], *x.shape[-dims:])

    @functools.cache
    def column(last: int, *offsets: int) -> Tensor:
        return _cut(phase(*offsets), spec, size, dims - 1, last)

    def of(tap: tuple[int, ...]) -> Tensor:
        return column(tap[-1], *map(operator.mod, map(operator.mul, tap, spec.dilation), stride))

    return of


def _cut(x: Tensor, spec: ConvSpec, size: Sequence[int], axis: int, tap: int) -> Tensor:
    """The positions along an axis that a tap reads."""
    return x.narrow(axis - len(size), tap * spec.dilation[axis] // spec.stride[axis], size[axis])


def _sum_of_taps(
    part: Callable[[int, tuple[int, ...]], Tensor], spec: ConvSpec, size: Sequence[int]
) -> Tensor:
    """The sum of all taps' parts. A part is cut along the last axis only; along the others the sums
    are cut, because there are fewer of them."""
    kernel = spec.partition.kernel
    number = {tap: k for k, tap in enumerate(_taps(spec))}

    def total(tap: tuple[int, ...]) -> Tensor:
        axis = len(tap)
        following = [(*tap, t) for t in range(kernel[axis])]
        if axis == len(kernel) - 1:
            return _total(part(number[each], each) for each in following)
        return _total(_cut(total(each), spec, size, axis, each[axis]) for each in following)

    return total(())


def _total(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(operator.add, parts)


def _conv_each(x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
    def step(carry: Tensor, sample: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        image, kernel = sample
        return carry.clone(), spec.conv(image.unsqueeze(0), kernel, spec.groups).squeeze(0)

    # scan() needs a carried value; no sample uses it.
    kernels = assemble(alpha, cells, spec).to(x.dtype)  # [B, C, 1, k..]
    return scan(step, x.new_zeros(1), (x, kernels))
