"""A report as a table of words: for a terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..evaluation import SOURCES, Figure, render_table
from .collect import RowReport, TableReport

__all__ = ["Sheet", "lay_out", "render_markdown", "render_text"]

NONE = "-"
RECALLED = "?"
_MILLION, _BILLION = 1e6, 1e9


@dataclass(frozen=True)
class Sheet:
    """A report laid out.

    Attributes:
        title: of the table.
        header: of the columns.
        rows: as many cells as columns each.
        notes: below the table: marks and what they mean.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[tuple[str, str]]


def lay_out(report: TableReport) -> Sheet:
    """The columns, cells and notes of a report; all forms of it show these."""
    figures = report.table.figures
    has_size = any("params_m" in row.row.figures for row in report.rows)
    header = ["row", *(["parameters published"] if has_size else []), "built"]
    header += ["multiply-adds", "of assembly"]
    for figure in figures:
        header += [f"{figure.title} published", "measured", "difference"]
    header += ["hours", "source", "state"]
    marks = _marks(report.rows)
    rows = [_cells(row, figures, has_size, marks) for row in report.rows]
    return Sheet(f"{report.table.title} ({report.scale})", header, rows, _notes(report, marks))


def _marks(rows: Sequence[RowReport]) -> Mapping[str, str]:
    """A mark for every remark: equal ones share theirs. Notes first, then deviations."""
    remarks = [remark for row in rows for remark in _remarks(row)]
    return {remark: _letters(i) for i, remark in enumerate(dict.fromkeys(remarks))}


def _remarks(row: RowReport) -> list[str]:
    found = [row.row.note] if row.row.note else []
    if row.measured is not None:
        if row.measured.deviations:
            found.append(
                f"differs from the shipped configuration: {'; '.join(row.measured.deviations)}"
            )
        if row.measured.runs > 1:
            found.append(f"mean and standard deviation of {row.measured.runs} seeds")
    return found


def _letters(index: int) -> str:
    """a to z, then aa and so on."""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("a") + rest) + letters
    return letters


def _notes(report: TableReport, marks: Mapping[str, str]) -> list[tuple[str, str]]:
    notes = []
    if any(row.row.source == "recalled" for row in report.rows):
        notes.append((RECALLED, "recalled and unconfirmed: no public source; not a target"))
    return [*notes, *((f"[{mark}]", remark) for remark, mark in marks.items())]


def _cells(
    row: RowReport, figures: Sequence[Figure], has_size: bool, marks: Mapping[str, str]
) -> list[str]:
    published, costs, measured = row.row.figures, row.costs, row.measured
    doubt = RECALLED if row.row.source == "recalled" else ""
    own = "".join(f"[{marks[remark]}]" for remark in _remarks(row))
    cells = [f"{row.row.model} {own}".strip()]
    if has_size:
        cells.append(_show(published.get("params_m"), 2, suffix=f"M{doubt}"))
    cells.append(_show(costs.params, 2, _MILLION, "M"))
    cells.append(_show(costs.macs, 3, _BILLION, "G"))
    cells.append(_show(costs.assembly or None, 3, _BILLION, "G"))
    for figure in figures:
        digits = figure.digits
        cells.append(_show(published.get(figure.key), digits, suffix=doubt))
        if measured is None:
            cells += ["not run" if row.states else NONE, NONE]
            continue
        spread = measured.spread.get(figure.key)
        error = "" if spread is None else f" ± {spread:.{digits}f}"
        cells.append(f"{measured.figures[figure.key]:.{digits}f}{error}")
        difference = row.difference(figure.key)
        cells.append(NONE if difference is None else f"{difference:+.{digits}f}{doubt}")
    cells.append(NONE if measured is None else _hours(measured.hours))
    return [*cells, SOURCES[row.row.source], row.state]


def _show(value: float | None, digits: int, unit: float = 1, suffix: str = "") -> str:
    return NONE if value is None else f"{value / unit:.{digits}f}{suffix}"


def _hours(hours: float) -> str:
    return f"{hours:.1f}" if hours >= 10 else f"{hours:.3f}"


def render_text(sheet: Sheet) -> str:
    """For a terminal: aligned columns, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(sheet.header, *sheet.rows, strict=True)]
    last = len(widths) - 1

    def line(cells: Sequence[str]) -> str:
        sides: list[Callable[[str, int], str]] = [
            str.ljust if i in (0, last - 1, last) else str.rjust for i in range(len(cells))
        ]
        padded = [side(c, w) for side, c, w in zip(sides, cells, widths, strict=True)]
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    lines = [sheet.title, "", line(sheet.header), rule, *map(line, sheet.rows)]
    return (
        "\n".join([*lines, "", *(f"{mark} {text}" for mark, text in sheet.notes)]).rstrip() + "\n"
    )


def render_markdown(sheet: Sheet) -> str:
    """The same as a page in Markdown."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in sheet.rows]
    notes = [f"- {mark} {text}" for mark, text in sheet.notes]
    parts = [f"# {sheet.title}", render_table(sheet.header, rows), "\n".join(notes)]
    return "\n\n".join(filter(None, parts)) + "\n"
