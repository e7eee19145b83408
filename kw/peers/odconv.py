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
    ``a_c``
does the same. T falls linearly from 30 to 1 over the first 10 epochs: ``T = 1 + 29 tau``
(:mod:`kw.peers.mixture`).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ..warehouse import KernelShape
from ..warehouse.attention import BranchLinear, normalise
from .mixture import MixtureAttention, MixtureConv2d, initialise, logit_scale, silence

__all__ = ["ODConv2d", "OmniAttention"]


class Attentions(NamedTuple):
    """The output of :class:`OmniAttention`.

    Attributes:
        alpha: coefficients of the cells, ``[B, S, S * K]``.
        channel: factors of the input, ``[B, I]``.
        filter: factors of the output, ``[B, O]``, or ``None`` in a depthwise layer.
    """

    alpha: Tensor
    channel: Tensor
    filter: Tensor | None


class OmniAttention(MixtureAttention):
    """The four attentions of a layer.

    Those along space and kernels become coefficients of a spatially partitioned warehouse: the
    mixture at position s has ``a_s[s] * a_k[k]`` for the cells of its own position and zero for all
    others. Scaling the assembled kernels instead would keep all samples' kernels twice for the
    backward pass.

    Args:
        shape: the layer's kernel.
        kernels: number K of kernels.
        reduction: ``h = max(int(I * reduction), 16)`` hidden units.
    """

    by_position = True

    def __init__(
        self,
        shape: KernelShape,
        kernels: int,
        reduction: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        channels, positions = shape.in_channels, math.prod(shape.kernel)
        is_depthwise = shape.groups == channels == shape.out_channels
        hidden = max(int(channels * reduction), 16)

        def head(size: int, wanted: bool) -> nn.Linear | None:
            return BranchLinear(hidden, size, **factory) if wanted else None

        self.fc = BranchLinear(channels, hidden, bias=False, **factory)
        self.norm = nn.BatchNorm1d(hidden, **factory)
        self.channel_fc = BranchLinear(hidden, channels, **factory)
        self.filter_fc = head(shape.out_channels, not is_depthwise)
        self.spatial_fc = head(positions, positions > 1)
        self.kernel_fc = head(kernels, kernels > 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-normal (fan out, ReLU) weights, zero biases."""
        initialise(self.fc, self.channel_fc, self.filter_fc, self.spatial_fc, self.kernel_fc)
        self.norm.reset_parameters()

    def attend(self, pooled: Tensor, tau: Tensor | None) -> Attentions:
        """``[B, I]`` -> coefficients and factors."""
        hidden = normalise(self.norm, self.fc(pooled)).relu()
        scale = logit_scale(tau)
        one = hidden.new_ones(hidden.shape[0], 1)
        space = kernel = one
        if self.spatial_fc is not None:
            space = (self.spatial_fc(hidden) / scale).sigmoid()  # [B, S]
        if self.kernel_fc is not None:
            kernel = (self.kernel_fc(hidden) / scale).softmax(-1)  # [B, K]
        # Cell s * K + k is position s of kernel k.
        own = torch.eye(space.shape[1], dtype=space.dtype, device=space.device)
        alpha = (space.unsqueeze(2) * own).unsqueeze(3) * kernel[:, None, None]  # [B, S, S, K]
        channel = (self.channel_fc(hidden) / scale).sigmoid()
        filters = None
        if self.filter_fc is not None:
            filters = (self.filter_fc(hidden) / scale).sigmoid()
        return Attentions(alpha.flatten(2), channel, filters)

    def hold(self) -> float:
        """All factors at 1/2, all coefficients of kernels at 1/K."""
        factors = (self.channel_fc, self.filter_fc, self.spatial_fc)
        silence(*(head for head in (*factors, self.kernel_fc) if head is not None))
        return 2.0 ** sum(head is not None for head in factors)


class ODConv2d(MixtureConv2d):
    """``nn.Conv2d`` with attention along all axes; the same arguments, then keywords:

    Args:
        kernels: number K of kernels; 1 and 4 in the paper.
        reduction: hidden units of the attention per input channel, at least 16 units.
        name: the layer's name, for messages.

    Raises:
        ValueError: settings that cannot be.
    """

    branch = OmniAttention
    defaults: ClassVar[dict[str, Any]] = {"kernels": 1, "reduction": 0.0625}

    def forward(self, input: Tensor) -> Tensor:
        """``[B, I, H, W]`` -> ``[B, O, H', W']``.

        Raises:
            ValueError: an input without a batch axis: kernels belong to samples.
        """
        if isinstance(input, Proxy):
            return self.as_leaf(input)
        x = input  # named as torch's layers name it
        alpha, channel, filters = self.attention(self.pooled(x), self.warehouse.temperature)
        x = x * channel.to(x.dtype)[..., None, None]
        y = self.convolve(x, alpha) if alpha.shape[2] > 1 else self._convolve_alike(x)
        if filters is not None:
            y = y * filters.to(y.dtype)[..., None, None]
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]

    def _convolve_alike(self, x: Tensor) -> Tensor:
        """A single pointwise kernel, which is the same for all samples: no back end is needed."""
        spec = self.spec
        kernel = self.warehouse.cells.view(spec.partition.kernel_shape)
        slide = (spec.stride, spec.padding, spec.dilation, spec.groups)
        return F.conv2d(self.pad(x), kernel, None, *slide)
