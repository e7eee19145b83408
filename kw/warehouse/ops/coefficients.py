"""From logits to a layer's coefficients: the contrasting function, annealed, without the null cell.

``alpha = (1 - tau) * z / (sum_p |z_p| + eps) + tau * beta`` (Eq. 5). Plain operators are the
definition: six launches forward and eleven backward, which is most of what an attention branch
costs on a GPU. There one Triton kernel a pass takes their place, after a trial (:mod:`.trials`).

Legend: B samples, m mixtures, n cells (the null cell not counted).
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...torch_private import is_traced
from .device import current_gpu
from .trials import Trials, attempt, difference, fault, tolerance
from .triton_launch import interpreted, kernel_module

EPS = 1e-3
"""Added to the denominator of the contrasting and the rectified function."""
_TILE = 2048  # values of a program: 16 of each of its threads
_MOST_CELLS = 8191
trials = Trials()


def contrasting(logits: Tensor) -> Tensor:
    """``z_j / (sum_p |z_p| + 1e-3)``: signed, so that cells can be subtracted."""
    return logits / (logits.abs().sum(-1, keepdim=True) + EPS)


def annealed(alpha: Tensor, one_hot: Tensor | None, temperature: Tensor | None) -> Tensor:
    """``(1 - tau) * alpha + tau * beta``, alpha ``[B, m, n]``, beta ``[m, n]``; without a
    temperature alpha as it is."""
    if temperature is None or one_hot is None:
        return alpha
    # A copy, since the buffer may change before the backward pass reads it.
    tau = temperature.to(alpha).clone()
    return torch.lerp(alpha, one_hot.to(alpha), tau)


def is_fused(
    logits: Tensor, one_hot: Tensor | None, temperature: Tensor | None, dtype: torch.dtype
) -> bool:
    """Whether :func:`fused_coefficients` takes these tensors; its kernels are tried if need be.

    Compilers and function transforms see plain operators, which compilers fuse themselves.

    Raises:
        DeviceLostError: the trial left the device unusable.
    """
    if not _is_supported(logits) or isinstance(_kernels(), str):
        return False
    if interpreted():
        return True
    mixtures, width = logits.shape[1:]
    is_annealed = one_hot is not None and temperature is not None
    with torch.cuda.device_of(logits):
        admitted = trials.admits(
            (_sizes(width)[1], is_annealed, dtype, current_gpu("cuda")),
            "cuda",
            lambda: fault(
                deviations(mixtures, width - 1, is_annealed, dtype, logits.device.type),
                tolerance(dtype, "cpu"),  # no product is rounded to TF32 here
            ),
            "the kernel of attention coefficients",
            lambda: f"{width - 1} cells, {mixtures} mixtures, {dtype}",
        )
    return bool(admitted)


def _is_supported(logits: Tensor) -> bool:
    return (
        (logits.is_cuda or interpreted())
        and type(logits) is Tensor
        and logits.dtype == torch.float32
        and logits.is_contiguous()
        and logits.numel() > 0
        and logits.shape[-1] <= _MOST_CELLS + 1
        and not is_traced()
    )


def deviations(
    mixtures: int, cells: int, is_annealed: bool, dtype: torch.dtype, device: str
) -> dict[str, float]:
    """Run the kernels on random logits of a few samples and compare with float64.

    Returns:
        For the coefficients and the logits' gradient the largest difference relative to the
        largest value.

    Raises:
        DeviceLostError: the device cannot be used any more.
        Exception: what a compiler, a driver or a library raises.
    """
    float32: Any = {"dtype": torch.float32, "device": device}  # torch's defaults may be others
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(3, mixtures, cells + 1, generator=generator, **float32)
    grad = torch.randn(3, mixtures, cells, generator=generator, **float32).to(dtype)
    one_hot = temperature = None
    if is_annealed:
        one_hot = torch.eye(cells, **float32)[torch.arange(mixtures, device=device) % cells]
        temperature = torch.tensor(0.3, **float32)

    def run() -> tuple[Tensor, Tensor]:
        alpha, kept = launch(logits, one_hot, temperature, dtype)
        return alpha, launch_gradient(grad, logits, kept)

    found = attempt(
        run,
        device,
        f"the kernel of attention coefficients, for {cells} cells, {mixtures} mixtures, {dtype},",
        "KW_FUSED_ATTENTION=0",
    )
    with torch.inference_mode(False), torch.enable_grad():
        exact = logits.double().requires_grad_()
        alpha = annealed(contrasting(exact)[..., :-1], one_hot, temperature)
        (into,) = torch.autograd.grad(alpha, exact, grad.double())
    names, expected = ("coefficients", "gradient of the logits"), (alpha.detach(), into)
    return {n: difference(a, b) for n, a, b in zip(names, found, expected, strict=True)}


def fused_coefficients(
    logits: Tensor, one_hot: Tensor | None, temperature: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """:func:`contrasting` without the null cell, then :func:`annealed`, one launch a pass: of
    logits ``[B, m, n + 1]``, float32 and contiguous. The result ``[B, m, n]`` lies in memory as
    ``[n, B, m]``."""
    if temperature is None or one_hot is None:
        one_hot = temperature = None
    else:
        one_hot = one_hot.contiguous()
    result: Tensor = _Coefficients.apply(logits, one_hot, temperature, dtype)
    return result


class _Coefficients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        one_hot: Tensor | None,
        temperature: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        alpha, kept = launch(logits, one_hot, temperature, dtype)
        ctx.save_for_backward(logits, kept)
        return alpha

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of gradients follows
            own = torch.zeros_like(grad[0]).float()
            alpha = annealed(contrasting(logits)[..., :-1], own, kept)
            (into,) = torch.autograd.grad(alpha, logits, grad.float(), create_graph=True)
            return into, None, None, None
        return launch_gradient(grad, logits, kept), None, None, None


def launch(
    logits: Tensor, one_hot: Tensor | None, temperature: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The coefficients, and tau as it was."""
    batch, mixtures, width = logits.shape
    cells, rows = width - 1, batch * mixtures
    alpha = logits.new_empty(cells, batch, mixtures, dtype=dtype)
    kept = None if temperature is None else logits.new_empty(())
    per_program, columns = _sizes(width)
    kernels = _kernels()
    with torch.cuda.device_of(logits):
        kernels.coefficients[(-(-rows // per_program),)](
            logits, one_hot, temperature, alpha, kept, rows, mixtures, cells,
            EPS=EPS, ANNEALED=kept is not None, ROWS=per_program, CELLS=columns, num_warps=4,
        )  # fmt: skip
    return alpha.permute(1, 2, 0), kept


def launch_gradient(grad: Tensor, logits: Tensor, kept: Tensor | None) -> Tensor:
    """The gradient of the logits for ``grad [B, m, n]``."""
    rows, width = logits.shape[0] * logits.shape[1], logits.shape[-1]
    grad = grad.flatten(0, 1)  # an axis of length 1 may have any stride, also where contiguous
    into = torch.empty_like(logits)
    per_program, columns = _sizes(width)
    kernels = _kernels()
    with torch.cuda.device_of(logits):
        kernels.coefficients_gradient[(-(-rows // per_program),)](
            grad, logits, kept, into, rows, width - 1, *grad.stride(),
            EPS=EPS, ANNEALED=kept is not None, ROWS=per_program, CELLS=columns, num_warps=4,
        )  # fmt: skip
    return into


def _sizes(width: int) -> tuple[int, int]:
    """Rows and columns of a program's tile, powers of two."""
    columns = max(1 << (width - 1).bit_length(), 16)
    return max(min(_TILE // columns, 64), 1), columns


@cache
def _kernels() -> Any:
    """The kernels or, as text, why there are none."""
    if os.environ.get("KW_FUSED_ATTENTION") == "0":
        return "KW_FUSED_ATTENTION is 0"
    return kernel_module("triton_coefficients")
