"""A study: the runs of a table, whose rows differ in the network and in nothing else."""

# ruff: noqa: RUF009 -- setting() returns dataclasses.field()
from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checking import Schema, check_tree
from .fields import setting
from .loading import read_config
from .schema import Config

__all__ = ["Study", "StudyRun", "load_study"]


@dataclass
class _Variant:
    config: str = setting(doc="configuration, relative to the study", example="resnet18.yaml")
    options: dict[str, Any] = setting({}, "settings by dotted key, over those of the study")
    continues: str | None = setting(
        None, "name of an earlier row from whose weights, of the same seed, this one starts"
    )


@dataclass
class _StudyFile:
    rows: list[str] = setting(
        doc="configurations, relative to this file, and names of variants, in the order in which "
        "they are run",
        example="[resnet18/resnet18.yaml]",
    )
    variants: dict[str, _Variant] = setting({}, "rows with settings of their own, by name")
    seeds: list[int] = setting([0], "a run of every row for each", minimum=0, maximum=2**31 - 1)
    options: dict[str, Any] = setting({}, "settings by dotted key, over every row's own")
    temperature_epochs: float | None = setting(
        None,
        "temperature_epochs of the rows that anneal; null = the rows' own",
        above=0,
        maximum=10**6,
    )


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        row: the configuration's name, the row's in the table.
        seed: of the run.
        config: file of the configuration.
        options: ``a.b=value`` settings over those of the file.
        continues: name of the run from whose last checkpoint this one starts.
    """

    row: str
    seed: int
    config: Path
    options: tuple[str, ...]
    continues: str | None = None

    @property
    def name(self) -> str:
        """Name of the run's work directory."""
        return f"{self.row}_seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """The runs of a table.

    Attributes:
        name: the file's name.
        path: the file.
        rows: names of the rows, in the file's order.
        options: settings over every row's own, to be read; a run has those it is started with.
        runs: seed by seed, so that a table is whole before it has a second seed.
    """

    name: str
    path: Path
    rows: tuple[str, ...]
    options: tuple[str, ...]
    runs: tuple[StudyRun, ...]


def load_study(path: str | os.PathLike[str], options: Iterable[str] = ()) -> Study:
    """Read a study and check the configuration of every row with its options.

    Args:
        path: a YAML file.
        options: ``a.b=value`` settings of every run, over the study's own.

    Raises:
        ConfigError: the study or one of its rows is wrong.
    """
    from . import load_config

    path = Path(path)
    file = check_tree(read_config(path), Schema(_StudyFile, _check_rows, lambda _: ()))
    shared = [f"{key}={json.dumps(value)}" for key, value in file.options.items()] + [*options]
    rows: dict[str, tuple[Path, tuple[str, ...], str | None]] = {}
    own_settings: list[str] = []
    for name in file.rows:
        variant = file.variants.get(name) or _Variant(name)
        config_path = path.parent / variant.config
        own = load_config(config_path, check_model_name=False)
        further = [f"{key}={json.dumps(value)}" for key, value in variant.options.items()]
        row_options = (*_temperature(own, file.temperature_epochs), *shared, *further)
        load_config(config_path, row_options, check_model_name=False)
        row = name if name in file.variants else config_path.stem
        rows[row] = config_path, row_options, variant.continues
        if further or variant.continues:
            start = [f"continues {variant.continues}"] if variant.continues else []
            own_settings.append(f"{row}: {' '.join([*start, *further])}")
    runs = tuple(
        StudyRun(
            row,
            seed,
            config,
            (*row_options, f"seed={seed}"),
            None if continues is None else f"{continues}_seed{seed}",
        )
        for seed in file.seeds
        for row, (config, row_options, continues) in rows.items()
    )
    if file.temperature_epochs is not None:
        shared.insert(0, f"temperature_epochs={file.temperature_epochs} (rows that anneal)")
    return Study(path.stem, path, tuple(rows), (*shared, *own_settings), runs)


def _check_rows(file: _StudyFile, report: Any) -> None:
    names = [row if row in file.variants else Path(row).stem for row in file.rows]
    for name, variant in file.variants.items():
        if name not in names:
            report(file, ("variants",), f"every name to stand in rows, which {name} does not")
        elif variant.continues is not None and variant.continues not in names[: names.index(name)]:
            known = ", ".join(names[: names.index(name)]) or "none"
            expected = f"{name}.continues to name a row before it ({known})"
            report(file, ("variants",), expected)
    for key, values in (("rows", names), ("seeds", file.seeds)):
        if not values or len(set(values)) < len(values):
            report(file, (key,), "at least one, none twice")


def _temperature(config: Config, epochs: float | None) -> Iterator[str]:
    if epochs is not None and config.temperature_epochs:
        yield f"temperature_epochs={epochs}"
