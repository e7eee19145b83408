"""Results of finished runs, and tables of them.

Reads work directories as the engine writes them (``results.json``, ``log.jsonl``).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError

# What is read here of a run's two files, each with its types.
_Keys = Mapping[str, tuple[type, ...]]
_RESULTS: _Keys = {"params": (int,), "weights": (str,)}
_LINE: _Keys = {"mode": (str,), "epoch": (int,), "iter": (int,)}
_TRAIN: _Keys = {"seconds": (int, float), "loss": (type(None), int, float)}
_FIGURE = (int, float)


class ReportError(UserError):
    """A work directory, a summary or a file of tables is missing or wrong."""


@dataclass(frozen=True)
class Run:
    """One work directory.

    Attributes:
        name: the directory's name.
        results: ``results.json``.
        log: the lines of ``log.jsonl``.
    """

    name: str
    results: dict[str, Any]
    log: list[dict[str, Any]]

    def curve(self, mode: str, key: str) -> list[tuple[int, float]]:
        """``(epoch, value)`` of a logged figure; the mean over the updates of an epoch."""
        points: dict[int, list[tuple[float, int]]] = {}
        lines = [line for line in self.log if line["mode"] == mode]
        first = [line for line in lines if line["epoch"] == lines[0]["epoch"]]
        # The log of a run that went on in another folder begins with a later epoch.
        before = first[-1]["iter"] * (first[0]["epoch"] - 1) // first[0]["epoch"] if first else 0
        for line in lines:
            updates, before = line["iter"] - before, line["iter"]  # an epoch's last line has fewer
            # Null: not one finite value. Absent: before there was an average.
            if line.get(key) is not None:
                points.setdefault(line["epoch"], []).append((line[key], updates))
        return [
            (epoch, sum(v * n for v, n in lines) / sum(n for _, n in lines))
            for epoch, lines in sorted(points.items())
        ]

    @property
    def judged_by(self) -> str:
        """Prefix of its figures in the log: ``ema_`` where the average of weights stands for it."""
        return "ema_" if self.results["weights"] == "ema" else ""

    @property
    def hours(self) -> float:
        """Training time of the whole run, over all its pieces; evaluation not counted."""
        return sum(line["seconds"] for line in self.log if line["mode"] == "train") / 3600

    @property
    def seconds_per_epoch(self) -> float:
        """Training time per epoch, evaluation not counted, averaged over the logged epochs."""
        training = [line for line in self.log if line["mode"] == "train"]
        return sum(line["seconds"] for line in training) / len({line["epoch"] for line in training})


def read_run(work_dir: str | Path, figures: Sequence[str] = ("top1",)) -> Run:
    """Read a work directory.

    Args:
        work_dir: as the engine writes it.
        figures: what its evaluations must have; those of a detector are ``bbox_mAP`` and so on.

    Raises:
        ReportError: it has no results: the run has not evaluated yet; or they are not those that
            training writes.
    """
    work_dir = Path(work_dir)
    for name in ("results.json", "log.jsonl"):
        if not (work_dir / name).is_file():
            raise ReportError(
                f"{work_dir} has no {name}: not a work directory, or not evaluated yet"
            )
    evaluated: _Keys = dict.fromkeys(figures, _FIGURE)
    results_file = work_dir / "results.json"
    (results,) = _read_lines(results_file, {**_RESULTS, **evaluated}, whole=True)
    log = _read_lines(work_dir / "log.jsonl", _LINE, {"train": _TRAIN, "val": evaluated})
    if not any(line["mode"] == "train" for line in log):
        raise ReportError(f"{work_dir / 'log.jsonl'} has no line of training")
    return Run(work_dir.absolute().name, results, log)


def _read_lines(
    path: Path, keys: _Keys, of_mode: Mapping[str, _Keys] | None = None, *, whole: bool = False
) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line or one in all; ``of_mode`` adds to a mode's keys."""
    of_mode = of_mode or {}
    try:
        text = path.read_text(encoding="utf-8")
        found = [json.loads(part) for part in ([text] if whole else text.splitlines())]
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path} is not JSON: {error}") from error
    for number, content in enumerate(found, 1):
        where = str(path) if whole else f"{path}:{number}"
        if not isinstance(content, dict):
            raise ReportError(f"{where}: expected an object, as training writes it")
        for key, kinds in {**keys, **of_mode.get(str(content.get("mode")), {})}.items():
            if type(content.get(key)) not in kinds:
                raise ReportError(
                    f"{where}: {key} = {content.get(key)!r}: expected {kinds[-1].__name__}, as "
                    "training writes it"
                )
    return found


def render_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Collection[int] = (0,),
    *,
    plain: bool = False,
) -> str:
    """A Markdown table, aligned for reading as text.

    Args:
        header: of the columns.
        rows: as many cells as columns each.
        left: columns that are aligned to the left; the others are to the right.
        plain: without Markdown's bars, for a terminal.
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    begin, between, end, right = ("", "  ", "", "-") if plain else ("| ", " | ", " |", ":")

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"{begin}{between.join(padded)}{end}".rstrip()

    rule = ["-" * (width - 1) + ("-" if i in left else right) for i, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def around(text: str, begin: str, end: str) -> tuple[str, str]:
    """A page before and after the part between two marks, which belong to what is around it.

    Raises:
        ReportError: the marks do not stand there once each, in this order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ReportError(f"expected once, in this order, the lines {begin!r} and {end!r}")
    return text[: text.index(begin) + len(begin)], text[text.index(end) :]


def summary_table(
    runs: Sequence[Run], score: str = "top1", name: str = "top-1 (%)", scale: float = 1
) -> str:
    """Model, parameters in millions, score of the best epoch, seconds per epoch; ``score`` is its
    key, called ``name``, and ``scale`` leads from its unit to the table's."""
    rows = [
        (
            run.name,
            f"{run.results['params'] / 1e6:.2f}M",
            f"{scale * run.results[score]:.2f}",
            f"{run.seconds_per_epoch:.1f}",
        )
        for run in runs
    ]
    return render_table(("model", "parameters", name, "seconds per epoch"), rows)
