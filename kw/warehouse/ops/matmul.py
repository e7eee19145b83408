"""The fastest matrix products of the installed libraries.

For float32 on CPU that is oneDNN's linear layer: on AMD processors it is two to three times faster
than MKL's product, which ``torch.mm`` calls. It is a private operator of PyTorch, hence the
self-test; ``torch.mm`` is used where it fails.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ...torch_private import onednn_linear

Product = Callable[[Tensor, Tensor], Tensor]

# Multiply-adds below which the call costs more than the arithmetic.
SMALL = 1 << 14
# Summed values that are converted to float32 at a time; the copies stay in the caches.
PIECE = 1 << 12


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a [M, K] @ b [K, N]``; either may be transposed in memory."""
    fast = _onednn() if _is_candidate(a, b) else None
    if fast is None or a.shape[0] * a.shape[1] * b.shape[1] < SMALL:
        return torch.mm(a, b)
    return fast(_dense(a), _dense(b))


def batch_matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a [B, M, K] @ b [B, K, N]``; either may be transposed in memory or expanded over B. The
    result is written to ``out``, rows or columns of larger matrices perhaps, if it is given."""
    fast = _onednn() if _is_candidate(a, b) else None
    if fast is None or a.shape[1] * a.shape[2] * b.shape[2] < SMALL:
        return torch.bmm(a, b) if out is None else torch.bmm(a, b, out=out)
    if len(a) == 1 and out is None:
        return fast(_dense(a[0]), _dense(b[0])).unsqueeze(0)
    if out is None:
        out = a.new_empty(len(a), a.shape[1], b.shape[2])
    for i in range(len(a)):
        out[i] = fast(_dense(a[i]), _dense(b[i]))
    return out


def float32_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a [M, K] @ b [K, N]`` with the result in float32 also where the matrices have 16 bit.

    For long sums: a GPU's library divides them among multiprocessors and may round every part to 16
    bit. On AMD's GPUs, whose libraries cannot, the result is converted. On CPUs the operands are,
    some at a time, which takes longer than a product in 16 bit.
    """
    if a.dtype not in (torch.bfloat16, torch.float16):
        return matmul(a, b)
    if a.device.type == "cuda" and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    if a.device.type != "cpu":
        return matmul(a, b).float()
    total = a.new_zeros(a.shape[0], b.shape[1], dtype=torch.float32)
    for start in range(0, a.shape[1], PIECE):
        some = slice(start, start + PIECE)
        total += matmul(a[:, some].float(), b[some].float())
    return total


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to ``total``."""
    if _is_candidate(a, b) or total.dtype != a.dtype:
        total += matmul(a, b)
    else:
        total.addmm_(a, b)


def _is_candidate(a: Tensor, b: Tensor) -> bool:
    return a.device.type == "cpu" and a.dtype == b.dtype == torch.float32


def _dense(a: Tensor) -> Tensor:
    """The matrix without gaps between its rows or columns: with gaps oneDNN was measured to be a
    hundred times slower."""
    return a if a.is_contiguous() or a.t().is_contiguous() else a.contiguous()


@lru_cache(maxsize=1)
def _onednn() -> Product | None:
    """oneDNN's product if this build of PyTorch has one that gives the right result."""
    product = onednn_linear()
    if product is None:
        return None
    try:
        # Whatever torch's default type and device are.
        a = torch.arange(6, dtype=torch.float32, device="cpu").view(2, 3)
        b = torch.arange(12, dtype=torch.float32, device="cpu").view(3, 4) - 5
        right = all(
            torch.equal(product(left, other), a @ b)
            for left in (a, a.t().contiguous().t())
            for other in (b, b.t().contiguous().t())
        )
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    return product if right else None
