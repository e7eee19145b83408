"""The results of a study's runs: a summary small enough to commit, its table and its curves.

A summary is JSON with everything that a page says about the study; no figure is typed by hand::

    {"study": name, "command": ..., "machine": {...}, "versions": {...}, "code": {...},
     "options": [settings over the rows' own], "images": test images,
     "missing": [runs without an end], "runs": [see summarise_run],
     "earlier": [of runs under other conditions: command, machine, versions, code, runs (names)]}
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..evaluation import ReportError, read_run, render_table
from ..evaluation.report import around
from .files import Study
from .plots import Curve, plot_curves

Summary = Mapping[str, Any]
_DIGITS = 4
_CONDITIONS = ("command", "machine", "versions", "code")
STARTED = "study.json"
"""File in the folder of a study's runs: command, machine, versions and code of their start; code
that they went on with is ``later`` there."""


def summarise_run(folder: Path, row: str, seed: int) -> dict[str, Any]:
    """The results in the work directory of a finished run.

    Returns:
        ``row``, ``seed``, ``params``, ``epochs``, ``top1``, ``top5`` and ``loss`` of the last
        evaluation (of the average of weights, where there is one), ``best_top1`` and
        ``best_epoch``, ``temperature`` at the last update (null where there is none), ``hours`` of
        training without evaluation, and ``curve``: per epoch ``train_loss`` (mean over the epoch)
        and the evaluation's ``top1``, ``top5``, ``loss``. A loss that was not finite is null.

    Raises:
        ReportError: no such run, or one without an evaluation.
    """
    run = read_run(folder)
    training = [line for line in run.log if line["mode"] == "train"]
    judged = f"{run.judged_by}top1"  # absent before there was an average
    evaluations = [line for line in run.log if line["mode"] == "val" and judged in line]
    if not evaluations:
        raise ReportError(f"{folder / 'log.jsonl'} has no evaluation")
    losses = dict(run.curve("train", "loss"))
    curve = [
        {"epoch": line["epoch"], "train_loss": _short(losses.get(line["epoch"]))}
        | {key: _short(line[run.judged_by + key]) for key in ("top1", "top5", "loss")}
        for line in evaluations
    ]
    best, last = max(curve, key=lambda point: point["top1"]), curve[-1]
    return {
        "row": row,
        "seed": seed,
        "params": run.results["params"],
        "epochs": last["epoch"],
        **{key: last[key] for key in ("top1", "top5", "loss")},
        "best_top1": best["top1"],
        "best_epoch": best["epoch"],
        "images": evaluations[-1]["images"],
        "temperature": training[-1].get("temperature"),
        "hours": _short(run.hours),
        "curve": curve,
    }


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)


def read_started(folder: Path) -> dict[str, Any]:
    """The record of the start of a folder's runs: command, machine, versions, code.

    Raises:
        ReportError: there is no record.
    """
    path = folder / STARTED
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: content[key] for key in _CONDITIONS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path}: expected what kw study run notes: {error!r}") from error


def name_of(run: Summary) -> str:
    """The name of a summarised run's work directory."""
    return f"{run['row']}_seed{run['seed']}"


def read_earlier(path: Path, study: Study) -> dict[str, Any]:
    """Read the summary of runs of the same study that lie elsewhere, such as on another machine.

    Raises:
        ReportError: the file is no summary, or of a study with other settings or runs.
    """
    earlier = read_summary(path)
    if list(study.options) != earlier["options"]:
        differ = sorted(set(study.options) ^ set(earlier["options"]))
        raise ReportError(f"{path}: its runs have other settings: {'; '.join(differ)}")
    known = {run.name for run in study.runs}
    if strange := [name for run in earlier["runs"] if (name := name_of(run)) not in known]:
        raise ReportError(f"{path}: the study has no runs {', '.join(strange)}")
    return earlier


def join_earlier(summary: dict[str, Any], earlier: Summary, study: Study) -> dict[str, Any]:
    """A summary with the runs of an earlier one that it does not have, in the study's order.

    Raises:
        ReportError: they were tested on other images.
    """
    if earlier["images"] != summary["images"]:
        raise ReportError(
            f"{earlier['images']:,} and {summary['images']:,} images were tested on: other images"
        )
    have = {name_of(run): run for run in summary["runs"]}
    added = {name_of(run): run for run in earlier["runs"] if name_of(run) not in have}
    parts = [*earlier.get("earlier", ())]
    noted = {name for part in parts for name in part["runs"]}
    parts.append({key: earlier[key] for key in _CONDITIONS} | {"runs": added.keys() - noted})
    order, runs = [run.name for run in study.runs], have | added
    for i, part in enumerate(parts):
        kept = [name for name in order if name in added and name in part["runs"]]
        parts[i] = {**part, "runs": kept}
    return summary | {
        "runs": [runs[name] for name in order if name in runs],
        "missing": [name for name in order if name not in runs],
        "earlier": [part for part in parts if part["runs"]],
    }


