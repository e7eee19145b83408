"""Layers whose kernels are assembled per sample: ``KWConv1d/2d/3d`` and ``KWLinear``.

Paper: KernelWarehouse (ICML 2024, arXiv 2406.07879), Eqs. 1-2: ``y_b = conv(x_b, kernel(x_b)) +
    bias``.
A linear layer is a convolution of kernel 1 over tokens.

Legend: B samples, I and O input and output channels, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ..torch_private import has_values
from .ops import ConvSpec, check_backend, dynamic_conv
from .partition import KernelShape
from .pooling import pool
from .start import keep_kernels
from .warehouse import Warehouse, WarehouseSettings

Size = int | Sequence[int]
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class KWLayer(nn.Module):
    """Base class of dynamic layers: a warehouse, an attention branch, a bias.

    A layer built without a warehouse makes one, and starts as a static layer with random weights
    (unless ``start="paper"``).

    Args:
        shape: the layer's kernel.
        bias: whether an output bias is added.
        warehouse: the warehouse to share; ``None`` makes one.
        slot: the layer's place among the warehouse's layers.
        settings: :class:`WarehouseSettings` of the warehouse to make.
        device: of a warehouse to make; a shared warehouse has its own.
        dtype: likewise.

    Raises:
        ValueError: groups that do not divide the channels, a slot of another kernel,
            settings together with a given warehouse, or invalid settings.
    """

    is_mixture: ClassVar[bool] = True
    """Whether its kernels are mixtures of cells, which back ends compute and pictures show."""
    per_sample: ClassVar[bool] = True
    """Whether every sample has a kernel of its own."""

    warehouse: Warehouse
    attention: Any
    """:class:`KernelAttention`, or what another method has in its place."""

    def __init__(
        self,
        shape: KernelShape,
        bias: bool,
        warehouse: Warehouse | None,
        slot: int,
        settings: dict[str, Any],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if shape.in_channels % shape.groups or shape.out_channels % shape.groups:
            raise ValueError(
                f"{shape.groups} groups do not divide {shape.in_channels} input channels and "
                f"{shape.out_channels} output channels"
            )
        if warehouse is None:
            self.warehouse = self.own_warehouse(shape, settings, device, dtype)
        else:
            if settings:
                raise ValueError(
                    f"{', '.join(settings)}: settings of the warehouse, which is given already"
                )
            if not 0 <= slot < len(warehouse.shapes):
                raise ValueError(
                    f"warehouse {warehouse.name!r} has {len(warehouse.shapes)} layers; there is no "
                    f"slot {slot}"
                )
            laid_out = warehouse.shapes[slot]
            if replace(laid_out, name=shape.name) != shape:
                raise ValueError(
                    f"slot {slot} of warehouse {warehouse.name!r} is for {laid_out}, not {shape}"
                )
            self.warehouse = warehouse
        self.shape = shape
        self.backend = "auto"
        cells = self.warehouse.cells
        self.attention = self.warehouse.build_attention(slot)
        if warehouse is None:
            self._begin()
        self.partition = self.warehouse.partition.layers[slot]
        self.bias: nn.Parameter | None = None
        if bias:
            zeros = torch.zeros(shape.out_channels, device=cells.device, dtype=cells.dtype)
            self.bias = nn.Parameter(zeros)

    def own_warehouse(
        self,
        shape: KernelShape,
        settings: dict[str, Any],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> Warehouse:
        """A warehouse for this layer alone; the peers override it.

        Raises:
            ValueError: unknown or invalid settings.
        """
        own = WarehouseSettings().with_overrides(settings, type(self).__name__)
        return Warehouse([shape], own, device=device, dtype=dtype)

    def _begin(self) -> None:
        """Start as a static layer with a Kaiming-normal kernel (fan out, ReLU)."""
        settings, cells = self.warehouse.settings, self.warehouse.cells
        if settings.start == "paper" or not has_values(cells):
            return
        kernel = cells.new_empty(self.warehouse.partition.layers[0].kernel_shape)
        nn.init.kaiming_normal_(kernel, mode="fan_out", nonlinearity="relu")
        keep_kernels(self.warehouse, [self.attention], [kernel])

    def take_bias(self, bias: nn.Parameter) -> None:
        """Take over the bias of the static layer that this one replaces."""
        self.bias = bias

    def reset_parameters(self) -> None:
        """Zero bias; attention and warehouse have ``reset_parameters`` of their own."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def set_backend(self, backend: str) -> None:
        """Set a back end of :data:`kw.warehouse.ops.BACKENDS`; ``"auto"`` lets the selector
        choose.

        Raises:
            ValueError: it does not exist or cannot do this layer.
        """
        self.check_backend(backend)
        self.backend = backend

    def check_backend(self, backend: str) -> None:
        """Refuse what :meth:`set_backend` refuses."""
        if backend == "auto":
            return
        if not self.is_mixture:
            raise ValueError(
                f"layer {self.shape.name!r} is a {type(self).__name__}, which has one way to "
                f"compute: back end {backend!r} cannot do it; set 'auto'"
            )
        check_backend(backend, self.spec, self.warehouse.cells)

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """The cells in a type of 16 bit, one copy for all layers of the warehouse in a pass."""
        return self.warehouse.rounded(dtype, id(self))

    def forward(self, input: Tensor) -> Tensor:  # named as torch's layers name it
        """``[B, I, *space]`` -> ``[B, O, *space']``; of a linear layer ``[B, ..., I]`` ->
        ``[B, ..., O]``, where the axes between are tokens.

        Raises:
            ValueError: an input without a batch axis: kernels belong to samples.
        """
        if isinstance(input, Proxy):
            # One node of a graph that torch.fx traces symbolically, like a layer of torch: what it
            # does inside depends on the sizes of its input.
            tracer: Any = input.tracer
            path = tracer.path_of_module(self)
            node: Any = tracer.create_proxy("call_module", path, (input,), {})
            return node
        return self.compute(input)

    def compute(self, x: Tensor) -> Tensor:
        """:meth:`forward` of a tensor."""
        raise NotImplementedError

    def __prepare_scriptable__(self) -> nn.Module:
        raise TypeError(
            f"torch.jit.script cannot compile {type(self).__name__}, nor any network that has one; "
            "torch.compile and torch.export take it, and so does torch.jit.trace; 'kw export' "
            "writes files"
        )

    @property
    def spec(self) -> ConvSpec:
        """Partition, stride, padding, dilation and groups, for the back ends."""
        raise NotImplementedError

    @property
    def assembly_macs(self) -> int:
        """Multiply-adds a sample of assembling its kernel."""
        return self.warehouse.partition.cells * math.prod(self.partition.kernel_shape)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                f"{type(self).__name__} has no weight of its own: it assembles a kernel for every "
                "sample. What reads or fuses the weights of convolutions has to leave it out; its "
                "cells are layer.warehouse.weight, and layer.bias is as in a static layer"
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        shape = self.shape
        kernel = "x".join(map(str, shape.kernel))
        return (
            f"{shape.in_channels}, {shape.out_channels}, kernel={kernel}, groups={shape.groups}, "
            f"bias={self.bias is not None}, warehouse={self.warehouse.name!r}"
        )


