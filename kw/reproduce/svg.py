"""Plots as inline SVG: text stays text, and colours are the page's CSS variables.

A page that holds them needs no other file, follows the reader's choice of light or dark, and can be
read aloud: every point has a title.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

__all__ = ["Axis", "Line", "Point", "chart"]

_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 14, 12, 40
_CHARACTER, _LINE_HEIGHT = 6.0, 11  # of a label, pixels, about


@dataclass(frozen=True)
class Axis:
    """An axis: its label, whether it is logarithmic, whether only whole numbers are marked."""

    label: str
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Point:
    """A dot.

    Attributes:
        x: where, in the axis' unit.
        y: likewise.
        title: what a reader is told of it.
        style: CSS class.
        label: beside it; empty for none.
    """

    x: float
    y: float
    title: str
    style: str
    label: str = ""


@dataclass(frozen=True)
class Line:
    """A polyline, or a horizontal rule where it has one point: at its y."""

    points: Sequence[tuple[float, float]]
    title: str
    style: str


@dataclass
class _Scale:
    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: list[float] = field(default_factory=list)

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(value)
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def chart(
    name: str,
    x: Axis,
    y: Axis,
    points: Sequence[Point] = (),
    lines: Sequence[Line] = (),
    width: int = 620,
    height: int = 340,
) -> str:
    """A picture of dots and lines.

    Args:
        name: what it shows, for those who do not see it.
        x: the horizontal axis.
        y: the vertical axis.
        points: dots.
        lines: lines.
        width: pixels.
        height: pixels.

    Returns:
        An ``<svg>`` element; empty where there is nothing finite to show.
    """
    points = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
    drawn = [
        Line(kept, line.title, line.style)
        for line in lines
        if (kept := [(a, b) for a, b in line.points if math.isfinite(a) and math.isfinite(b)])
    ]
    xs = [p.x for p in points] + [
        a for line in drawn if len(line.points) > 1 for a, _ in line.points
    ]
    ys = [p.y for p in points] + [b for line in drawn for _, b in line.points]
    if not ys:
        return ""
    across = _scale(xs or [0, 1], x, _LEFT, width - _RIGHT)
    up = _scale(ys, y, height - _BOTTOM, _TOP)
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(name)}"><title>{escape(name)}</title>'
    ]
    parts += _axes(x, y, across, up, width, height)
    for line in drawn:
        at = [(across(a), up(b)) for a, b in line.points]
        if len(at) == 1:
            at = [(_LEFT, at[0][1]), (width - _RIGHT, at[0][1])]
        coordinates = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
        parts.append(
            f'<polyline class="{line.style}" points="{coordinates}"><title>{escape(line.title)}'
            "</title></polyline>"
        )
    at = [(across(p.x), up(p.y)) for p in points]
    for point, (a, b) in zip(points, at, strict=True):
        parts.append(
            f'<circle class="{point.style}" cx="{a:.1f}" cy="{b:.1f}" r="4.5"><title>'
            f"{escape(point.title)}</title></circle>"
        )
    parts += _labels(points, at, width, height)
    return "\n".join([*parts, "</svg>"])


def _axes(x: Axis, y: Axis, across: _Scale, up: _Scale, width: int, height: int) -> list[str]:
    parts = []
    floor = height - _BOTTOM
    for tick in across.ticks:
        a = across(tick)
        parts.append(f'<line class="grid" x1="{a:.1f}" x2="{a:.1f}" y1="{_TOP}" y2="{floor}"/>')
        parts.append(
            f'<text x="{a:.1f}" y="{floor + 15}" text-anchor="middle">{_number(tick)}</text>'
        )
    for tick in up.ticks:
        b = up(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{b:.1f}" y2="{b:.1f}"/>'
        )
        parts.append(
            f'<text x="{_LEFT - 6}" y="{b + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
        )
    middle = (_LEFT + width - _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{height - 6}" text-anchor="middle">{escape(x.label)}</text>'
    )
    half = (_TOP + floor) / 2
    parts.append(
        f'<text x="12" y="{half}" text-anchor="middle" transform="rotate(-90 12 {half})">'
        f"{escape(y.label)}</text>"
    )
    return parts


def _scale(values: Sequence[float], axis: Axis, start: float, end: float) -> _Scale:
    low, high = min(values), max(values)
    if axis.log and low > 0:
        low, high = low / 1.15, high * 1.15
        steps = (1, 2, 5) if high / low < 300 else (1,)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**power for power in powers for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) > 1:
            return _Scale(low, high, start, end, True, ticks)
    room = (high - low) * 0.06 or abs(high) * 0.05 or 0.5
    low, high = low - room, high + room
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if (high - low) / (m * step) <= 6)
    step = max(step, 1) if axis.whole else step
    first = math.ceil(low / step)
    ticks = [n * step for n in range(first, math.floor(high / step) + 1)]
    return _Scale(low, high, start, end, False, ticks)


def _number(value: float) -> str:
    return f"{value:.6g}"


def _labels(
    points: Sequence[Point], at: Sequence[tuple[float, float]], width: int, height: int
) -> list[str]:
    """Each label where it covers no dot and no label before it, of a few places; else not shown.

    The title of the dot says it in any case.
    """
    taken = [(a - 5, b - 5, a + 5, b + 5) for a, b in at]
    parts = []
    for point, (a, b) in zip(points, at, strict=True):
        if not point.label:
            continue
        long = _CHARACTER * len(point.label)
        places = [
            (a + 8, b + 4),
            (a - 8 - long, b + 4),
            (a - long / 2, b - 9),
            (a - long / 2, b + 16),
        ]
        places += [(a + 8, b - 6), (a + 8, b + 14), (a - 8 - long, b - 6), (a - 8 - long, b + 14)]
        for left, base in places:
            box = (left, base - _LINE_HEIGHT + 2, left + long, base + 2)
            inside = (
                box[0] > _LEFT and box[2] < width - 2 and box[1] > 2 and box[3] < height - _BOTTOM
            )
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                where = f'x="{left:.1f}" y="{base:.1f}"'
                parts.append(f'<text class="label" {where}>{escape(point.label)}</text>')
                break
    return parts


def _overlap(
    one: tuple[float, float, float, float], other: tuple[float, float, float, float]
) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
