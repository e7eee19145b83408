"""What a conversion did, in one line and as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy


@dataclass(frozen=True)
class KeptWarehouse:
    """One warehouse of a conversion.

    Attributes:
        layers: number of layers that share it.
        mixtures: number of mixtures of these layers.
        cells: number of cells.
        kept: share of the kernels that its cells hold, 1 - (squared error / squared norm), weighted
            by the layers' inputs where they were given; ``None``: replaced by random values.
    """

    layers: int
    mixtures: int
    cells: int
    kept: float | None


@dataclass(frozen=True)
class Conversion:
    """What :func:`kw.convert` did; a converted model has it as ``model.warehouses.conversion``.

    Attributes:
        model: the network's class.
        params_before: parameters of the static network.
        params_after: parameters of the converted one.
        warehouses: by name.
        static: the names of the layers with kernels that stay static.
        method: the method of :mod:`kw.peers`; ``None``: KernelWarehouse.
        meta: whether the network is on the meta device, so that it has no weights yet.
    """

    model: str
    params_before: int
    params_after: int
    warehouses: dict[str, KeptWarehouse] = field(default_factory=dict)
    static: tuple[str, ...] = ()
    method: str | None = None
    meta: bool = False

    @property
    def layers(self) -> int:
        """Number of converted layers."""
        return sum(warehouse.layers for warehouse in self.warehouses.values())

    def __str__(self) -> str:
        """One line."""
        before, after = self.params_before, self.params_after
        shown = ", ".join(self.static[:3]) + (", ..." if len(self.static) > 3 else "")
        static = f"{_counted(len(self.static), 'layer')} static" + (f" ({shown})" if shown else "")
        into = _counted(len(self.warehouses), "warehouse") if self.method is None else self.method
        return (
            f"{self.model}: {_counted(self.layers, 'layer')} converted to {into}, {static}; "
            f"parameters {_count(before)} -> {_count(after)} "
            f"({100 * (after / max(before, 1) - 1):+.1f}%); "
            + ("no weights yet (meta device)" if self.meta else f"weights {self._weights()}")
        )

    def _weights(self) -> str:
        shares = [w.kept for w in self.warehouses.values()]
        held = [share for share in shares if share is not None]
        if not held:
            return "replaced by random ones"
        if min(held) == 1 and len(held) == len(shares):
            where = "" if self.method else " at temperature 0"
            return f"kept, outputs{where} are the static network's"
        low, high = f"{100 * min(held):.0f}%", f"{100 * max(held):.0f}%"
        part = f"between {low} and {high} of the kernels of " if min(held) < 1 else ""
        lost = len(shares) - len(held)
        what = "layer" if self.method else "warehouse"
        return f"kept in part: {part}{_counted(len(held), what)}" + (
            f", those of {_counted(lost, 'other')} replaced by random ones" if lost else ""
        )

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """For every warehouse its name, layers, mixtures, cells, and the share kept."""
        return [
            (
                name,
                str(warehouse.layers),
                str(warehouse.mixtures),
                str(warehouse.cells),
                "replaced" if warehouse.kept is None else f"{100 * warehouse.kept:.2f}%",
            )
            for name, warehouse in self.warehouses.items()
        ]


def count_parameters(model: nn.Module) -> int:
    """Values of a model's parameters; lazy modules are not counted."""
    return sum(p.numel() for p in model.parameters() if not is_lazy(p))


def thawed(layers: list[str]) -> str:
    """That layers were frozen and are not any more, in one line."""
    shown = ", ".join(layers[:3]) + (", ..." if len(layers) > 3 else "")
    were, train = ("was", "trains") if len(layers) == 1 else ("were", "train")
    number = _counted(len(layers), "layer")
    return f"{number} {were} frozen and {train} now ({shown}); freeze after the conversion"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _count(number: int) -> str:
    return f"{number / 1e6:.2f}M" if number >= 10**6 else f"{number:,}"


def guard_saving(model: nn.Module) -> None:
    """Refuse Hugging Face's ``save_pretrained`` on what was converted.

    It writes the name of the class and the weights. ``from_pretrained`` would build the static
    network, initialise the converted kernels at random, and only log a warning.
    """
    for module in model.modules():
        if hasattr(module, "save_pretrained"):
            module.__dict__["save_pretrained"] = _refuse_saving


def _refuse_saving(*_: Any, **__: Any) -> None:
    raise ValueError(
        "save_pretrained cannot save a converted network: from_pretrained would build the static "
        "one, with random weights in place of the converted layers. Convert with "
        "kw.integrations.transformers.convert, or save its state_dict with torch.save; to load it, "
        "build the static network, convert it alike, then load_state_dict"
    )