class KWConvNd(KWLayer):
    """A convolution over ``dims`` spatial axes."""

    dims: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        warehouse: Warehouse | None = None,
        slot: int = 0,
        name: str = "layer",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        kernel = self._per_axis(kernel_size)
        shape = KernelShape(out_channels, in_channels, kernel, groups, name)
        super().__init__(shape, bias, warehouse, slot, settings, device, dtype)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.groups = kernel, groups
        self.stride, self.dilation = self._per_axis(stride), self._per_axis(dilation)
        self.padding, self.padding_mode = padding, padding_mode
        self._lay_out()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # Code that dilates a backbone sets these, as it does in torch's layers.
        if name in ("stride", "padding", "dilation", "padding_mode") and "_spec" in self.__dict__:
            self._lay_out()

    def _lay_out(self) -> None:
        """Take stride, padding, dilation and padding mode as they are now."""
        mode = self.padding_mode
        if mode not in _PADDING_MODES:
            modes = ", ".join(map(repr, _PADDING_MODES))
            raise ValueError(f"padding_mode {mode!r} is unknown; choose one of {modes}")
        dilations, strides = self._per_axis(self.dilation), self._per_axis(self.stride)
        sides = self._padding_sides(self.padding, self.kernel_size, dilations, strides)
        symmetric = all(low == high for low, high in sides)
        # Padding that the back ends do not support is applied before the convolution.
        self._pad_before: tuple[int, ...] | None = None
        if mode != "zeros" or not symmetric:
            self._pad_before = tuple(p for side in reversed(sides) for p in side)
            sides = [(0, 0)] * self.dims
        self._pad_mode = "constant" if mode == "zeros" else mode
        self._spec = ConvSpec(
            self.partition, strides, tuple(low for low, _ in sides), dilations, self.groups
        )

    @property
    def spec(self) -> ConvSpec:
        return self._spec

    def _per_axis(self, size: Size) -> tuple[int, ...]:
        sizes = (size,) * self.dims if isinstance(size, int) else tuple(size)
        if len(sizes) != self.dims:
            raise ValueError(f"{type(self).__name__}: {size!r} is not one size per axis")
        return sizes

    def _padding_sides(
        self,
        padding: Size | str,
        kernel: tuple[int, ...],
        dilation: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> list[tuple[int, int]]:
        if padding == "valid":
            return [(0, 0)] * self.dims
        if padding == "same":
            if any(s != 1 for s in stride):
                raise ValueError("padding='same' is defined for stride 1 only")
            spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            return [(span // 2, span - span // 2) for span in spans]
        if isinstance(padding, str):
            raise ValueError(f"padding {padding!r} is unknown; give sizes, 'same' or 'valid'")
        return [(p, p) for p in self._per_axis(padding)]

    def compute(self, x: Tensor) -> Tensor:
        alpha = self.attention(self.pooled(x), self.warehouse.temperature)
        return self.add_bias(self.convolve(x, alpha))

    def add_bias(self, y: Tensor) -> Tensor:
        """``[B, O, *space]`` with the bias, if there is one."""
        return y if self.bias is None else y + self.bias.to(y.dtype).view(-1, *(1,) * self.dims)

    def convolve(self, x: Tensor, alpha: Tensor) -> Tensor:
        """The convolution with coefficients ``[B, m, n]``, without the bias."""
        cells = self.warehouse.cells
        return dynamic_conv(self.pad(x), alpha, cells, self._spec, self.backend, self.rounded)

    def pooled(self, x: Tensor) -> Tensor:
        """The attention's input: the input averaged over positions, ``[B, I]``.

        Raises:
            ValueError: an input without a batch axis.
        """
        if x.dim() != self.dims + 2:
            raise ValueError(
                f"{type(self).__name__} takes [batch, {self.shape.in_channels}, *space] with "
                f"{self.dims} spatial axes, got {list(x.shape)}"
            )
        return pool(x, tuple(range(2, x.dim())))

    def pad(self, x: Tensor) -> Tensor:
        """Apply the padding that the back ends do not support."""
        return x if self._pad_before is None else F.pad(x, self._pad_before, self._pad_mode)


class KWConv1d(KWConvNd):
    """``nn.Conv1d`` with kernels assembled per sample; the same arguments, then keywords:

    Args:
        warehouse: a warehouse to share, with ``slot``, the layer's place in it; without one the
            layer makes its own, and further keywords are its :class:`WarehouseSettings`.
        name: the layer's name, for messages.
    """

    dims = 1


class KWConv2d(KWConvNd):
    """``nn.Conv2d`` with kernels assembled per sample; arguments as for :class:`KWConv1d`."""

    dims = 2


class KWConv3d(KWConvNd):
    """``nn.Conv3d`` with kernels assembled per sample; arguments as for :class:`KWConv1d`."""

    dims = 3


class KWLinear(KWLayer):
    """``nn.Linear`` with a weight assembled per sample, shared by all its tokens.

    Keywords as for :class:`KWConv1d`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        warehouse: Warehouse | None = None,
        slot: int = 0,
        name: str = "layer",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        shape = KernelShape(out_features, in_features, (1,), 1, name)
        super().__init__(shape, bias, warehouse, slot, settings, device, dtype)
        self.in_features, self.out_features = in_features, out_features

    @property
    def spec(self) -> ConvSpec:
        return ConvSpec(self.partition, (1,), (0,), (1,))

    def compute(self, x: Tensor) -> Tensor:
        if x.dim() < 2:
            raise ValueError(f"KWLinear takes [batch, ..., features], got {list(x.shape)}")
        if 0 in x.shape[1:-1]:  # samples without tokens need no kernels, as no samples do
            return self.compute(x.reshape(0, x.shape[-1])).view(*x.shape[:-1], self.out_features)
        tokens = x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)  # [B, N, I]
        alpha = self.attention(pool(tokens, (1,)), self.warehouse.temperature)
        how = self.warehouse.cells, self.spec, self.backend, self.rounded
        y = dynamic_conv(tokens.transpose(1, 2), alpha, *how)
        y = y.transpose(1, 2).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)
