"""A run's raw figures, what is computed from them, and their files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..training.saving import write_json
from .cases import GROUPED, STATIC
from .conditions import BenchmarkError, Conditions
from .steps import PARTS


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and extremes of the rounds."""

    median: float
    q1: float
    q3: float
    min: float
    max: float


def spread_of(values: Sequence[float]) -> Spread:
    """The spread of some values, at least one; quartiles are interpolated between them."""
    return Spread(*np.quantile(values, (0.5, 0.25, 0.75, 0, 1)).tolist())


@dataclass
class Measured:
    """One network of a run."""

    model: str
    backend: str  # "static", or the back end
    problem: str | None = None  # why it has no figures, or None
    iterations: int = 0  # per round
    # per part, one figure a round: the mean of its iterations
    seconds: dict[str, list[float]] = field(default_factory=dict)
    # kw.benchmark.memory.Memory in bytes, of the mode memory
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """For messages."""
        return self.model if self.backend == STATIC else f"{self.model}, {self.backend}"


@dataclass
class Result:
    """One run: static network, grouped and other back ends under the same conditions."""

    name: str  # of its files, without suffix
    family: str  # the static network's name
    conditions: Conditions  # of all networks
    networks: list[Measured]  # the static one first
    machine: dict[str, Any]  # this and the next two: see machine.py
    versions: dict[str, str | None]
    code: dict[str, Any]
    date: str  # when it began, ISO 8601 in UTC

    @property
    def static(self) -> Measured:
        """What ratios are to."""
        return self.networks[0]

    def grouped(self, model: str) -> Measured | None:
        """The grouped form of a network, where it could be measured."""
        for network in self.networks:
            if (network.model, network.backend, network.problem) == (model, GROUPED, None):
                return network
        return None

    def ratio(self, network: Measured, to: Measured, part: str = "total") -> Spread:
        """One network's figure over another's, round by round; the mode ``memory`` has one figure,
        memory beyond, and no rounds."""
        if self.conditions.mode == "memory":
            return spread_of([network.memory["beyond"] / to.memory["beyond"]])
        pairs = zip(network.seconds[part], to.seconds[part], strict=True)
        return spread_of([a / b for a, b in pairs])

    def rows(self) -> Iterator[dict[str, Any]]:
        """What is computed from the raw figures: one flat row a network and part.

        Times are in milliseconds, memory in bytes; ``x_static`` is the ratio to the static network,
        ``x_faster_than_grouped`` the grouped form's figure over this one's.
        """
        is_memory = self.conditions.mode == "memory"
        for network in self.networks:
            head = {"model": network.model, "backend": network.backend, "problem": network.problem}
            if network.problem is not None:
                yield head
                continue
            grouped = self.grouped(network.model)
            for part in ("beyond",) if is_memory else PARTS[self.conditions.mode]:
                row: dict[str, Any] = {**head, "part": part}
                if is_memory:
                    row |= {f"{key}_bytes": value for key, value in network.memory.items()}
                else:
                    times = asdict(spread_of(network.seconds[part]))
                    row |= {f"ms_{key}": 1e3 * value for key, value in times.items()}
                ratio = asdict(self.ratio(network, self.static, part))
                row |= {f"x_static_{key}": value for key, value in ratio.items()}
                if grouped is not None:
                    row["x_faster_than_grouped"] = self.ratio(grouped, network, part).median
                yield row

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {**asdict(self), "rows": list(self.rows())}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Result:
        """From :meth:`to_dict`; its rows are computed anew, not read."""
        fields = {key: value for key, value in content.items() if key != "rows"}
        conditions = dict(fields["conditions"])
        if isinstance(conditions["input_size"], list):
            conditions["input_size"] = tuple(conditions["input_size"])
        fields["conditions"] = Conditions(**conditions)
        fields["networks"] = [Measured(**network) for network in fields["networks"]]
        return cls(**fields)


def write_result(result: Result, folder: Path) -> tuple[Path, Path]:
    """Write ``NAME.json``, with everything, and ``NAME.csv``, the rows with their conditions."""
    folder.mkdir(parents=True, exist_ok=True)
    as_json, as_csv = folder / f"{result.name}.json", folder / f"{result.name}.csv"
    write_json(result.to_dict(), as_json)
    conditions = {**asdict(result.conditions), "commit": result.code["commit"]}
    rows = [{**conditions, **row} for row in result.rows()]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with as_csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return as_json, as_csv


def read_results(folder: Path) -> list[Result]:
    """All results in a folder, by name.

    Raises:
        BenchmarkError: there are none, or a file is not what :func:`write_result` writes.
    """
    paths = sorted(folder.glob("benchmark-*.json"))
    if not paths:
        raise BenchmarkError(f"{folder} has no files benchmark-*.json")
    results = []
    for path in paths:
        try:
            results.append(Result.from_dict(json.loads(path.read_text())))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BenchmarkError(f"{path} is no benchmark result: {error!r}") from error
    return results
