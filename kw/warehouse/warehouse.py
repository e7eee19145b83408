"""The warehouse: the cells that layers share, and the temperature at which they are mixed.

Paper: KernelWarehouse (ICML 2024, arXiv 2406.07879), warehouse construction-with-sharing.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import valid_names
from .attention import EPS, KernelAttention
from .conversion import Conversion
from .ops.rounded import RoundedCells
from .partition import KernelShape, partition_kernels
from .sharded import is_sharded, placed_like, whole_like

STARTS = ("keep", "paper")

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class WarehouseSettings:
    """Partition and attention of a warehouse.

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
        firmness: the logits' scale c divided by the number of cells, for ``"keep"``: the larger,
            the slower the initial coefficients change.
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
        known = {f.name: type(f.default) for f in fields(self)}
        for key, value in overrides.items():
            if key not in known:
                valid = valid_names(key, known)
                raise ValueError(f"{source}: unknown warehouse setting {key!r}{valid}")
            kind = known[key]
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (is_number if kind is float else isinstance(value, kind)):
                expected = {float: "a number", str: "a string", bool: "true or false"}[kind]
                raise ValueError(f"{source}: {key} is {value!r}, expected {expected}")
        return replace(self, **overrides)


class Warehouse(nn.Module):
    """Cells shared by the layers of (about) one stage.

    The cells are one 2-D parameter ``[n, c_out * c_in * cell_kernel]``: two dimensions work with
    ``.to(memory_format=torch.channels_last)``, and mixing is one matrix product. Its name is
    ``weight``, because other code groups parameters by that name.

    Every layer that uses a warehouse registers it, so that a part of a network contains its cells.
    ``parameters()`` and ``state_dict()`` of the network or of a part have them once,
    under the name of the first layer that uses them.

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
        if not 0.001 <= settings.firmness <= 1e6 or settings.firmness * self.partition.cells <= EPS:
            raise ValueError(
                f"warehouse {name!r}: firmness is {settings.firmness}; expected a number from "
                "0.001 to 1e6, above 0.001 for a single cell"
            )
        cell_numel = torch.Size(self.partition.cell_shape).numel()
        cells = torch.empty(self.partition.cells, cell_numel, device=device, dtype=dtype)
        self.weight = nn.Parameter(cells)
        # Zero, the state after annealing: a loop that never calls set_temperature trains a dynamic
        # network, not a static one.
        self.register_buffer("temperature", torch.zeros((), device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def cells(self) -> nn.Parameter:
        """The parameter ``weight``, ``[n, c_out * c_in * cell_kernel]``."""
        return self.weight

    def rounded(self, dtype: torch.dtype, user: int) -> Tensor:
        """The cells in a type of 16 bit, as :meth:`.ops.rounded.RoundedCells.get` shares them."""
        return _rounded.setdefault(self, RoundedCells()).get(self.cells, dtype, user)

    def reset_parameters(self) -> None:
        """Kaiming-normal (fan out, ReLU) on each layer's own cells, viewed as one kernel
        ``[cells * c_out, c_in, cell_kernel]``; temperature 0."""
        _, *rest = self.partition.cell_shape
        values = whole_like(self.cells)
        for own in self.partition.slices:
            kernel = values[own.start : own.stop].view(-1, *rest)
            nn.init.kaiming_normal_(kernel, mode="fan_out", nonlinearity="relu")
        if is_sharded(self.cells):
            self.cells.detach().copy_(placed_like(values, self.cells))
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
        """Identity; the call triggers FSDP's hook that gathers the cells."""
        return x

    def named_modules(
        self,
        memo: set[nn.Module] | None = None,
        prefix: str = "",
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, nn.Module]]:
        """Itself and what parametrizes its cells, once per traversal, also with
        ``remove_duplicate=False``.

        Otherwise ``torch.func.functional_call`` would treat the cells as tied weights.
        """
        return super().named_modules(memo, prefix, remove_duplicate=True)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save the cells once per state dict, although several layers register them."""
        where, first = _saved_to.get(self, (None, prefix))
        is_same = where is not None and where() is destination
        if is_same and first != prefix and f"{first}weight" in destination:
            return
        if isinstance(destination, OrderedDict):  # a plain dict has no weak references
            _saved_to[self] = (weakref.ref(destination), prefix)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load the cells from any layer's key; they are missing if no layer has one.

        One call of ``load_state_dict`` visits a warehouse once for each of its layers.
        """
        if f"{prefix}cells" in state_dict:  # the name in earlier versions
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}cells")
        visited = _loaded_from.get(self)
        first = visited is None or visited[0] is not missing_keys
        if not first and f"{prefix}weight" not in state_dict:
            return
        absent: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, absent, unexpected_keys, error_msgs
        )
        if not first:
            assert visited is not None
            for key in visited[1]:
                missing_keys.remove(key)
        missing_keys += absent
        _loaded_from[self] = (missing_keys, absent)

    def extra_repr(self) -> str:
        shape = "x".join(map(str, self.partition.cell_shape))
        return f"cells={self.partition.cells}, cell_shape={shape}, layers={len(self.shapes)}"


