"""ODConv: attention along all four axes of the kernels.

Paper: Omni-Dimensional Dynamic Convolution (Li et al., ICLR 2022,
https://openreview.net/forum?id=DmpCfq6Mg39), Eq. 2, with the attentions along space, channels and
filters shared by the K kernels, which agrees with the published sizes::

    y = a_f . ((sum_k a_k (a_s . W_k)) * (a_c . x))

``a_s`` has a factor for every position of the kernel, ``a_c`` for every input channel, ``a_f`` for
every output channel (filter), ``a_k`` for every kernel. Multiplying input and output by ``a_c`` and
``a_f`` is the same as multiplying the kernel's axes, and cheaper.

All four come from ``h = relu(BatchNorm(fc(GlobalAveragePool(x))))`` by one linear map each:
``a_c, a_f, a_s = sigmoid(z / T)``, ``a_k = softmax(z / T)``. Attentions of one element are left
out: ``a_s`` of pointwise kernels and ``a_k`` for K = 1; so is ``a_f`` of depthwise layers, where
``a_c`` does the same. T falls linearly from 30 to 1 over the first 10 epochs: ``T = 1 + 29 tau``
(:mod:`kw.peers.mixture`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..warehouse import KernelShape
from .mixture import Attentions, AxisAttention, MixtureConv2d, logit_scale, scaled, silence


class OmniAttention(AxisAttention):
    """The four attentions of a layer.

    Those along space and kernels become coefficients of a spatially partitioned warehouse: the
    mixture at position s has ``a_s[s] * a_k[k]`` for the cells of its own position and zero for all
    others. Scaling the assembled kernels instead would keep all samples' kernels twice for the
    backward pass.
    """

    by_position = True

    def __init__(self, shape: KernelShape, kernels: int, reduction: float, **place: Any) -> None:
        super().__init__(shape, reduction, kernels if kernels > 1 else 0, spatial=True, **place)
        self.reset_parameters()

    def attend(self, pooled: Tensor, tau: Tensor | None) -> Attentions:
        hidden = self.hidden(pooled)
        scale = logit_scale(tau)
        channel, filters, space = self.factors(hidden, lambda z: (z / scale).sigmoid())
        kernel = one = hidden.new_ones(hidden.shape[0], 1)
        if self.kernel_fc is not None:
            kernel = (self.kernel_fc(hidden) / scale).softmax(-1)  # [B, K]
        space = one if space is None else space  # [B, S]
        # Cell s * K + k is position s of kernel k.
        own = torch.eye(space.shape[1], dtype=space.dtype, device=space.device)
        alpha = (space.unsqueeze(2) * own).unsqueeze(3) * kernel[:, None, None]  # [B, S, S, K]
        return Attentions(alpha.flatten(2), channel, filters)

    def hold(self) -> float:
        """All factors at 1/2, all coefficients of kernels at 1/K."""
        silence(*self.heads())
        return 2.0 ** sum(head is not self.kernel_fc for head in self.heads())


class ODConv2d(MixtureConv2d):
    """``nn.Conv2d`` with attention along all axes; the same arguments, then keywords:

    Args:
        kernels: number K of kernels; 1 and 4 in the paper.
        reduction: hidden units of the attention per input channel, at least 16 units.
    """

    branch = OmniAttention
    defaults: ClassVar[dict[str, Any]] = {"kernels": 1, "reduction": 0.0625}

    def compute(self, x: Tensor) -> Tensor:
        found = self.attention(self.pooled(x), self.warehouse.temperature)
        x, alpha = scaled(x, found.channel), found.alpha
        y = self.convolve(x, alpha) if alpha.shape[2] > 1 else self._convolve_alike(x)
        return self.add_bias(scaled(y, found.filter))

    def _convolve_alike(self, x: Tensor) -> Tensor:
        """A single pointwise kernel, which is the same for all samples: no back end is needed."""
        kernel = self.warehouse.cells.view(self.partition.kernel_shape)
        return self.spec.conv(self.pad(x), kernel, self.groups)
