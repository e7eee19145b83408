"""A report as one HTML file that needs no other: table, notes and plots."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..evaluation import Figure
from .collect import RowReport, TableReport
from .svg import Axis, Line, Point, chart
from .text import NONE, Sheet

__all__ = ["render_page"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #ffffff; --faint: #d9dce1;
  --measured: #0b6cb0; --published: #b3540a; --loss: #6b4fa0; --quiet: #5a6069; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #16181c; --faint: #363b43;
  --measured: #6db8f2; --published: #f0a463; --loss: #b9a2ea; --quiet: #a2a9b4; } }
body { color: var(--ink); background: var(--paper); max-width: 110rem; margin: 2rem auto;
  padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35rem; } h2 { font-size: 1.1rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .5rem; color: var(--quiet); }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--faint); text-align: right; }
thead th { vertical-align: bottom; } .words { text-align: left; }
td.words { min-width: 10rem; }
tbody th { text-align: left; font-weight: 600; white-space: nowrap; }
.recalled { color: var(--quiet); font-style: italic; } .pending { color: var(--quiet); }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; }
figcaption { color: var(--quiet); max-width: 38rem; }
svg { max-width: 100%; height: auto; font: 11px system-ui, sans-serif; fill: var(--ink); }
svg .grid { stroke: var(--faint); } svg .label { font-size: 10px; }
svg polyline { fill: none; stroke-width: 1.8; }
svg .measured { stroke: var(--measured); } svg circle.measured { fill: var(--measured); }
svg .published { stroke: var(--published); stroke-width: 1.6; }
svg circle.published { fill: var(--paper); } svg polyline.published { stroke-dasharray: 5 4; }
svg circle.recalled { fill: var(--paper); stroke: var(--published); stroke-dasharray: 2 2; }
svg polyline.recalled { stroke: var(--published); stroke-dasharray: 1 4; }
svg .loss { stroke: var(--loss); }
"""
_KEY = (
    "Filled: measured here. Open: published; with a broken outline: recalled and unconfirmed. "
    "Names that would cover others are left out; a dot tells its own."
)


def render_page(report: TableReport, sheet: Sheet) -> str:
    """The page of a report.

    Args:
        report: what its plots show.
        sheet: its table and notes, :func:`kw.reproduce.text.lay_out`'s.
    """
    figure = report.table.figures[0]
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(sheet.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
        f"<h1>{escape(sheet.title)}</h1>",
        _table(sheet),
        _notes(sheet),
    ]
    plots = [plot for plot in (_by_size(report, figure), _by_time(report, figure)) if plot]
    if plots:
        parts.append(f'<h2>Accuracy</h2>\n<div class="plots">{"".join(plots)}</div>')
    curves = [plot for row in report.rows if (plot := _curves(row, figure, report.is_full))]
    if curves:
        level = ", with the published figure as a level" if report.is_full else ""
        what = f"{escape(figure.title)}{level}, and the training loss"
        parts.append(f"<h2>Curves</h2>\n<p>By epoch: {what}; a line for every seed.</p>")
        parts += curves
    return "\n".join([*parts, "</body>\n</html>"]) + "\n"


def _table(sheet: Sheet) -> str:
    words = {0, len(sheet.header) - 2, len(sheet.header) - 1}
    head = "".join(
        f'<th scope="col"{_words(i in words)}>{escape(name)}</th>'
        for i, name in enumerate(sheet.header)
    )
    body = []
    for row in sheet.rows:
        cells = [f'<th scope="row">{escape(row[0])}</th>']
        for i, cell in enumerate(row[1:], 1):
            style = (
                "recalled" if cell.endswith("?") else "pending" if cell in ("not run", NONE) else ""
            )
            kinds = " ".join(name for name in ("words" if i in words else "", style) if name)
            cells.append(f'<td class="{kinds}">' if kinds else "<td>")
            cells.append(f"{escape(cell)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    caption = (
        "Published figures and those measured here, of every run the best epoch's; accuracies and "
        "AP in percent."
    )
    return (
        f'<div class="wide"><table><caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(body)}\n</tbody></table></div>"
    )


def _words(are: bool) -> str:
    return ' class="words"' if are else ""


def _notes(sheet: Sheet) -> str:
    lines = [f"<li>{escape(mark)} {escape(text)}</li>" for mark, text in sheet.notes]
    return f"<ul>\n{chr(10).join(lines)}\n</ul>" if lines else ""


def _by_size(report: TableReport, figure: Figure) -> str:
    """Accuracy over parameters, published and measured."""
    points = []
    for row in report.rows:
        published, size = row.row.figures.get(figure.key), row.row.figures.get("params_m")
        if report.is_full and published is not None and size is not None:
            style = "recalled" if row.row.source == "recalled" else "published"
            title = f"{row.row.model}, published: {published} at {size}M"
            # One name a row is enough.
            label = "" if row.measured else row.row.model
            points.append(Point(size, published, title, style, label))
        if row.measured is not None and row.costs.params is not None:
            size = row.costs.params / 1e6
            points.append(_measured(row, figure, size, f"{size:.2f}M parameters"))
    name = f"{figure.title} by parameters"
    picture = chart(name, Axis("parameters, millions", log=True), Axis(figure.title), points)
    return _figure(picture, f"{figure.title} against parameters. {_KEY if report.is_full else ''}")


def _by_time(report: TableReport, figure: Figure) -> str:
    """Accuracy over hours, of what was measured."""
    points = [
        _measured(row, figure, row.measured.hours, f"{row.measured.hours:.3g} hours")
        for row in report.rows
        if row.measured is not None and row.measured.hours > 0
    ]
    name = f"{figure.title} by hours of training"
    picture = chart(name, Axis("hours of training", log=True), Axis(figure.title), points)
    return _figure(picture, f"{figure.title} against the hours of training here.")


def _measured(row: RowReport, figure: Figure, x: float, where: str) -> Point:
    assert row.measured is not None
    value = row.measured.figures[figure.key]
    title = f"{row.row.model}, measured: {value:.{figure.digits}f} at {where}"
    return Point(x, value, title, "measured", row.row.model)


def _curves(row: RowReport, figure: Figure, with_published: bool) -> str:
    """A row over its epochs: the score, perhaps with the published figure, and the loss."""
    if not row.curves:
        return ""
    scores = [Line(_drawn(c.score), f"seed {c.seed}", "measured") for c in row.curves]
    published = row.row.figures.get(figure.key)
    if with_published and published is not None:
        style = "recalled" if row.row.source == "recalled" else "published"
        scores.append(Line([(0, published)], f"published: {published}", style))
    losses = [Line(_drawn(c.loss), f"seed {c.seed}", "loss") for c in row.curves]
    model = row.row.model
    pictures = [
        chart(
            f"{model}: {name}",
            Axis("epoch", whole=True),
            Axis(name),
            lines=lines,
            width=420,
            height=220,
        )
        for name, lines in ((figure.title, scores), ("training loss", losses))
    ]
    return f'<h3>{escape(model)}</h3>\n<div class="plots">{"".join(pictures)}</div>'


def _drawn(points: Sequence[tuple[int, float]]) -> Sequence[tuple[float, float]]:
    """A curve of one epoch as a short line: a line of one point is a level."""
    if len(points) != 1:
        return points
    ((x, y),) = points
    return [(x - 0.1, y), (x + 0.1, y)]


def _figure(picture: str, caption: str) -> str:
    if not picture:
        return ""
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"
