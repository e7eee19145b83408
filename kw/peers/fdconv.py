"""FDConv: one kernel's frequencies as the kernels that are mixed, modulated densely.

Paper: Frequency Dynamic Convolution for Dense Image Prediction (Chen et al., CVPR 2025,
arXiv 2503.18783). Its three parts:

**Fourier disjoint weight.** The parameters are the Fourier coefficients ``P`` of the kernel as a
matrix ``[k O, k I]``, of which every k x k patch is a filter; their indices are sorted by frequency
into n = 64 disjoint groups, and kernel ``W_i`` is the inverse transform of group i alone::

    W(x) = sum_i pi_i(x) W_i,  W_i = F^-1(P at group i, 0 elsewhere)

The groups are disjoint, so the sum is one inverse transform of P with every group scaled by its
``pi_i``. That is what is computed, one transform a sample: the n kernels themselves would take n
times the kernel's memory, and n times its size in multiply-adds a sample to mix.

**Kernel spatial modulation.** From the pooled input g, a factor for every value of the kernel::

    W'(x) = W(x) . d(x) . a_c(x) . a_f(x) . a_s(x)

``d`` ``[O, I, k, k]`` is the local branch, a 1-D convolution of g along channels with k k O
outputs; input channels ``a_c``, filters ``a_f``, positions ``a_s`` and ``pi`` are the global
branch, linear maps of ``h = relu(BatchNorm(fc(g)))``.

**Frequency band modulation** of kernels larger than 1x1: the input's bands X_b, in octaves, are
weighted at every place before the convolution, ``y = W' * sum_b A_b . X_b``; ``A_b``, one map a
band, comes from a 3x3 convolution of the input.

What the paper's text does not settle, and what is done here. P is kept as Hartley coefficients,
the real form of Fourier's, so that parameters are as many as a static kernel's, and any static
kernel can be kept. Frequencies are measured in cycles a value along each axis. Every factor is
``2 sigmoid(z)``: 1 at z = 0, no competition between frequencies, no temperature. The 1-D
convolution is as long as ECA-Net's (arXiv 1910.03151). By default all convolutions but the first
and the shortcuts' are converted, which gives the published parameters: ResNet50 +3.62M (+3.6M).

The network begins as the static one where it is converted: all factors are 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..warehouse import KernelShape
from ..warehouse.attention import full_precision
from ..warehouse.ops.precision import compute_types
from ..warehouse.start import exact_kernel
from .assembled import Operands, convolve_assembled
from .mixture import Attentions, AxisAttention, MixtureConv2d, modulation, scaled, silence
from .spectrum import BANDS, frequency_groups, hartley, low_passes, spectrum_parts


class KernelModulation(AxisAttention):
    """Kernel spatial modulation, and the factors of the n groups of frequencies."""

    has_temperature = False
    divides = True

    def __init__(self, shape: KernelShape, kernels: int, reduction: float, **place: Any) -> None:
        super().__init__(shape, reduction, kernels, spatial=True, **place)
        length = local_length(shape.in_channels)
        # A group's channels are convolved by themselves, as its filters read them.
        self.local = nn.Conv1d(
            shape.groups,
            shape.out_channels * math.prod(shape.kernel),
            length,
            padding=length // 2,
            groups=shape.groups,
            **place,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.local.reset_parameters()

    def attend(self, pooled: Tensor, tau: Tensor | None) -> Attentions:
        """``[B, I]`` -> the global branch's factors; kernels are assembled with the local one's."""
        hidden = self.hidden(pooled)
        alpha = modulation(self.kernel_fc(hidden)).unsqueeze(1)
        return Attentions(alpha, *self.factors(hidden, modulation))

    def hold(self) -> float:
        """All factors at 1."""
        silence(self.local, *self.heads())
        return 1.0


def local_length(channels: int) -> int:
    """Length of the 1-D convolution: the odd number that ECA-Net takes, ``(log2 I + 1) / 2``."""
    length = int((math.log2(channels) + 1) / 2)
    return max(length + 1 - length % 2, 1)


class FrequencyBands(nn.Module):
    """Frequency band modulation: weights the bands of an image at every place."""

    def __init__(
        self,
        channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, len(BANDS) + 1, 3, padding=1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, I, H, W]`` -> the same."""
        maps = modulation(self.conv(x)).to(x.dtype).unsqueeze(2)  # [B, bands, 1, H, W]
        # sum_b A_b (L_b - L_(b-1)), with L_b the image below limit b, the last the image itself.
        y = maps[:, -1] * x
        for band, low in enumerate(low_passes(x)):
            y = y + (maps[:, band] - maps[:, band + 1]) * low
        return y


