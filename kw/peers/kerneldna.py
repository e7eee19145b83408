"""KernelDNA: layers that share a parent layer's kernel through adapters.

Paper: KernelDNA: Dynamic Kernel Sharing via Decoupled Naive Adapters (Huang et al., 2025,
arXiv 2503.23379). Layers with kernels of one shape share one. The first of them, the parent, is an
ordinary convolution; for the others, its children, an adapter makes the kernel ``W`` their own. The
adapter is decoupled into a static part, that of positions, and a dynamic one, routing by the
input::

    y = a_f(x) . ((W . s) * (a_c(x) . x))

``s`` ``[k, k]`` are parameters of the child; ``a_c`` for every input channel and ``a_f`` for every
filter come from ``h = relu(BatchNorm(fc(GlobalAveragePool(x))))`` by one linear map each. The
kernel is the same for all samples, so a child costs what a static convolution costs.

This follows the paper's text. What the text that was at hand does not settle, and what is done
here: ``s`` starts at 1 and is unbounded; ``a_c, a_f = 2 sigmoid(z)``, 1 at z = 0, so that children
begin as their parent does; hidden units are ODConv's, ``max(int(I * reduction), 16)``; there is no
temperature; children are all layers of a shape but ``kernels`` of them, those that begin equal runs
of the layers in module order. Depthwise children have ``a_c`` alone, which is the same as ``a_f``.

A child cannot keep a static kernel that is not its parent's. :meth:`DNAConv2d.keep` fits the
adapter by least squares and says how much is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..warehouse import KernelShape, KWConv2d, Warehouse, WarehouseSettings
from ..warehouse.start import exact_kernel
from .mixture import Attentions, AxisAttention, check_settings, modulation, scaled, silence

_ROUNDS = 20
_LEAST = 0.02
"""The smallest factor of a fit: at 0 a sigmoid has no gradient."""


class Adapter(AxisAttention):
    """A child's adapter: factors of its input channels and filters, and those of positions."""

    has_temperature = False

    def __init__(self, shape: KernelShape, reduction: float, **place: Any) -> None:
        super().__init__(shape, reduction, **place)
        self.spatial = nn.Parameter(torch.empty(shape.kernel, **place))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-normal (fan out, ReLU) weights, zero biases; factors of positions 1."""
        super().reset_parameters()
        nn.init.ones_(self.spatial)

    def attend(self, pooled: Tensor, tau: Tensor | None) -> Attentions:
        alpha = pooled.new_ones(pooled.shape[0], 1, 1)
        return Attentions(alpha, *self.factors(self.hidden(pooled), modulation))

    @torch.no_grad()
    def hold_factors(self, channel: Tensor, filters: Tensor, spatial: Tensor) -> None:
        """Give the same factors ``[I]``, ``[O]``, ``[k, k]`` for every input; those of channels and
        filters in (0, 2)."""
        for head, factors in ((self.channel_fc, channel), (self.filter_fc, filters)):
            if head is not None:
                silence(head)
                head.bias.copy_((factors / 2).logit())
        self.spatial.copy_(spatial)


class Whole(nn.Module):
    """A parent's place for an adapter: its kernel is used as it is, with a coefficient of 1."""

    def forward(self, pooled: Tensor, temperature: Tensor | None) -> Tensor:
        return pooled.new_ones(pooled.shape[0], 1, 1)


