"""The autograd function around all back ends; only the three inputs are stored.

Under ``torch.compile`` it is an operator of ``torch.library``: one node instead of the selector's
branches (one graph, no breaks), and CUDA graphs capture what the chosen back end launches.
Otherwise a ``torch.autograd.Function``, whose calls are cheaper, runs the same two functions. Under
``torch.func`` and in forward mode it is plain operators.

The back end is chosen at run time from real shapes. The backward pass may use another one, because
it needs no intermediate results of the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...torch_private import in_function_transform, is_watched
from .backends import selector
from .bmm import conv_bmm
from .contraction import Gradients, Needs, Problem, SummingContraction, check_operands
from .layout import empty, laid_out, lies_channels_last
from .precision import as_convolutions_round
from .spec import ConvSpec
from .summing import anchor_of, sum_of


def contract(
    x: Tensor,
    alpha: Tensor,
    cells: Tensor,
    spec: ConvSpec,
    backend: str,
    rounded: Tensor | None = None,
) -> Tensor:
    """The contraction by a back end of :data:`CONTRACTIONS` or by the selector's choice.

    Args:
        x: ``[B, I, *space]``.
        alpha: ``[B, m, n]``.
        cells: ``[n, cell]``, of x's dtype or float32.
        spec: the layer.
        backend: a name, or ``"auto"``.
        rounded: the cells in x's dtype, where they are in another and :func:`may_share` says so.
            They are computed with; gradients are those of ``cells``, in their dtype.

    Returns:
        ``[B, O, *output space]``, laid out as the input: contiguous or channels last. Under
        ``torch.func`` and in forward mode: by plain operators, without a back end, contiguous.
    """
    if not torch.compiler.is_compiling() and in_function_transform():
        check_operands(x, alpha, cells, spec)
        with _outside_autocast(x):
            return conv_bmm(x, alpha, cells, spec)
    if torch.compiler.is_compiling() or not _is_plain(x) or is_watched():
        return torch.ops.kw.dynamic_conv(x, alpha, cells, spec.encode(), backend)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, alpha, cells)):
        return _DynamicConv.apply(x, alpha, cells, spec, backend, anchor_of(cells), rounded)
    return _run(x, alpha, cells if rounded is None else rounded, spec, backend)


def may_share(x: Tensor, cells: Tensor) -> bool:
    """Whether :func:`contract` takes cells that were rounded outside of autograd.

    Compilers and function transforms see the rounding instead: a compiler does it once itself.
    """
    return (
        type(cells) is torch.nn.Parameter
        and _is_plain(x)
        and not torch.compiler.is_compiling()
        and not in_function_transform()
        and not is_watched()
    )


def _is_plain(x: Tensor) -> bool:
    return type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta


def _run(x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec, backend: str) -> Tensor:
    check_operands(x, alpha, cells, spec)  # before the selector reads shapes
    if len(x) == 0:  # as static layers do; a detector's head may get no regions
        return empty(x, spec.out_channels, spec.output_size(x.shape[2:]), lies_channels_last(x))
    with _settled(x):
        contraction = selector.choose(_problem(x, cells, spec), backend)
        return laid_out(contraction.forward(x, alpha, cells, spec), lies_channels_last(x))


def _run_backward(
    grad: Tensor,
    x: Tensor,
    alpha: Tensor,
    cells: Tensor,
    spec: ConvSpec,
    backend: str,
    needs: Needs,
    anchor: Tensor | None = None,
) -> Gradients:
    check_operands(x, alpha, cells, spec, grad)
    if len(x) == 0:
        operands = zip((x, alpha, cells), needs, strict=True)
        dx, dalpha, dcells = (torch.zeros_like(t) if n else None for t, n in operands)
        return dx, dalpha, dcells
    with _settled(x):
        contraction = selector.choose(_problem(x, cells, spec, training=True), backend)
        arguments = (grad, x, alpha, cells, spec, needs)
        total = sum_of(anchor) if needs[2] else None
        if isinstance(contraction, SummingContraction):
            dx, dalpha, dcells = contraction.backward_summing(*arguments, total)
        else:
            dx, dalpha, dcells = contraction.backward(*arguments)
            if total is not None and dcells is not None:
                total.add(dcells)
                dcells = None
    return (
        None if dx is None else laid_out(dx, lies_channels_last(x)),
        dalpha,
        None if dcells is None else dcells.contiguous(),
    )


@torch.library.custom_op(
    "kw::dynamic_conv",
    mutates_args=(),
    schema="(Tensor x, Tensor alpha, Tensor cells, int[] spec, str backend) -> Tensor",
)
def _dynamic_conv(
    x: Tensor, alpha: Tensor, cells: Tensor, spec: Sequence[int], backend: str
) -> Tensor:
    return _run(x, alpha, cells, ConvSpec.decode(spec), backend)


@_dynamic_conv.register_fake
def _(x: Tensor, alpha: Tensor, cells: Tensor, spec: Sequence[int], backend: str) -> Tensor:
    decoded = ConvSpec.decode(spec)
    check_operands(x, alpha, cells, decoded)
    size = decoded.output_size(x.shape[2:])
    return empty(x, decoded.out_channels, size, lies_channels_last(x))


@torch.library.custom_op(
    "kw::dynamic_conv_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor alpha, Tensor cells, int[] spec, str backend, "
    "bool[] needs) -> (Tensor, Tensor, Tensor)",
)
def _dynamic_conv_backward(
    grad: Tensor,
    x: Tensor,
    alpha: Tensor,
    cells: Tensor,
    spec: Sequence[int],
    backend: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    none = x.new_empty(0)
    wanted = (needs[0], needs[1], needs[2])
    results = _run_backward(grad, x, alpha, cells, ConvSpec.decode(spec), backend, wanted)
    dx, dalpha, dcells = (none.clone() if result is None else result for result in results)
    return dx, dalpha.contiguous(), dcells


@_dynamic_conv_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    alpha: Tensor,
    cells: Tensor,
    spec: Sequence[int],
    backend: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dx = empty(x, x.shape[1], x.shape[2:], lies_channels_last(x))
    return (
        dx if needs[0] else x.new_empty(0),
        alpha.new_empty(alpha.shape) if needs[1] else x.new_empty(0),
        cells.new_empty(cells.shape) if needs[2] else x.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, alpha, cells, ctx.spec, ctx.backend = inputs
    ctx.save_for_backward(x, alpha, cells)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, alpha, cells = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():
        found = _differentiable((x, alpha, cells), ConvSpec.decode(ctx.spec), needs, grad)
        return *found, None, None
    op = torch.ops.kw.dynamic_conv_backward
    results = op(grad, x, alpha, cells, ctx.spec, ctx.backend, list(needs))
    return *(g if needed else None for g, needed in zip(results, needs, strict=True)), None, None


@register_flop_formula(torch.ops.kw.dynamic_conv, get_raw=True)
def _flops(
    x: Tensor, alpha: Tensor, cells: Tensor, spec: Sequence[int], backend: str, **_: Any
) -> int:
    """Two operations for each multiply-add of assembly and convolution."""
    problem = _problem(x, cells, ConvSpec.decode(spec))
    return 2 * (problem.assembly_macs + problem.conv_macs)


@register_flop_formula(torch.ops.kw.dynamic_conv_backward, get_raw=True)
def _backward_flops(
    grad: Tensor,
    x: Tensor,
    alpha: Tensor,
    cells: Tensor,
    spec: Sequence[int],
    backend: str,
    needs: Sequence[bool],
    **_: Any,
) -> int:
    """Assembly and input gradient, kernel gradient, gradients of coefficients and cells."""
    problem = _problem(x, cells, ConvSpec.decode(spec))
    convolutions = needs[0] + (needs[1] or needs[2])
    return 2 * (sum(needs) * problem.assembly_macs + convolutions * problem.conv_macs)


_dynamic_conv.register_autograd(_backward, setup_context=_setup_context)


class _DynamicConv(torch.autograd.Function):
    """The same outside of ``torch.compile``; the anchor is its cells' (:mod:`.summing`)."""

    @staticmethod
    def forward(
        x: Tensor,
        alpha: Tensor,
        cells: Tensor,
        spec: ConvSpec,
        backend: str,
        anchor: Tensor | None,
        rounded: Tensor | None,
    ) -> Tensor:
        return _run(x, alpha, cells if rounded is None else rounded, spec, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, alpha, cells, ctx.spec, ctx.backend, ctx.anchor, rounded = inputs
        ctx.save_for_backward(x, alpha, cells if rounded is None else rounded)
        # Not saved: as static layers under autocast, it allows cells to change before the backward
        # pass. Only gradients of gradients read it.
        ctx.cells = None if rounded is None else cells

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha, cells = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            if ctx.cells is not None:
                cells = ctx.cells.to(cells.dtype)
            found = _differentiable((x, alpha, cells), ctx.spec, needs, grad)
        else:
            found = _run_backward(grad, x, alpha, cells, ctx.spec, ctx.backend, needs, ctx.anchor)
        dx, dalpha, dcells = found
        if dcells is not None and ctx.cells is not None:
            dcells = dcells.to(ctx.cells.dtype)
        return dx, dalpha, dcells, None, None, None, None


def _differentiable(
    tensors: tuple[Tensor, ...], spec: ConvSpec, needs: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of the operands that can be differentiated again (``create_graph``)."""
    # Aliases, because coefficients depend on the input: only this function's own gradient counts.
    x, alpha, cells = aliases = [t.view_as(t) for t in tensors]
    wanted = [t for t, needed in zip(aliases, needs, strict=True) if needed]
    with _outside_autocast(x):
        y = conv_bmm(x, alpha, cells, spec)
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return tuple(next(found) if needed else None for needed in needs)


def _problem(x: Tensor, cells: Tensor, spec: ConvSpec, training: bool = False) -> Problem:
    return Problem(
        spec,
        len(cells),
        len(x),
        tuple(x.shape[2:]),
        x.dtype,
        x.device.type,
        training,
        lies_channels_last(x),
        None if cells.dtype == x.dtype else cells.dtype,
    )


@contextmanager
def _settled(x: Tensor) -> Iterator[None]:
    """On the input's device, without autograd, in types and precisions that are final."""
    with torch.no_grad(), _outside_autocast(x), torch.cuda.device_of(x), as_convolutions_round(x):
        yield


def _outside_autocast(x: Tensor) -> AbstractContextManager[Any]:
    # The types are final; autocast would change them again.
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
