"""A study: the runs of a file's rows, which differ in the network and in nothing else."""

# ruff: noqa: RUF009 -- setting() returns dataclasses.field()
from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..config import load_config
from ..config.checking import Schema, check_tree
from ..config.fields import setting
from ..config.loading import read_config
from ..config.names import config_file
from .runs import Run
from .settings import as_option


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
    seeds: list[int] = setting([0], "a run of every row for each", "[0, 2_147_483_647]")
    options: dict[str, Any] = setting({}, "settings by dotted key, over every row's own")
    temperature_epochs: float | None = setting(
        None, "temperature_epochs of the rows that anneal; null = the rows' own", "(0, 1_000_000]"
    )


@dataclass(frozen=True)
class Study:
    """The runs of a file."""

    name: str  # the file's
    home: Path  # folder of the runs
    rows: tuple[str, ...]  # names, in the file's order
    options: tuple[str, ...]  # settings over the rows' own, for readers
    runs: tuple[Run, ...]  # seed by seed, so that a table is whole before it has a second seed


def load_study(
    path: str | os.PathLike[str], options: Iterable[str] = (), home: Path | None = None
) -> Study:
    """Read a study and check the configuration of every row with its options.

    Args:
        path: a YAML file.
        options: ``a.b=value`` settings of every run, over the study's own.
        home: folder of the runs; left out, ``work_dirs/`` and the file's name.

    Raises:
        ConfigError: the study or one of its rows is wrong.
    """
    path = config_file(path)
    home = Path("work_dirs", path.stem) if home is None else home
    file = check_tree(read_config(path), Schema(_StudyFile, _check_rows))
    shared = [as_option(*item) for item in file.options.items()] + [*options]
    runs: dict[int, list[Run]] = {seed: [] for seed in file.seeds}
    said = list(shared)
    if file.temperature_epochs is not None:
        said.insert(0, f"temperature_epochs={file.temperature_epochs} (rows that anneal)")
    for name in file.rows:
        variant = file.variants.get(name) or _Variant(name)
        config = config_file(path.parent / variant.config)
        row = name if name in file.variants else config.stem
        further = [as_option(*item) for item in variant.options.items()]
        row_options = [*shared, *further]
        recipe = load_config(config, check_model_name=False)
        if file.temperature_epochs is not None and recipe.temperature_epochs > 0:
            row_options.insert(0, f"temperature_epochs={file.temperature_epochs}")
        load_config(config, row_options, check_model_name=False)
        start = [f"continues {variant.continues}"] if variant.continues else []
        if start or further:
            said.append(f"{row}: {' '.join([*start, *further])}")
        for seed, of_seed in runs.items():
            own, needs = [*row_options, f"seed={seed}"], None
            if variant.continues is not None:
                before = home / f"{variant.continues}_seed{seed}"
                weights = as_option("model.weights", str(before / "last.pth"))
                own, needs = [*own, weights], before / "finished"
            of_seed.append(Run(row, seed, home, f"{row}_seed{seed}", config, tuple(own), needs))
    every = tuple(chain.from_iterable(runs.values()))
    rows = tuple(dict.fromkeys(run.row for run in every))
    return Study(path.stem, home, rows, tuple(said), every)


def _check_rows(file: _StudyFile, expect: Any) -> None:
    names = [row if row in file.variants else Path(row).stem for row in file.rows]
    for name, variant in file.variants.items():
        if name not in names:
            expect(False, f"every name to stand in rows, which {name} does not", "variants")
        elif variant.continues is not None and variant.continues not in names[: names.index(name)]:
            known = ", ".join(names[: names.index(name)]) or "none"
            expected = f"{name}.continues to name a row before it ({known})"
            expect(False, expected, "variants")
    for key, values in (("rows", names), ("seeds", file.seeds)):
        expect(0 < len(values) == len(set(values)), "at least one, none twice", key)
