"""DY-Conv: kernels mixed by squeeze-and-excitation and a softmax.

Paper: Dynamic Convolution: Attention over Convolution Kernels (Chen et al., CVPR 2020,
arXiv 1912.03458), dynamic convolution and its attention::

    y = W(x) * x + b(x),  W(x) = sum_k pi_k(x) W_k,  b(x) = sum_k pi_k(x) b_k
    pi = softmax(z / T),  z = fc2(relu(fc1(GlobalAveragePool(x))))

T falls linearly from 30 to 1 over the first 10 epochs: nearly uniform coefficients train all
kernels early on. ``T = 1 + 29 tau`` (:mod:`kw.peers.mixture`).
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ..warehouse import KernelShape
from ..warehouse.attention import BranchLinear
from .mixture import MixtureAttention, MixtureConv2d, initialise, logit_scale, silence


class SqueezeSoftmax(MixtureAttention):
    """Coefficients of K kernels that compete; ``max(int(I * reduction), 1)`` hidden units."""

    def __init__(self, shape: KernelShape, kernels: int, reduction: float, **place: Any) -> None:
        super().__init__()
        hidden = max(int(shape.in_channels * reduction), 1)
        self.fc = BranchLinear(shape.in_channels, hidden, **place)
        self.kernel_fc = BranchLinear(hidden, kernels, **place)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialise(self.fc, self.kernel_fc)

    def attend(self, pooled: Tensor, tau: Tensor | None) -> Tensor:
        """``[B, I]`` -> ``[B, 1, K]``."""
        logits = self.kernel_fc(self.fc(pooled).relu())
        return (logits / logit_scale(tau)).softmax(-1).unsqueeze(1)

    def hold(self) -> float:
        """All coefficients at 1/K."""
        silence(self.kernel_fc)
        return 1.0


class DyConv2d(MixtureConv2d):
    """``nn.Conv2d`` with K kernels mixed by a softmax; the same arguments, then keywords:

    Args:
        kernels: number K of kernels; 4 in the paper.
        reduction: hidden units of the attention per input channel.
    """

    branch = SqueezeSoftmax
    defaults: ClassVar[dict[str, Any]] = {"kernels": 4, "reduction": 0.25}

    def take_bias(self, bias: nn.Parameter) -> None:
        """Give every kernel a bias ``b_k`` of its own, ``[K, O]``, that starts as the given one."""
        self.bias = nn.Parameter(bias.detach().repeat(self.warehouse.kernels, 1))

    def compute(self, x: Tensor) -> Tensor:
        pi = self.attention(self.pooled(x), self.warehouse.temperature)
        y = self.convolve(x, pi)
        if self.bias is None:
            return y
        bias = pi[:, 0].to(self.bias.dtype) @ self.bias  # [B, O]
        return y + bias.to(y.dtype)[..., None, None]
