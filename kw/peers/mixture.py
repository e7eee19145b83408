"""Base classes of the peers: layers that mix K whole kernels of their own per sample.

In KernelWarehouse's terms each layer has a warehouse of its own: without
spatial partition a kernel is one block, its ``m = 1`` mixture combines ``n = K`` cells, and a cell
is a whole kernel. Partition, contraction back ends, padding and temperature are therefore those of
:mod:`kw.warehouse`; a peer only replaces the attention.

**Temperature.** The peers divide logits by a temperature T that falls from 30 to 1. It is the same
annealing in other units, so one buffer and one schedule drive all methods:
``T = 1 + (30 - 1) * tau`` with KernelWarehouse's ``tau`` from 1 to 0.

**Start.** A layer built directly is initialised as in its paper. A converted layer
(:func:`kw.peers.convert`) computes what the static layer computed: attention is constant at first,
and the kernels are copies of the static kernel plus noise that cancels in their mixture.

Legend: B samples, I, O input and output channels, g groups, K kernels, S positions of a kernel,
    m mixtures, D values of a cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..warehouse import KernelShape, KWConv2d, KWLayer, Warehouse, WarehouseSettings
from ..warehouse.attention import BranchLinear, full_precision, normalise
from ..warehouse.plan import nearest
from ..warehouse.start import kernel_blocks

MAX_TEMPERATURE = 30.0

NOISE = 0.1
"""Size of the noise added to copies of a static kernel, relative to the kernel's root mean
square, before the copies' mean is taken off."""


def logit_scale(tau: Tensor | None) -> Tensor | float:
    """The divisor T of the logits at KernelWarehouse's temperature ``tau`` in [0, 1]; at ``None``,
    (folded at 0), it is 1."""
    return 1.0 if tau is None else 1 + (MAX_TEMPERATURE - 1) * tau


def modulation(logits: Tensor) -> Tensor:
    """Factors in (0, 2) that are 1 for logits of 0."""
    return 2 * logits.sigmoid()


def scaled(x: Tensor, factors: Tensor | None) -> Tensor:
    """Images ``[B, C, H, W]`` times factors ``[B, C]`` of their channels, if there are any."""
    return x if factors is None else x * factors.to(x.dtype)[..., None, None]


class MixtureAttention(nn.Module):
    """A branch from a layer's pooled input to the coefficients of its kernels, in float32.

    Subclasses take ``shape``, ``kernels``, settings of their own, device and dtype.
    """

    has_temperature: ClassVar[bool] = True
    by_position: ClassVar[bool] = False
    """Whether every position of a kernel is a mixture of its own."""
    divides: ClassVar[bool] = False
    """Whether the K kernels are parts of one, which then is the layer's only cell."""

    fc: nn.Linear

    def forward(self, pooled: Tensor, temperature: Tensor | None) -> Any:
        with full_precision(pooled):
            return self.attend(pooled.to(self.fc.weight.dtype), temperature)

    def attend(self, pooled: Tensor, tau: Tensor | None) -> Any:
        """Coefficients and factors by the pooled input ``[B, I]``."""
        raise NotImplementedError

    def hold(self) -> float:
        """Make attention constant and equal for all kernels, at any input and temperature.

        The linear maps that give the logits become zero (:func:`silence`). They train as before,
        since their inputs are not zero.

        Returns:
            The factor on the copies of a static kernel that makes their mixture equal to it.
        """
        raise NotImplementedError


class Attentions(NamedTuple):
    """The output of an :class:`AxisAttention`.

    Attributes:
        alpha: coefficients of the cells, ``[B, m, n]``.
        channel: factors of the input, ``[B, I]``.
        filter: factors of the output, ``[B, O]``, or ``None`` in a depthwise layer, where those of
            the input do the same.
        spatial: factors of the kernel's positions, ``[B, S]``, where they are not part of alpha;
            ``None`` in a pointwise layer.
    """

    alpha: Tensor
    channel: Tensor
    filter: Tensor | None
    spatial: Tensor | None = None


class AxisAttention(MixtureAttention):
    """A branch with factors of input channels and filters: linear maps of
    ``h = relu(BatchNorm(fc(g)))``, g the pooled input; h has ``max(int(I * reduction), 16)`` units.

    Args:
        shape: the layer's kernel; a depthwise one has no factors of filters.
        reduction: units of h per input channel.
        kernels: outputs of another map, for kernels; 0: none.
        spatial: whether positions have factors too, where there are several.
    """

    def __init__(
        self,
        shape: KernelShape,
        reduction: float,
        kernels: int = 0,
        spatial: bool = False,
        **place: Any,
    ) -> None:
        super().__init__()
        channels, filters = shape.in_channels, shape.out_channels
        positions = math.prod(shape.kernel) if spatial else 1
        is_depthwise = shape.groups == channels == filters
        units = max(int(channels * reduction), 16)

        def head(outputs: int) -> Any:
            return BranchLinear(units, outputs, **place) if outputs else None

        self.fc = BranchLinear(channels, units, bias=False, **place)
        self.norm = nn.BatchNorm1d(units, **place)
        self.channel_fc = head(channels)
        self.filter_fc = head(0 if is_depthwise else filters)
        self.spatial_fc = head(positions if positions > 1 else 0)
        self.kernel_fc = head(kernels)

    def heads(self) -> list[nn.Linear]:
        """The linear maps of the hidden units."""
        return [m for m in self.children() if isinstance(m, BranchLinear) and m is not self.fc]

    def hidden(self, pooled: Tensor) -> Tensor:
        """``[B, I]`` -> ``[B, h]``."""
        return normalise(self.norm, self.fc(pooled)).relu()

    def factors(self, hidden: Tensor, gate: Callable[[Tensor], Tensor]) -> list[Any]:
        """``gate`` of the logits of channels, filters and positions, ``[B, ...]`` each, where the
        branch has them."""
        heads = self.channel_fc, self.filter_fc, self.spatial_fc
        return [None if head is None else gate(head(hidden)) for head in heads]

    def reset_parameters(self) -> None:
        """Kaiming-normal (fan out, ReLU) weights, zero biases."""
        initialise(self.fc, *self.heads())
        self.norm.reset_parameters()