class SharedKernel(Warehouse):
    """One kernel for several layers, as a warehouse of one cell.

    Args:
        shapes: the layers' kernels, equal but for their names; the first is the parent's.
        reduction: that of the children's adapters.

    Raises:
        ValueError: kernels that differ; a setting that cannot be.
    """

    def __init__(
        self,
        shapes: Sequence[KernelShape],
        reduction: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_settings(1, reduction)
        first = shapes[0]
        for shape in shapes:
            if replace(shape, name=first.name) != first:
                raise ValueError(f"layer {shape.name!r} is {shape}; its parent is {first}")
        self._reduction = reduction
        whole = WarehouseSettings(spatial_partition=False)
        super().__init__([first], whole, name=first.name, device=device, dtype=dtype)
        self.shapes = tuple(shapes)
        one = self.partition
        self.partition = replace(
            one, layers=one.layers * len(shapes), slices=one.slices * len(shapes)
        )
        self.temperature = None

    def build_attention(self, slot: int) -> nn.Module:
        factory: dict[str, Any] = {"device": self.cells.device, "dtype": self.cells.dtype}
        return Adapter(self.shapes[slot], self._reduction, **factory) if slot else Whole()


class DNAConv2d(KWConv2d):
    """``nn.Conv2d`` with a kernel of a :class:`SharedKernel`, its keyword ``warehouse``; its place
    there is ``slot``, 0 for the parent.

    Raises:
        ValueError: no warehouse, or one for other kernels.
    """

    is_mixture = per_sample = False
    defaults: ClassVar[dict[str, Any]] = {"kernels": 1, "reduction": 0.0625}
    """Settings of a conversion: parents of layers of one shape, and the adapters' reduction."""

    warehouse: SharedKernel

    def __init__(self, *args: Any, warehouse: SharedKernel | None = None, **kwargs: Any) -> None:
        if not isinstance(warehouse, SharedKernel):
            raise ValueError(
                "DNAConv2d shares the kernel of a SharedKernel; give it as 'warehouse', or convert "
                "a network by kw.peers.convert(network, 'kerneldna')"
            )
        super().__init__(*args, warehouse=warehouse, **kwargs)

    def compute(self, x: Tensor) -> Tensor:
        kernel = self.warehouse.cells.view(self.partition.kernel_shape)
        filters = None
        if isinstance(self.attention, Adapter):
            found = self.attention(self.pooled(x), None)
            x = scaled(x, found.channel)
            kernel, filters = kernel * self.attention.spatial.to(kernel.dtype), found.filter
        y = self.spec.conv(self.pad(x), kernel, self.groups)
        return self.add_bias(scaled(y, filters))

    @property
    def assembly_macs(self) -> int:
        """Multiply-adds of a child's kernel, for all samples together."""
        is_child = isinstance(self.attention, Adapter)
        return math.prod(self.partition.kernel_shape) if is_child else 0

    @torch.no_grad()
    def keep(self, kernel: Tensor) -> float:
        """As :meth:`.mixture.MixtureLayer.keep`, as far as that can be; the parent first.

        A parent takes the kernel. A child's factors become constant: those that, on its parent's
        kernel, come nearest to this one (least squares by alternation, in which the factors of
        channels and filters are not negative).

        Returns:
            How much is kept: 1 - (squared error / squared norm).
        """
        wanted = exact_kernel(kernel, self.shape.name)
        cells = self.warehouse.cells
        if not isinstance(self.attention, Adapter):
            cells.copy_(wanted.view(1, -1))
            return 1.0
        parent = cells.to("cpu", torch.float64).view(wanted.shape)
        one_sided = self.attention.filter_fc is None
        channel, filters, spatial = _fit(wanted, parent, self.shape.groups, one_sided)
        self.attention.hold_factors(channel, filters, spatial)
        fitted = parent * _spread(channel, filters, spatial, self.shape.groups)
        error = (wanted - fitted).square().sum()
        total = wanted.square().sum()
        return float(1 - error / total) if total else 1.0


def _spread(channel: Tensor, filters: Tensor, spatial: Tensor, groups: int) -> Tensor:
    """The product of all factors for every value of the kernel, ``[O, I / g, k, k]``."""
    own = channel.view(groups, -1).repeat_interleave(len(filters) // groups, 0)  # [O, I / g]
    return (filters[:, None] * own)[..., None, None] * spatial


def _fit(
    wanted: Tensor, parent: Tensor, groups: int, one_sided: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of channels ``[I]``, filters ``[O]`` and positions ``[k, k]`` of a child.

    Each is in turn the least-squares solution for the two others. Their scale, which is free, goes
    to the positions, so that those of channels and filters stay below 2.
    """
    out, in_, *kernel = wanted.shape
    cross, square = (wanted * parent).unflatten(0, (groups, -1)), parent.square()
    square = square.unflatten(0, (groups, -1))  # [g, O / g, I / g, k, k]
    channel, filters = wanted.new_ones(groups, in_), wanted.new_ones(groups, out // groups)
    spatial = wanted.new_ones(*kernel)
    tiny = torch.finfo(wanted.dtype).tiny

    def solve(axes: str, own: Tensor, *others: tuple[str, Tensor]) -> Tensor:
        names, values = zip(*others, strict=True)
        above = torch.einsum(f"goikl,{','.join(names)}->{axes}", cross, *values)
        squares = [value.square() for value in values]
        below = torch.einsum(f"goikl,{','.join(names)}->{axes}", square, *squares)
        return torch.where(below > tiny, above / below.clamp(min=tiny), own)

    for _ in range(_ROUNDS):
        spatial = solve("kl", spatial, ("gi", channel), ("go", filters))
        channel = _bounded(solve("gi", channel, ("go", filters), ("kl", spatial)))
        if not one_sided:
            filters = _bounded(solve("go", filters, ("gi", channel), ("kl", spatial)))
    spatial = solve("kl", spatial, ("gi", channel), ("go", filters))
    return channel.flatten(), filters.flatten(), spatial


def _bounded(factors: Tensor) -> Tensor:
    """Factors between the least and 2, the largest at 1.8 before: positions take the scale."""
    top = factors.max()
    return factors.mul(1.8 / top).clamp(min=_LEAST) if top > 0 else torch.ones_like(factors)


def share_kernels(shapes: Sequence[KernelShape], kernels: int) -> list[list[KernelShape]]:
    """Which layers share a kernel: those of one shape, in module order, in ``kernels`` runs of
    about equal length, each of which begins with its parent."""
    check_settings(kernels)
    alike: dict[KernelShape, list[KernelShape]] = {}
    for shape in shapes:
        alike.setdefault(replace(shape, name=""), []).append(shape)
    runs = []
    for members in alike.values():
        count = min(kernels, len(members))
        cuts = [i * len(members) // count for i in range(count + 1)]
        runs += [members[a:b] for a, b in pairwise(cuts)]
    return runs
