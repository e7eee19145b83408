"""The results of a published table's runs, beside the published figures."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import ConfigError, load_config
from ..errors import UserError, one_line, say
from ..evaluation import SOURCES, PaperRow, PaperTable, ReportError, read_run, render_table
from ..pictures.coefficients import PictureError
from ..pictures.style import check_matplotlib
from .plots import Curve, Dot, plot_curves, plot_dots, run_curve
from .published import CONFIGS, Reproduction
from .runs import Run, State, find_state
from .settings import differences, read_settings

_NONE = "-"
_RECALLED = "?"
_SAME_DATA = 0.99  # of an epoch's images; the last incomplete batch is left out
Costs = tuple[int | None, int | None, int | None]
"""Parameters, multiply-adds and those of kernel assembly; None is not counted."""


@dataclass
class RowReport:
    """A row, published and measured."""

    row: PaperRow  # the published figures
    states: Sequence[State]  # of its runs; empty where there is nothing to run
    costs: Costs = (None, None, None)
    runs: int = 0  # how many are done
    # means over them by the figures' keys, in the table's units: of each run the best epoch's
    figures: Mapping[str, float] = field(default_factory=dict)
    spread: Mapping[str, float] = field(default_factory=dict)  # standard deviations over several
    hours: float = 0.0  # of training, the mean
    deviations: Sequence[str] = ()  # of their recipe from the shipped one
    curves: Sequence[Curve] = ()  # of all runs that have begun
    problem: str = ""  # why a run cannot be read

    @property
    def state(self) -> str:
        """The state of the row, in words."""
        if self.problem:
            return f"unreadable: {self.problem}"
        if not self.states:
            return "no configuration: published only"
        if len(self.states) == 1:
            return str(self.states[0])
        counts = Counter(map(str, self.states))
        return ", ".join(f"{count} x {text}" for text, count in counts.items())

    def difference(self, key: str) -> float | None:
        """Measured minus published, where both exist."""
        both = key in self.figures and key in self.row.figures
        return self.figures[key] - self.row.figures[key] if both else None

    @property
    def remarks(self) -> list[str]:
        """Notes for a reader of the figures."""
        found = [self.row.note] if self.row.note else []
        if self.deviations:
            found.append(f"differs from the shipped configuration: {'; '.join(self.deviations)}")
        if self.runs > 1:
            found.append(f"mean and standard deviation of {self.runs} seeds")
        return found


def overview(task: Reproduction, rows: Sequence[PaperRow]) -> str:
    """A table's rows: published figures, configurations, and states of the runs."""
    table = task.table
    lines = [f"{table.title}; {task.scale.title}; in {task.folder}", ""]
    longest = max(len(row.model) for row in rows) + 7
    for row in rows:
        figures = [
            f"{figure.title} {row.figures[figure.key]:.{figure.digits}f}"
            for figure in table.figures
            if figure.key in row.figures
        ]
        published = f"published {', '.join(figures) or 'nothing'} ({SOURCES[row.source]})"
        runs = task.runs(row, more=True)
        if not runs:
            why = "no configuration: published only"
            if table.kind == "latency":
                why = "not trained: kw benchmark networks measures latency"
            lines.append(f"{row.model:{longest}}  {why}; {published}")
        for run in runs:
            name = f"{row.model}-seed{run.seed}" if run.seed else row.model
            where = "" if run.home == task.folder else f"; the run is {run.work_dir}"
            lines.append(f"{name:{longest}}  {find_state(run)}; {published}{where}")
    return "\n".join(lines)


def collect(task: Reproduction, rows: Sequence[PaperRow]) -> list[RowReport]:
    """Read the results of the runs of some rows of a table.

    A run that cannot be read is a problem of its row.
    """
    return [_collect_row(task, row) for row in rows]