class FDConv2d(MixtureConv2d):
    """``nn.Conv2d`` with kernels made of modulated frequencies; the same arguments, then keywords:

    Args:
        kernels: number n of groups of frequencies; 64 in the paper.
        reduction: hidden units of the global branch per input channel, at least 16 units.

    Raises:
        ValueError: more groups than the kernel has frequencies; or as for its base.
    """

    is_mixture = False
    branch = KernelModulation
    defaults: ClassVar[dict[str, Any]] = {"kernels": 64, "reduction": 0.0625}

    group: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        place: dict[str, Any] = {"device": self.warehouse.cells.device}
        out, in_, height, width = self.partition.kernel_shape
        self._matrix = (out * height, in_ * width)
        self.register_buffer("group", self._groups().to(**place), persistent=False)
        self._lacks_groups = self.group.is_meta  # since it was there, and not filled since
        self.register_load_state_dict_post_hook(_restore_groups)
        self.bands: FrequencyBands | None = None
        if math.prod(self.kernel_size) > 1:
            dtype = self.warehouse.cells.dtype
            self.bands = FrequencyBands(self.in_channels, dtype=dtype, **place)

    def _groups(self) -> Tensor:
        try:
            return frequency_groups(*self._matrix, self.warehouse.kernels)
        except ValueError as error:
            raise ValueError(
                f"layer {self.shape.name!r}: {error}; set a smaller 'kernels', or leave the layer "
                "static by 'layers'"
            ) from None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FDConv2d:
        super()._apply(fn, recurse)
        self._lacks_groups |= self.group.is_meta
        return self

    def compute(self, x: Tensor) -> Tensor:
        if self._lacks_groups:
            _restore_groups(self)
        pooled = self.pooled(x)
        found = self.attention(pooled, None)
        if self.bands is not None:
            x = self.bands(x)
        y = self._convolve(self.pad(scaled(x, found.channel)), pooled, found)
        return self.add_bias(scaled(y, found.filter))

    @property
    def assembly_macs(self) -> int:
        """Multiply-adds a sample of its kernel: the 1-D convolution, a product with each factor,
        and a real transform of N values as ``5/4 N log2 N``."""
        numel = math.prod(self.partition.kernel_shape)
        each = self.attention.local.kernel_size[0] + 3
        return numel * each + int(1.25 * numel * math.log2(max(numel, 2)))

    def _convolve(self, x: Tensor, pooled: Tensor, found: Attentions) -> Tensor:
        x, _ = compute_types(x, self.warehouse.cells)
        with full_precision(pooled):
            cells, local = self.warehouse.cells, self.attention.local
            wide = torch.promote_types(cells.dtype, torch.float32)
            parts = spectrum_parts(cells.to(wide).view(self._matrix))
            alpha, pooled = 2 * found.alpha[:, 0].to(wide), pooled.to(wide)
            spatial = None if found.spatial is None else found.spatial.to(wide)
            weights = (local.weight.to(wide), local.bias.to(wide))
            operands = Operands(pooled, alpha, spatial, parts, *weights)
            return convolve_assembled(x, operands, self.group, self.spec)

    @torch.no_grad()
    def keep(self, kernel: Tensor) -> float:
        """As :meth:`MixtureLayer.keep`: all factors are 1 at first."""
        matrix = exact_kernel(kernel, self.shape.name)
        self.attention.hold()
        if self.bands is not None:
            silence(self.bands.conv)
        matrix = matrix.transpose(1, 2).reshape(self._matrix)  # [(O, k), (I / g, k)]
        self.warehouse.cells.copy_(hartley(matrix).view(1, -1))
        return 1.0


def _restore_groups(layer: FDConv2d, _incompatible_keys: object = None) -> None:
    """The groups follow from the shape, so they are not saved; a model built on the meta device has
    none before its weights are loaded, or its first input."""
    device = layer.warehouse.cells.device
    if layer._lacks_groups and device.type != "meta":
        layer.group, layer._lacks_groups = layer._groups().to(device), False
