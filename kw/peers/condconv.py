"""CondConv: kernels mixed by independent gates.

Paper: CondConv: Conditionally Parameterized Convolutions for Efficient Inference (Yang et al.,
NeurIPS 2019, arXiv 1904.04971), layer and routing function::

    y = sigma((alpha_1 W_1 + ... + alpha_K W_K) * x)
    alpha = sigmoid(GlobalAveragePool(x) R)

There is no temperature: the gates do not compete. A linear layer is a 1x1 convolution. Gates of a
converted static network start at 1/2, so that its kernels are ``2 / K`` times the static ones.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ..warehouse import KernelShape, KWLinear
from .mixture import MixtureAttention, MixtureConv2d, MixtureLayer, silence


class Routing(MixtureAttention):
    """Gates of K kernels ("experts") from a pooled input, one linear map."""

    has_temperature = False

    def __init__(self, shape: KernelShape, kernels: int, **place: Any) -> None:
        super().__init__()
        # nn.Linear's own initialisation: all gates start near one half.
        self.fc = nn.Linear(shape.in_channels, kernels, **place)

    def attend(self, pooled: Tensor, tau: Tensor | None) -> Tensor:
        """``[B, I]`` -> ``[B, 1, K]``."""
        return self.fc(pooled).sigmoid().unsqueeze(1)

    def hold(self) -> float:
        """All gates at 1/2."""
        silence(self.fc)
        return 2 / self.fc.out_features


class CondConv2d(MixtureConv2d):
    """``nn.Conv2d`` with K kernels mixed by sigmoid gates; the same arguments, then keywords:

    Args:
        kernels: number K of kernels; 8 in the paper.
    """

    branch = Routing
    defaults: ClassVar[dict[str, Any]] = {"kernels": 8}


class CondLinear(MixtureLayer, KWLinear):
    """``nn.Linear`` with K weights mixed by sigmoid gates; the same arguments, then keywords:

    Args:
        kernels: number K of weights; 8 in the paper.
    """

    branch = Routing
    defaults = CondConv2d.defaults