def read_summary(path: Path) -> dict[str, Any]:
    """Read a summary.

    Raises:
        ReportError: the file is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        study_table(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{path}: expected a study's summary: {error!r}") from error
    return content


def binomial_error(percent: float, images: int) -> float:
    """Standard error of an accuracy measured on so many images, in percent points."""
    share = percent / 100
    return 100 * math.sqrt(share * (1 - share) / images)


def _standard_error(values: Sequence[float]) -> str:
    """ " ± " and the standard error of the mean, from the spread; "" for fewer than two values."""
    if len(values) < 2:
        return ""
    return f" ± {stdev(values) / math.sqrt(len(values)):.2f}"


def study_table(summary: Summary) -> str:
    """The study's rows in Markdown. Figures of several seeds are their mean; top-1 has its standard
    error and all of them behind. Its difference to the first row is over the seeds of both rows."""
    by_row = _by_row(summary)
    base = next(iter(by_row.values()), [])  # the first row: what the others are compared with
    header = ("Row", "Parameters", "top-1", "to the first row", "top-5", "best epoch's top-1")
    rows = []
    for row, runs in by_row.items():
        values = [run["top1"] for run in runs]
        each = f"{_standard_error(values)} ({', '.join(format(value, '.2f') for value in values)})"
        rows.append(
            (
                row,
                _size(runs[0]["params"]),
                f"{fmean(values):.2f}" + (each if len(runs) > 1 else ""),
                "" if runs is base else _difference(runs, base),
                f"{_mean(runs, 'top5'):.2f}",
                f"{_mean(runs, 'best_top1'):.2f}",
                _loss([run["curve"][-1]["train_loss"] for run in runs]),
                _loss([run["loss"] for run in runs]),
                f"{sum(run['hours'] for run in runs):.2f}",
            )
        )
    return render_table((*header, "training loss", "test loss", "hours"), rows)


def _by_row(summary: Summary) -> dict[str, list[Summary]]:
    found: dict[str, list[Summary]] = {}
    for run in summary["runs"]:
        found.setdefault(run["row"], []).append(run)
    return found


def _size(parameters: int) -> str:
    return f"{parameters / 1e6:.2f}M" if parameters >= 10**6 else f"{parameters:,}"


def _difference(runs: Sequence[Summary], base: Sequence[Summary]) -> str:
    """Over the seeds that both rows have, with its standard error; "" where there is none."""
    others = {run["seed"]: run["top1"] for run in base}
    pairs = [run["top1"] - others[run["seed"]] for run in runs if run["seed"] in others]
    return f"{fmean(pairs):+.2f}{_standard_error(pairs)}" if pairs else ""


def _mean(runs: Sequence[Summary], key: str) -> float:
    return fmean(run[key] for run in runs)


def _loss(values: Sequence[Any]) -> str:
    """Their mean; "-" where one of them is null."""
    return "-" if None in values else f"{fmean(values):.3f}"


def render_page(text: str, summaries: Iterable[tuple[str, Summary]]) -> str:
    """A page with every study's part written again, between the lines that mark it.

    Args:
        text: the page; ``<!-- study NAME: begin -->`` and ``<!-- study NAME: end -->`` mark a part.
        summaries: names and summaries.

    Raises:
        ReportError: the marks of a study are missing.
    """
    for name, summary in summaries:
        begin, end = (f"<!-- study {name}: {mark} -->" for mark in ("begin", "end"))
        before, after = around(text, begin, end)
        text = f"{before}\n\n{_render(summary)}\n\n{after}"
    return text


def describe_study(summary: Summary) -> str:
    """The numbers of runs and images behind a study's table, and its statistical error."""
    runs, images = summary["runs"], summary["images"]
    rows = len({run["row"] for run in runs})
    error = binomial_error(_mean(runs, "top1"), images)
    several = len({run["seed"] for run in runs}) > 1
    return (
        f"{_counted(len(runs), 'run')} of {_counted(rows, 'row')}, "
        f"{sum(run['hours'] for run in runs):.1f} hours of training in all. Top-1 and top-5 in "
        f"percent, of the last epoch, on {images:,} images; the standard error of one figure is "
        f"{error:.2f} points, of a difference of two rows up to {math.sqrt(2) * error:.2f} "
        f"(binomial)." + (" ± is the standard error over seeds." if several else "")
    )


def _render(summary: Summary) -> str:
    runs = summary["runs"]
    if not runs:
        return "No run has ended yet."
    said = [describe_study(summary), study_table(summary)]
    if summary["missing"]:
        said.append(f"Without an end: {', '.join(summary['missing'])}.")
    annealed = [run["temperature"] for run in runs if run["temperature"] is not None]
    if annealed:
        count = _counted(len(annealed), "run")
        said.append(f"Temperature at the last update: at most {max(annealed):g}, in {count}.")
    said.append(_conditions(summary))
    for part in summary.get("earlier", ()):
        said.append(f"Earlier, {', '.join(part['runs'])}: {_conditions(part)}")
    options = " ".join(summary["options"])
    # Earlier versions called it by its path.
    command = str(summary["command"]).replace("python tools/run_study.py", "kw study run")
    said.append(f"    {command}\n\nOver the rows' own settings: `{options}`.")
    return "\n\n".join(said)


def _conditions(part: Summary) -> str:
    machine, versions, code = (part[key] for key in ("machine", "versions", "code"))
    known = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    later = ", ".join(map(_commit, code.get("later", ())))
    return (
        f"Machine: {machine.get('gpu') or machine['cpu']}, {_counted(machine['cores'], 'core')}. "
        f"{known}. Commit {_commit(code)}{f'; later {later}' if later else ''}."
    )


def _commit(code: Mapping[str, Any]) -> str:
    return f"{code['commit'] or 'unknown'}{' with changes' if code['dirty'] else ''}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def plot_study(summary: Summary, path: Path) -> None:
    """Training loss and test top-1 over epochs, one line a row: the mean of its seeds, where all
    have one.

    Raises:
        PictureError: matplotlib is missing, or the file cannot be written.
    """
    curves = []
    for row, runs in _by_row(summary).items():
        epochs = [*zip(*(run["curve"] for run in runs), strict=False)]  # some may stop early
        loss, score = (
            [
                (same[0]["epoch"], fmean(values))
                for same in epochs
                if None not in (values := [point[key] for point in same])
            ]
            for key in ("train_loss", "top1")
        )
        curves.append(Curve(row, loss, score))
    plot_curves(curves, "test top-1 (%)", path)