def initialise(*maps: nn.Linear) -> None:
    """Kaiming-normal (fan out, ReLU) weights and zero biases."""
    for linear in maps:
        nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


def silence(*heads: nn.Linear | nn.Conv1d | nn.Conv2d) -> None:
    """Make maps to logits give zero for every input."""
    for head in heads:
        nn.init.zeros_(head.weight)
        if head.bias is not None:
            nn.init.zeros_(head.bias)


class PrivateKernels(Warehouse):
    """The K kernels of one layer, as a warehouse; ``settings`` are the attention's own.

    Raises:
        ValueError: a setting that cannot be.
    """

    def __init__(
        self,
        shape: KernelShape,
        branch: type[MixtureAttention],
        kernels: int,
        settings: dict[str, Any],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_settings(kernels, **settings)
        number = 1 if branch.divides else kernels
        whole = WarehouseSettings(cell_num_ratio=number, spatial_partition=branch.by_position)
        super().__init__([shape], whole, name=shape.name, device=device, dtype=dtype)
        self.kernels = kernels
        self._branch, self._branch_settings = branch, settings
        if not branch.has_temperature:
            self.temperature = None

    def reset_parameters(self) -> None:
        """Every kernel as a static one: Kaiming normal, fan out, ReLU; temperature 0."""
        (shape,) = self.shapes
        fan_out = shape.out_channels * math.prod(shape.kernel)
        nn.init.normal_(self.cells, std=math.sqrt(2 / fan_out))
        if self.temperature is not None:
            nn.init.zeros_(self.temperature)

    def build_attention(self, slot: int) -> nn.Module:
        factory: dict[str, Any] = {"device": self.cells.device, "dtype": self.cells.dtype}
        return self._branch(self.shapes[slot], self.kernels, **self._branch_settings, **factory)


class MixtureLayer(KWLayer):
    """A dynamic layer with a warehouse of its own; subclasses define the attention's class."""

    branch: ClassVar[type[MixtureAttention]]
    defaults: ClassVar[dict[str, Any]]
    """The keywords of the layer, ``kernels`` and its attention's, with their defaults."""
    warehouse: PrivateKernels

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_unknown(key for key in kwargs if key in ("warehouse", "slot"))
        super().__init__(*args, **kwargs)
        if self.bias is not None:
            self.take_bias(self.bias)

    def _refuse_unknown(self, settings: Iterable[str]) -> None:
        for key in settings:
            if key not in self.defaults:
                raise ValueError(
                    f"{type(self).__name__}: unknown setting {key!r}; {nearest(key, self.defaults)}"
                )

    def own_warehouse(
        self,
        shape: KernelShape,
        settings: dict[str, Any],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> PrivateKernels:
        self._refuse_unknown(settings)
        settings = {**self.defaults, **settings}
        kernels = settings.pop("kernels")
        return PrivateKernels(shape, self.branch, kernels, settings, device=device, dtype=dtype)

    def _begin(self) -> None:
        """The initialisation of the method's paper; conversions then call :meth:`keep`."""

    @torch.no_grad()
    def keep(self, kernel: Tensor) -> float:
        """Compute what a static layer with this kernel computes, at every temperature.

        Every kernel becomes a copy of it with noise (:data:`NOISE`) that sums to zero over the
        copies. Exact copies would stay equal for ever, since their gradients would be equal.

        Args:
            kernel: ``[O, I / g, k_1 .. k_d]``; a linear layer's weight, ``[O, I]``.

        Returns:
            How much of it is kept: 1.

        Raises:
            ValueError: the kernel is not finite.
        """
        static = kernel_blocks(kernel, self.partition, self.shape.name)
        blocks = (static * self.attention.hold()).unsqueeze(1)  # [m, 1, D]
        # What the paper's initialisation has drawn; a kernel of zeros leaves it its size.
        drawn = self.warehouse.cells.to("cpu").to(blocks)
        drawn = drawn.view(len(blocks), -1, blocks.shape[2])  # [m, K, D]
        scale = (blocks.square().mean() / drawn.square().mean()).sqrt() if blocks.any() else 1.0
        noise = NOISE * scale * (drawn - drawn.mean(1, keepdim=True))
        self.warehouse.cells.copy_((blocks + noise).flatten(0, 1))  # cell i * K + k
        return 1.0

    def extra_repr(self) -> str:
        kernels = self.warehouse.kernels
        return f"{super().extra_repr().rpartition(', warehouse')[0]}, kernels={kernels}"


class MixtureConv2d(MixtureLayer, KWConv2d):
    """``nn.Conv2d`` with a method's mixture of kernels; its arguments, then keywords: the method's,
    and the layer's ``name``, for messages.

    Raises:
        ValueError: settings that cannot be.
    """


def check_settings(kernels: int, reduction: float = 1.0) -> None:
    """Refuse ``kernels`` that is no positive integer, and ``reduction`` that is no positive number,
    by a ValueError."""
    if not isinstance(kernels, int) or isinstance(kernels, bool) or kernels < 1:
        raise ValueError(f"kernels is {kernels!r}; expected an integer >= 1")
    is_number = isinstance(reduction, int | float) and not isinstance(reduction, bool)
    if not is_number or not (math.isfinite(reduction) and reduction > 0):
        raise ValueError(f"reduction is {reduction!r}; expected a number > 0")
