"""What a conversion did, in one line and as a table."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field

__all__ = ["Conversion", "KeptWarehouse", "say"]

_logger = logging.getLogger("kw")


def say(line: str) -> None:
    """Tell the user something once: to the logger ``kw`` (INFO), or to stderr where nobody has
    configured logging. Of several processes the first speaks."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return
    if _logger.hasHandlers():
        _logger.info(line)
    else:
        print(line, file=sys.stderr)


@dataclass(frozen=True)
class KeptWarehouse:
    """One warehouse of a conversion.

    Attributes:
        layers: number of layers that share it.
        mixtures: blocks of their kernels.
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
    """

    model: str
    params_before: int
    params_after: int
    warehouses: dict[str, KeptWarehouse] = field(default_factory=dict)
    static: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        """Number of converted layers."""
        return sum(warehouse.layers for warehouse in self.warehouses.values())

    def __str__(self) -> str:
        """One line."""
        before, after = self.params_before, self.params_after
        shown = ", ".join(self.static[:3]) + (", ..." if len(self.static) > 3 else "")
        static = (
            f"{len(self.static)} layers stay static ({shown})" if self.static else "none static"
        )
        return (
            f"{self.model}: {self.layers} layers converted, {len(self.warehouses)} warehouses; "
            f"{static}; parameters {_count(before)} -> {_count(after)} "
            f"({100 * (after / max(before, 1) - 1):+.1f}%); weights {self._weights()}"
        )

    def _weights(self) -> str:
        shares = [w.kept for w in self.warehouses.values()]
        held = [share for share in shares if share is not None]
        if not held:
            return "replaced by random ones"
        if min(held) == 1:
            kept = "kept: outputs at temperature 0 are the static network's"
        else:
            kept = f"kept in part, {100 * min(held):.0f}% to {100 * max(held):.0f}% of a warehouse"
        lost = len(shares) - len(held)
        return kept + (f"; {lost} warehouses replaced by random ones" if lost else "")

    def table(self) -> str:
        """A line for every warehouse."""
        header = ("warehouse", "layers", "mixtures", "cells", "kept")
        rows = [
            (name, str(w.layers), str(w.mixtures), str(w.cells), _share(w.kept))
            for name, w in self.warehouses.items()
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [[*row[:1], *row[1:]] for row in (header, *rows)]
        return "\n".join(
            "  ".join(
                text.ljust(width) if place == 0 else text.rjust(width)
                for place, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


def _share(kept: float | None) -> str:
    return "replaced" if kept is None else f"{100 * kept:.2f}%"


def _count(number: int) -> str:
    return f"{number / 1e6:.2f}M" if number >= 10**6 else f"{number:,}"
