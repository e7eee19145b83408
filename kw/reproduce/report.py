"""What a person sees of a reproduction: what would run, and the written report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..evaluation import SOURCES, PaperRow
from .collect import collect
from .page import render_page
from .runs import Reproduction
from .state import Jobs, find_state
from .text import lay_out, render_markdown, render_text

__all__ = ["overview", "write_report"]


def overview(task: Reproduction, rows: Sequence[PaperRow]) -> str:
    """A table's rows: what is published, what trains them, and what became of that."""
    table = task.table
    lines = [f"{table.title}; {task.scale.title}; in {task.folder}", ""]
    longest = max(len(row.model) for row in rows) + 7
    for row in rows:
        figures = [
            f"{figure.title} {row.figures[figure.key]:.{figure.digits}f}"
            for figure in table.figures
            if figure.key in row.figures
        ]
        published = f"{', '.join(figures)} ({SOURCES[row.source]})"
        runs = task.all_runs(row)
        if not runs:
            why = "no configuration: published only"
            if table.kind == "latency":
                why = "not trained: tools/benchmark.py measures latency"
            lines.append(f"{row.model:{longest}}  {why}; published {published}")
        for run in runs:
            state = find_state(run, Jobs(run.home), task.waits_for(run))
            name = f"{row.model}-seed{run.seed}" if run.seed else row.model
            where = "" if run.home == task.folder else f"; the run is {run.work_dir}"
            lines.append(f"{name:{longest}}  {state}; published {published}{where}")
    return "\n".join(lines)


def write_report(task: Reproduction, rows: Sequence[PaperRow], folder: Path) -> list[Path]:
    """Write ``table.txt``, ``table.md`` and ``table.html``.

    Returns:
        Their paths.

    Raises:
        UserError: one of them cannot be written.
    """
    report = collect(task, rows)
    sheet = lay_out(report)
    texts = {
        "table.txt": render_text(sheet),
        "table.md": render_markdown(sheet),
        "table.html": render_page(report, sheet),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written: {error.strerror}") from error
    return [folder / name for name in texts]
