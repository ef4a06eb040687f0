"""Line plots as SVG text. Pure; whatever text comes in is escaped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 12, 44
_PLOT_WIDTH, _PLOT_HEIGHT = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
# Okabe and Ito's, which colour-blind people tell apart; the dashes are for paper.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_MAX_POINTS = 1200  # of a line: more would not be seen
_MAX_DOTS = 40  # of a line: where there are few points, one sees which were measured
_LEGEND_ROW, _LEGEND_CHAR, _LEGEND_KEY = 16, 6.5, 44


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line."""

    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """What an axis says, and how it goes from `low` to `high`."""

    title: str
    low: float
    high: float
    is_log: bool = False
    ticks: Sequence[tuple[float, str]] = ()

    def at(self, value: float) -> float:
        """Return where a value lies, from 0 to 1; outside of the axis it is one of its ends."""
        low, high = self.low, self.high
        if self.is_log:
            value, low, high = (math.log(max(number, self.low)) for number in (value, low, high))
        return min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0)


def linear_axis(title: str, values: Iterable[float]) -> Axis:
    """Return an axis from 0 to a round number above all values."""
    most = max(values, default=0.0) or 1.0
    step = _round_step(most / 5)
    count = math.ceil(most / step - 1e-9)
    ticks = [(i * step, _short(i * step)) for i in range(count + 1)]
    return Axis(title=title, low=0.0, high=count * step, ticks=ticks)


def log_axis(title: str, values: Iterable[float]) -> Axis:
    """Return an axis over whole powers of ten around all values above 0."""
    known = [value for value in values if value > 0] or [1.0]
    first = math.floor(math.log10(min(known)))
    last = max(math.ceil(math.log10(max(known))), first + 1)
    ticks = [(10.0**power, _short(10.0**power)) for power in range(first, last + 1)]
    return Axis(title=title, low=10.0**first, high=10.0**last, is_log=True, ticks=ticks)


def tail_axis() -> Axis:
    """Return an axis of percentiles that gives each further nine as much room as the one before."""
    shown = ((0.0, "0"), (0.5, "50"), (0.9, "90"), (0.99, "99"), (0.999, "99.9"), (0.9999, "99.99"))
    ticks = [(1 / (1 - share), text) for share, text in shown]
    return Axis(title="percentile", low=1.0, high=20_000.0, is_log=True, ticks=ticks)


def plot(
    name: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    marks: Sequence[tuple[float, str]] = (),
    shaded: Sequence[tuple[float, float]] = (),
) -> str:
    """Return an SVG element of class `plot`.

    Args:
        name: what it shows, for those who do not see it.
        series: lines, each with a colour of its own.
        x, y: the axes.
        marks: vertical lines with a text, at places on `x`.
        shaded: what lies between these places on `x` is shaded.
    """
    legend, above = _legend(series)
    parts = [
        f'<svg class="plot" role="img" aria-label="{escape(name)}" '
        f'viewBox="0 {-above} {_WIDTH} {_HEIGHT + above}">'
    ]
    for first, last in shaded:
        left = _LEFT + x.at(first) * _PLOT_WIDTH
        width = (x.at(last) - x.at(first)) * _PLOT_WIDTH
        parts.append(
            f'<rect class="shade" x="{left:.1f}" y="{_TOP}" width="{width:.1f}" '
            f'height="{_PLOT_HEIGHT}"/>'
        )
    parts += _grid(x, y)
    parts += [_line(i, one, x, y) for i, one in enumerate(series) if one.points]
    parts += [_mark(i, place, text, x) for i, (place, text) in enumerate(marks)]
    return "".join([*parts, *legend, "</svg>"])


def _grid(x: Axis, y: Axis) -> Iterable[str]:
    bottom = _TOP + _PLOT_HEIGHT
    for value, text in y.ticks:
        height = bottom - y.at(value) * _PLOT_HEIGHT
        yield f'<path class="grid" d="M{_LEFT} {height:.1f}h{_PLOT_WIDTH}"/>'
        yield _text(_LEFT - 6, height + 4, text, "end")
    for value, text in x.ticks:
        place = _LEFT + x.at(value) * _PLOT_WIDTH
        yield f'<path class="grid" d="M{place:.1f} {_TOP}v{_PLOT_HEIGHT}"/>'
        yield _text(place, bottom + 16, text, "middle")
    yield _text(_LEFT + _PLOT_WIDTH / 2, _HEIGHT - 8, x.title, "middle")
    yield (
        f'<text transform="translate(14 {_TOP + _PLOT_HEIGHT / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y.title)}</text>'
    )


def _line(number: int, series: Series, x: Axis, y: Axis) -> str:
    points = _thinned(series.points)
    bottom = _TOP + _PLOT_HEIGHT
    colour = COLOURS[number % len(COLOURS)]
    places = [
        (f"{_LEFT + x.at(px) * _PLOT_WIDTH:.1f}", f"{bottom - y.at(py) * _PLOT_HEIGHT:.1f}")
        for px, py in points
    ]
    path = " ".join(f"{left},{height}" for left, height in places)
    dots = places if len(points) <= _MAX_DOTS else ()
    return (
        f'<polyline class="line" stroke="{colour}" '
        f'stroke-dasharray="{_DASHES[number // len(COLOURS) % len(_DASHES)]}" points="{path}">'
        f"<title>{escape(series.label)}</title></polyline>"
    ) + "".join(
        f'<circle cx="{left}" cy="{height}" r="2.4" fill="{colour}"/>' for left, height in dots
    )


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    step = max(len(points) // _MAX_POINTS, 1)
    return [*points[::step], points[-1]]


def _mark(number: int, place: float, text: str, x: Axis) -> str:
    at = _LEFT + x.at(place) * _PLOT_WIDTH
    height = _TOP + 12 + 13 * (number % 4)
    return f'<path class="mark" d="M{at:.1f} {_TOP}v{_PLOT_HEIGHT}"/>' + _text(at + 4, height, text)


def _legend(series: Sequence[Series]) -> tuple[list[str], int]:
    """Return the legend, and how much room it takes above the plot: no line is behind it."""
    if len(series) < 2:
        return [], 0
    parts: list[str] = []
    place, row = float(_LEFT), 0
    for i, one in enumerate(series):
        width = _LEGEND_KEY + _LEGEND_CHAR * len(one.label)
        if place > _LEFT and place + width > _WIDTH:
            place, row = float(_LEFT), row + 1
        height = _LEGEND_ROW * row
        parts.append(_key(i, place, height - 4) + _text(place + 24, height, one.label))
        place += width
    above = _LEGEND_ROW * (row + 1)
    return [f'<g transform="translate(0 {_LEGEND_ROW - above - 4})">', *parts, "</g>"], above


def _key(number: int, place: float, height: float) -> str:
    return (
        f'<path class="key" stroke="{COLOURS[number % len(COLOURS)]}" '
        f'stroke-dasharray="{_DASHES[number // len(COLOURS) % len(_DASHES)]}" '
        f'd="M{place:.1f} {height}h18"/>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _round_step(value: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(value))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= value * 0.999)


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
