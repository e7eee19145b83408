"""What a table's runs found, beside what was published."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import Config, ConfigError, load_config
from ..errors import UserError, one_line
from ..evaluation import Figure, PaperRow, PaperTable, ReportError, read_run
from .compare import deviations
from .runs import Reproduction, Run, config_path, read_settings
from .state import Jobs, State, find_state

__all__ = ["Costs", "Curve", "Measured", "RowReport", "TableReport", "collect"]

_SAME_DATA = 0.99  # of an epoch's images; the last incomplete batch is left out


@dataclass(frozen=True)
class Costs:
    """What a network costs, by :func:`kw.models.complexity.analyze`; None is not counted."""

    params: int | None = None
    macs: int | None = None
    assembly: int | None = None


@dataclass(frozen=True)
class Curve:
    """A run over its epochs.

    Attributes:
        seed: of the run.
        score: ``(epoch, value)`` of the table's first figure, in its unit.
        loss: ``(epoch, value)`` of the training loss.
    """

    seed: int
    score: Sequence[tuple[int, float]]
    loss: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Measured:
    """What the finished runs of a row found.

    Attributes:
        runs: how many they are.
        figures: mean by the figures' keys, in the table's units: of each run the best epoch's.
        spread: standard deviation over several runs, likewise.
        hours: of training, the mean.
        deviations: what their recipe differs in from the shipped one.
    """

    runs: int
    figures: Mapping[str, float]
    spread: Mapping[str, float]
    hours: float
    deviations: tuple[str, ...]


@dataclass(frozen=True)
class RowReport:
    """A row, published and measured.

    Attributes:
        row: what was published.
        states: what became of its runs; none where there is nothing to run.
        costs: of its network: of the runs', or of the shipped configuration's.
        measured: None where no run is done.
        curves: of all runs that have begun.
        problem: what kept a run from being read.
    """

    row: PaperRow
    states: Sequence[State]
    costs: Costs = field(default_factory=Costs)
    measured: Measured | None = None
    curves: Sequence[Curve] = ()
    problem: str = ""

    @property
    def state(self) -> str:
        """What became of the row, in words."""
        if self.problem:
            return f"unreadable: {self.problem}"
        if not self.states:
            return "no configuration: published only" if self.row.config is None else "not trained"
        counts: dict[str, int] = {}
        for state in self.states:
            counts[str(state)] = counts.get(str(state), 0) + 1
        if len(self.states) == 1:
            return str(self.states[0])
        return ", ".join(f"{count} x {text}" for text, count in counts.items())

    def difference(self, key: str) -> float | None:
        """Measured less published, where there are both."""
        published = self.row.figures.get(key)
        if self.measured is None or published is None:
            return None
        return self.measured.figures[key] - published


@dataclass(frozen=True)
class TableReport:
    """A table, published and measured.

    Attributes:
        table: what was published.
        scale: how its recipes were scaled, in words.
        is_full: they were not.
        rows: some or all of its rows.
    """

    table: PaperTable
    scale: str
    is_full: bool
    rows: Sequence[RowReport]


def collect(task: Reproduction, rows: Sequence[PaperRow]) -> TableReport:
    """Read what the runs of some rows of a table left.

    A run that cannot be read is a problem of its row.
    """
    found = [_collect_row(task, row) for row in rows]
    return TableReport(task.table, task.scale.title, not task.scale.rules, found)


def _collect_row(task: Reproduction, row: PaperRow) -> RowReport:
    runs = task.all_runs(row)
    jobs = Jobs(runs[0].home if runs else task.folder)
    states = [find_state(run, jobs, task.waits_for(run)) for run in runs]
    report = RowReport(row, states)
    curves = [curve for run in runs if (curve := _curve(run, task.table.figures)) is not None]
    report = replace(report, curves=curves)
    try:
        done = [run for run, state in zip(runs, states, strict=True) if state.kind == "done"]
        if done:
            measured, costs = _measure(task, row, done)
            return replace(report, measured=measured, costs=costs)
    except UserError as error:  # a file of the run is damaged; the other rows are not
        return replace(report, problem=str(error))
    if runs and task.scale.name == "full" and Path(str(row.config)).suffix == ".yaml":
        config = load_config(config_path(row), check_model_name=False)
        return replace(report, costs=_count(config))
    return report


def _measure(task: Reproduction, row: PaperRow, runs: Sequence[Run]) -> tuple[Measured, Costs]:
    figures = task.table.figures
    found = [read_run(run.work_dir, [figure.result for figure in figures]) for run in runs]
    means, spread = {}, {}
    for figure in figures:
        values = [run.results[figure.result] * figure.scale for run in found]
        means[figure.key] = statistics.fmean(values)
        if len(values) > 1:
            spread[figure.key] = statistics.stdev(values)
    hours = statistics.fmean(run.hours for run in found)
    deviating: dict[str, None] = {}
    try:
        shipped = read_settings(config_path(row))
    except ConfigError as error:  # mmdetection is not here
        deviating[f"not compared with the shipped configuration: {one_line(error)}"] = None
        shipped = {}
    for run, content in zip(runs, found, strict=True):
        settings = (
            read_settings(run.work_dir / run.config.with_stem("config").name) if shipped else {}
        )
        own = deviations(shipped, settings) if shipped else []
        own += _data_deviations(task.table, content.log, settings)
        deviating |= dict.fromkeys(own)
    costs = Costs(params=found[0].results["params"])
    if runs[0].config.suffix == ".yaml":
        config = load_config(runs[0].work_dir / "config.yaml", check_model_name=False)
        costs = _count(config)
    return Measured(len(runs), means, spread, hours, tuple(deviating)), costs


def _data_deviations(
    table: PaperTable, log: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> list[str]:
    """Other data than the published figures are from, by the numbers of images in the log."""
    found = []
    train = [line for line in log if line["mode"] == "train"]
    evaluated = [line for line in log if line["mode"] == "val"]
    expected = table.data
    if train and settings:
        images = train[-1]["iter"] / train[-1]["epoch"] * settings["total_batch_size"]
        if not _SAME_DATA < images / expected["train_images"] < 1 / _SAME_DATA:
            name = expected["name"]
            found.append(
                f"about {images:,.0f} training images an epoch, not {name}'s "
                f"{expected['train_images']:,}"
            )
    if evaluated and evaluated[-1].get("images", expected["val_images"]) != expected["val_images"]:
        found.append(
            f"evaluated on {evaluated[-1]['images']:,.0f} images, not {expected['val_images']:,}"
        )
    return found


def _count(config: Config) -> Costs:
    from ..models.complexity import analyze  # only here: timm takes seconds

    try:
        cost = analyze(config)
    except UserError:
        return Costs()
    return Costs(cost.params, cost.macs_static, cost.macs_assembly)


def _curve(run: Run, figures: Sequence[Figure]) -> Curve | None:
    figure = figures[0]
    try:
        content = read_run(run.work_dir, [figure.result])
    except ReportError:  # nothing evaluated yet, or a line under way
        return None
    key = ("ema_" if content.results["weights"] == "ema" else "") + figure.result
    score = [(epoch, value * figure.scale) for epoch, value in content.curve("val", key)]
    return Curve(run.seed, score, content.curve("train", "loss"))
