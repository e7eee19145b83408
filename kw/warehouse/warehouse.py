"""The warehouse: the cells that layers share, and the temperature at which they are mixed.

Paper: KernelWarehouse (ICML 2024, arXiv 2406.07879), warehouse construction-with-sharing.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from .attention import KernelAttention
from .conversion import Conversion
from .partition import KernelShape, partition_kernels

__all__ = ["STARTS", "Warehouse", "WarehouseDict", "WarehouseSettings"]

STARTS = ("keep", "paper")


@dataclass(frozen=True)
class WarehouseSettings:
    """How a warehouse is cut and how its layers attend to it.

    Attributes:
        cell_num_ratio: convolutional parameter budget b: cells per mixture, an integer or 1 /
            integer.
        cell_inplane_ratio: share of the layers' common input channels that a cell spans, (0, 1].
        cell_outplane_ratio: the same for output channels.
        nonlocal_basis_ratio: below 1, logits of foreign cells go through a low-rank map, (0, 1].
        reduction: hidden units of the attention branch per input channel.
        norm: ``"batch"`` or ``"layer"``, the attention branch's normalisation.
        attention: ``"contrasting"``, ``"softmax"``, ``"sigmoid"`` or ``"rectified"``.
        spatial_partition: whether every spatial position of a kernel is a block of its own.
        start: ``"keep"``: the layers begin as static ones, with the kernels that they replace
            (``kw.warehouse.start``); ``"paper"``: cells and attention are initialised at random
            and the temperature is annealed.
        firmness: how firmly ``"keep"`` holds the coefficients that it begins with: the logits'
            scale c over the number of cells.
    """

    cell_num_ratio: float = 1.0
    cell_inplane_ratio: float = 1.0
    cell_outplane_ratio: float = 1.0
    nonlocal_basis_ratio: float = 1.0
    reduction: float = 0.0625
    norm: str = "batch"
    attention: str = "contrasting"
    spatial_partition: bool = True
    start: str = "keep"
    firmness: float = 0.5

    def with_overrides(self, overrides: Mapping[str, Any], source: str) -> WarehouseSettings:
        """A copy with some settings replaced.

        Raises:
            ValueError: an unknown setting or a value of another type; the message names ``source``
                and the nearest valid setting.
        """
        known = [f.name for f in fields(self)]
        for key in overrides:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
                raise ValueError(f"{source}: unknown warehouse setting {key!r}{hint}")
            kind, value = type(getattr(self, key)), overrides[key]
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (is_number if kind is float else isinstance(value, kind)):
                expected = {float: "a number", str: "a string", bool: "true or false"}[kind]
                raise ValueError(f"{source}: {key} is {value!r}, expected {expected}")
        return replace(self, **overrides)


class Warehouse(nn.Module):
    """Cells shared by the layers of (about) one stage.

    The cells are one 2-D parameter ``[n, c_out * c_in * cell_kernel]``: two dimensions survive
    ``.to(memory_format=torch.channels_last)``, and mixing is one matrix product with it.
    The temperature is a buffer here, once for all layers that use the warehouse: checkpoints carry
    it, copies and averages receive it, and changing it neither recompiles nor copies to the device.
    It is ``None`` where a method's attention has no temperature (:mod:`kw.peers`).

    Args:
        shapes: kernels of the layers, in module order.
        settings: partition and attention.
        name: for messages.

    Raises:
        ValueError: the kernels cannot be partitioned as set (see :func:`partition_kernels`).
    """

    temperature: Tensor | None

    def __init__(
        self,
        shapes: Sequence[KernelShape],
        settings: WarehouseSettings | None = None,
        *,
        name: str = "warehouse",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        settings = settings or WarehouseSettings()
        if settings.start not in STARTS:
            raise ValueError(
                f"warehouse {name!r}: start {settings.start!r} is unknown; choose one of "
                f"{', '.join(map(repr, STARTS))}"
            )
        if not 0.001 <= settings.firmness <= 1e6:
            raise ValueError(
                f"warehouse {name!r}: firmness is {settings.firmness}; expected a number from "
                "0.001 to 1e6"
            )
        self.name = name
        self.settings = settings
        self.shapes = tuple(shapes)
        self.partition = partition_kernels(
            shapes,
            cell_num_ratio=settings.cell_num_ratio,
            cell_inplane_ratio=settings.cell_inplane_ratio,
            cell_outplane_ratio=settings.cell_outplane_ratio,
            spatial_partition=settings.spatial_partition,
            name=name,
        )
        cell_numel = torch.Size(self.partition.cell_shape).numel()
        cells = torch.empty(self.partition.cells, cell_numel, device=device, dtype=dtype)
        self.cells = nn.Parameter(cells)
        # Zero, the state after annealing: a loop that never calls set_temperature trains a dynamic
        # network, not a static one.
        self.register_buffer("temperature", torch.zeros((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-normal (fan out, ReLU) on each layer's own cells, seen as one kernel
        ``[cells * c_out, c_in, cell_kernel]``; temperature 0."""
        _, *rest = self.partition.cell_shape
        for own in self.partition.slices:
            kernel = self.cells.detach()[own.start : own.stop].view(-1, *rest)
            nn.init.kaiming_normal_(kernel, mode="fan_out", nonlinearity="relu")
        if self.temperature is not None:
            nn.init.zeros_(self.temperature)

    @property
    def start_scale(self) -> float | None:
        """Scale c of the logits at the start ``"keep"``; ``None`` at the paper's."""
        keeps = self.settings.start == "keep"
        return self.settings.firmness * self.partition.cells if keeps else None

    def build_attention(self, slot: int) -> nn.Module:
        """The attention branch of the layer that was given as ``shapes[slot]``."""
        settings, shape = self.settings, self.shapes[slot]
        mixtures = self.partition.layers[slot].mixtures
        try:
            return KernelAttention(
                shape.in_channels,
                self.partition.cells,
                self.partition.slices[slot],
                reduction=settings.reduction,
                norm=settings.norm,
                function=settings.attention,
                nonlocal_basis_ratio=settings.nonlocal_basis_ratio,
                nonlocal_own=int(settings.cell_num_ratio * mixtures),
                start_scale=self.start_scale if settings.cell_num_ratio >= 1 else None,
                device=self.cells.device,
                dtype=self.cells.dtype,
            )
        except ValueError as error:
            raise ValueError(f"warehouse {self.name!r}, layer {shape.name!r}: {error}") from None

    def forward(self, x: Tensor) -> Tensor:
        """Its input: a call tells whoever shards parameters that the cells are about to be used."""
        return x

    def extra_repr(self) -> str:
        shape = "x".join(map(str, self.partition.cell_shape))
        return f"cells={self.partition.cells}, cell_shape={shape}, layers={len(self.shapes)}"


class WarehouseDict(nn.ModuleDict):
    """A converted model's warehouses by name.

    Layers refer to their warehouse without registering it, so that every cell appears once among
    the model's parameters. Called, it returns its input: as the last child of an ``nn.Sequential``
    it leaves the result alone.

    Attributes:
        conversion: what the last :func:`kw.convert` of the model did.
    """

    conversion: Conversion | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x