def _collect_row(task: Reproduction, row: PaperRow) -> RowReport:
    runs = task.runs(row, more=True)
    report = RowReport(row, [find_state(run) for run in runs])
    report.curves = [curve for run in runs if (curve := _curve(task, row, run)) is not None]
    done = [run for run, state in zip(runs, report.states, strict=True) if state.kind == "done"]
    try:
        if done:
            _measure(task.table, report, done)
        elif runs and task.scale.name == "full" and runs[0].config.suffix == ".yaml":
            report.costs = _count(runs[0].config)
    except UserError as error:  # a file of the run is damaged; the other rows are not
        report.problem, report.runs, report.figures = str(error), 0, {}
    return report


def _measure(table: PaperTable, report: RowReport, runs: Sequence[Run]) -> None:
    found = [read_run(run.work_dir, [f.result for f in table.figures]) for run in runs]
    values = {f.key: [run.results[f.result] * f.scale for run in found] for f in table.figures}
    deviating: dict[str, None] = {}
    try:
        shipped = read_settings(CONFIGS / str(report.row.config))
    except ConfigError as error:  # mmdetection is not here
        deviating[f"not compared with the shipped configuration: {one_line(error)}"] = None
        shipped = {}
    for run, content in zip(runs, found, strict=True):
        begun = run.work_dir / f"config{run.config.suffix}"
        settings = read_settings(begun) if shipped else {}
        own = differences(shipped, settings, seed=False) if shipped else []
        own += _data_deviations(table, content.log, settings)
        deviating |= dict.fromkeys(own)
    report.costs = (found[0].results["params"], None, None)
    if runs[0].config.suffix == ".yaml":
        report.costs = _count(runs[0].work_dir / "config.yaml")
    report.runs = len(runs)
    report.figures = {key: statistics.fmean(each) for key, each in values.items()}
    if len(runs) > 1:
        report.spread = {key: statistics.stdev(each) for key, each in values.items()}
    report.hours = statistics.fmean(run.hours for run in found)
    report.deviations = tuple(deviating)


def _data_deviations(
    table: PaperTable, log: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> list[str]:
    """Differences from the data of the published figures, by the numbers of images in the log."""
    found = []
    train = [line for line in log if line["mode"] == "train"]
    evaluated = [line for line in log if line["mode"] == "val"]
    expected = table.data
    if train and settings:
        images = train[-1]["iter"] / train[-1]["epoch"] * settings["total_batch_size"]
        if not _SAME_DATA < images / expected["train_images"] < 1 / _SAME_DATA:
            found.append(
                f"about {images:,.0f} training images an epoch, not {expected['name']}'s "
                f"{expected['train_images']:,}"
            )
    if evaluated and evaluated[-1].get("images", expected["val_images"]) != expected["val_images"]:
        found.append(
            f"evaluated on {evaluated[-1]['images']:,.0f} images, not {expected['val_images']:,}"
        )
    return found


def _count(path: Path) -> Costs:
    from ..models.complexity import analyze  # only here: timm takes seconds

    config = load_config(path, check_model_name=False)
    try:
        cost = analyze(config)
    except UserError:
        return None, None, None
    return cost.params, cost.macs_static, cost.macs_assembly


def _curve(task: Reproduction, row: PaperRow, run: Run) -> Curve | None:
    figure = task.table.figures[0]
    try:
        content = read_run(run.work_dir, [figure.result])
    except ReportError:  # nothing evaluated yet, or a line under way
        return None
    level = None if task.scale.rules else row.figures.get(figure.key)
    return run_curve(content, row.model, figure.result, figure.scale, level)


def write_report(task: Reproduction, rows: Sequence[PaperRow], folder: Path) -> list[Path]:
    """Write ``table.txt``, ``table.md``, and where there is something to draw ``accuracy.svg`` and
    ``curves.svg``.

    Returns:
        Their paths.

    Raises:
        UserError: one of them cannot be written.
    """
    reports = collect(task, rows)
    title = f"{task.table.title} ({task.scale.title})"
    remarks = dict.fromkeys(remark for report in reports for remark in report.remarks)
    marks = {remark: f"[{number}]" for number, remark in enumerate(remarks, 1)}
    notes = [f"{mark} {remark}" for remark, mark in marks.items()]
    if any(report.row.source == "recalled" for report in reports):
        notes.insert(0, f"{_RECALLED} recalled and unconfirmed: no public source; not a target")
    header, cells = _cells(task.table, reports, marks)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures = _draw(task, reports, folder)
        words = (0, len(header) - 2, len(header) - 1)
        text = [title, render_table(header, cells, words, plain=True), "\n".join(notes)]
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in cells]
        markdown = [f"# {title}", render_table(header, escaped, words)]
        markdown += ["\n".join(f"- {note}" for note in notes)]
        markdown += [f"![{path.stem}]({path.name})" for path in pictures]
        paths = [folder / "table.txt", folder / "table.md"]
        for path, parts in zip(paths, (text, markdown), strict=True):
            path.write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written: {error.strerror}") from error
    return [*paths, *pictures]