# Rounded cells, and records about a state dict while it is made or loaded. They are not attributes
# of the modules, which are copied and pickled.
_rounded: WeakKeyDictionary[Warehouse, RoundedCells] = WeakKeyDictionary()
_saved_to: WeakKeyDictionary[Warehouse, tuple[weakref.ref[Any], str]] = WeakKeyDictionary()
_loaded_from: WeakKeyDictionary[Warehouse, tuple[list[str], list[str]]] = WeakKeyDictionary()


class WarehouseDict(dict[str, Warehouse]):
    """A converted model's warehouses by name. An index only: the layers register the modules.

    Attributes:
        conversion: what the last :func:`kw.convert` of the model did.
        plans: the plan of every :func:`kw.convert` of the model, as mappings that repeat it.
    """

    conversion: Conversion | None = None
    plans: tuple[dict[str, Any], ...] = ()


def names_now(model: nn.Module) -> dict[str, str]:
    """Names of cells and temperatures in the states of earlier versions -> their names now.

    Earlier versions kept a model's warehouses apart from its layers: ``warehouses.NAME.cells``.
    """
    paths = {
        module: path for path, module in model.named_modules() if isinstance(module, Warehouse)
    }
    found = {f"{path}.cells": f"{path}.weight" for path in paths.values()}
    for root, module in model.named_modules():
        index = module.__dict__.get("warehouses")
        if not isinstance(index, WarehouseDict):
            continue
        for name, warehouse in index.items():
            if warehouse in paths:
                old = f"{root}.warehouses.{name}".removeprefix(".")
                found[f"{old}.cells"] = f"{paths[warehouse]}.weight"
                found[f"{old}.temperature"] = f"{paths[warehouse]}.temperature"
    return found


def earlier_order(model: nn.Module) -> list[nn.Parameter]:
    """A model's parameters in the order of earlier versions, where cells came after the layers."""
    order = list(model.parameters())
    for module in model.modules():
        index = module.__dict__.get("warehouses")
        if isinstance(index, WarehouseDict):
            cells = [warehouse.weight for warehouse in index.values()]
            inside = {id(parameter) for parameter in module.parameters()}
            moved = {id(parameter) for parameter in cells} & inside
            rest = [parameter for parameter in order if id(parameter) not in moved]
            last = max((i for i, p in enumerate(rest) if id(p) in inside), default=-1)
            rest[last + 1 : last + 1] = [p for p in cells if id(p) in moved]
            order = rest
    return order


def with_names_now(model: nn.Module, state: Mapping[str, _Value]) -> dict[str, _Value]:
    """A state of this or an earlier version, under this version's names."""
    renamed = names_now(model)
    return {renamed.get(key, key): value for key, value in state.items()}


def accept_earlier_names(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook of ``model.load_state_dict``: renames the entries of earlier versions in place."""
    for old, new in names_now(model).items():
        if prefix + old in state:
            state[prefix + new] = state.pop(prefix + old)