def _draw(task: Reproduction, reports: Sequence[RowReport], folder: Path) -> list[Path]:
    figure = task.table.figures[0]
    sizes, hours = [], []
    for report in reports:
        name, published = report.row.model, report.row.figures
        value, params = report.figures.get(figure.key), report.costs[0]
        if not task.scale.rules and "params_m" in published and figure.key in published:
            kind = "recalled" if report.row.source == "recalled" else "published"
            label = "" if report.runs else name  # once a row
            sizes.append(Dot(label, published["params_m"], published[figure.key], kind))
        if value is not None and params is not None:
            sizes.append(Dot(name, params / 1e6, value))
        if value is not None and report.hours > 0:
            hours.append(Dot(name, report.hours, value))
    panels = {"parameters, millions": sizes, "hours of training": hours}
    panels = {name: dots for name, dots in panels.items() if dots}
    curves = [curve for report in reports for curve in report.curves]
    if not (panels or curves):
        return []
    try:
        check_matplotlib()
    except PictureError as error:
        say(f"{folder}: without pictures: {error}")
        return []
    paths = []
    if panels:
        paths.append(plot_dots(panels, figure.title, folder / "accuracy.svg"))
    if curves:
        paths.append(plot_curves(curves, figure.title, folder / "curves.svg"))
    return paths


def _cells(
    table: PaperTable, reports: Sequence[RowReport], marks: Mapping[str, str]
) -> tuple[list[str], list[list[str]]]:
    has_size = any("params_m" in report.row.figures for report in reports)
    header = ["row", *(["parameters published"] if has_size else []), "built"]
    header += ["multiply-adds", "of assembly"]
    for figure in table.figures:
        header += [f"{figure.title} published", "measured", "difference"]
    rows = []
    for report in reports:
        published, (params, macs, assembly) = report.row.figures, report.costs
        doubt = _RECALLED if report.row.source == "recalled" else ""
        own = "".join(marks[remark] for remark in report.remarks)
        cells = [f"{report.row.model} {own}".strip()]
        if has_size:
            cells.append(_show(published.get("params_m"), 2, suffix=f"M{doubt}"))
        cells += [_show(params, 2, 1e6, "M"), _show(macs, 3, 1e9, "G")]
        cells.append(_show(assembly or None, 3, 1e9, "G"))
        for figure in table.figures:
            digits, spread = figure.digits, report.spread.get(figure.key)
            error = "" if spread is None else f" ± {spread:.{digits}f}"
            value, change = report.figures.get(figure.key), report.difference(figure.key)
            cells.append(_show(published.get(figure.key), digits, suffix=doubt))
            absent = "not run" if report.states else _NONE
            cells.append(absent if value is None else f"{value:.{digits}f}{error}")
            cells.append(_NONE if change is None else f"{change:+.{digits}f}{doubt}")
        cells.append(_show(report.hours, 1 if report.hours >= 10 else 3) if report.runs else _NONE)
        rows.append([*cells, SOURCES[report.row.source], report.state])
    return [*header, "hours", "source", "state"], rows


def _show(value: float | None, digits: int, unit: float = 1, suffix: str = "") -> str:
    return _NONE if value is None else f"{value / unit:.{digits}f}{suffix}"
