"""The plots of a report as SVG text, drawn by matplotlib without a display."""

from __future__ import annotations

import io
import re
import statistics
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from tensorwire_server.compress.intervals import Estimate
from tensorwire_server.compress.sizes import block_of, kind_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tensorwire_server.compress.report import Report

# Okabe and Ito's, which colour-blind people tell apart; shapes tell the rest, and are for paper.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_SHAPES = ("o", "s", "^", "D", "v", "P", "X")
_WIDTH_IN = 8.4
_STYLE: Any = {
    "svg.fonttype": "none",  # letters stay letters: to be read aloud, searched and copied
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "grid.color": "#e6e6e6",
    "axes.edgecolor": "#888888",
    "legend.frameon": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One figure of the page."""

    title: str
    caption: str  # how to read it
    svg: str


def draw_charts(report: Report) -> list[Chart]:
    """Return what there is something to draw of."""
    with mpl.rc_context(_STYLE):
        return [chart for draw in (_trade, _speed, _sparsity, _errors) for chart in draw(report)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measure:
    """The one number that stands for quality."""

    title: str
    before: Estimate
    after: Estimate


def _measure(report: Report) -> _Measure | None:
    quality = report.quality
    if quality.text is not None:
        text = quality.text
        return _Measure(
            title="perplexity (lower is better)",
            before=text.perplexity_before,
            after=text.perplexity_after,
        )
    if quality.embedding is not None:
        return _Measure(
            title="mean cosine to the parent",
            before=Estimate(value=1.0),
            after=quality.embedding.mean,
        )
    return None


def _trade(report: Report) -> Iterator[Chart]:
    measure = _measure(report)
    if measure is None:
        return
    before, after = report.size_before.file_bytes, report.size_after.file_bytes
    panels: list[tuple[str, list[tuple[float, ...]]]] = [
        ("weight files, MB", [(before / 1e6,), (after / 1e6,)])
    ]
    if report.speed is not None:
        rate = report.speed.typical
        panels.append((f"{rate.unit}: {rate.name}", [rate.before, rate.after]))
    figure = Figure(figsize=(_WIDTH_IN, 3.5), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (label, values) in zip(axes, panels, strict=True):
        _draw_trade(ax, values, measure)
        ax.set_xlabel(label)
    axes[0].set_ylabel(measure.title)
    keys = [
        Line2D([], [], linestyle="", marker=_SHAPES[number], color=_COLOURS[number], label=name)
        for number, name in enumerate(("parent", "result"))
    ]
    figure.legend(handles=keys, loc="outside upper left", ncols=len(keys))
    title = "Quality against size and speed" if len(panels) > 1 else "Quality against size"
    yield Chart(
        title=title,
        caption="Bars: 95 % interval of quality, and the range of speed over the rounds.",
        svg=_svg(figure, title),
    )


def _draw_trade(ax: Any, before_and_after: Sequence[Sequence[float]], measure: _Measure) -> None:
    points = []
    estimates = (measure.before, measure.after)
    for number, (xs, estimate) in enumerate(zip(before_and_after, estimates, strict=True)):
        x, y = statistics.median(xs), estimate.value
        ax.errorbar(
            x, y, xerr=[[x - min(xs)], [max(xs) - x]], yerr=_reach(estimate),
            fmt=_SHAPES[number], color=_COLOURS[number],
            markersize=8, capsize=3, elinewidth=1.2, zorder=3,
        )  # fmt: skip
        points.append((x, y))
    ax.annotate(
        "", points[1], points[0], zorder=2,
        arrowprops={"arrowstyle": "->", "color": "#888888", "shrinkA": 8, "shrinkB": 8},
    )  # fmt: skip
    ax.set_xlim(0, 1.15 * max(max(xs) for xs in before_and_after))
    ax.margins(y=0.25)


def _reach(estimate: Estimate) -> list[list[float]]:
    """Return how far an interval goes below and above its value."""
    low = estimate.value if estimate.low is None else estimate.low
    high = estimate.value if estimate.high is None else estimate.high
    # Never negative: a percentile interval need not hold the value itself.
    return [[max(estimate.value - low, 0.0)], [max(high - estimate.value, 0.0)]]


def _speed(report: Report) -> Iterator[Chart]:
    if report.speed is None:
        return
    rates = report.speed.rates
    figure = Figure(figsize=(_WIDTH_IN, 0.9 + 0.42 * len(rates)), layout="constrained")
    ax = figure.subplots()
    for place, rate in enumerate(reversed(rates)):
        low, high = min(rate.ratios), max(rate.ratios)
        ax.plot([low, high], [place, place], color=_COLOURS[0], linewidth=2, zorder=2)
        ax.plot(rate.ratios, [place] * len(rate.ratios), "|", color=_COLOURS[0], markersize=9)
        ax.plot(rate.ratio, place, "o", color=_COLOURS[1], markersize=7, zorder=3)
    ax.axvline(1, color="#444444", linewidth=1, linestyle=(0, (4, 3)))
    ax.set_yticks(range(len(rates)), [rate.name for rate in reversed(rates)])
    ax.set_ylim(-0.6, len(rates) - 0.4)
    ax.grid(visible=False, axis="y")
    ratios = [1.0, *(ratio for rate in rates for ratio in rate.ratios)]
    room = max(0.08 * (max(ratios) - min(ratios)), 0.02)
    ax.set_xlim(min(ratios) - room, max(ratios) + room)
    ax.set_xlabel("how many times as fast as the parent")
    title = "Speed of the result relative to its parent"
    yield Chart(
        title=title,
        caption=(
            "Dot: median; ticks: each round, in which both did the same. A range with 1 in it means"
            " that no difference was seen."
        ),
        svg=_svg(figure, title),
    )


def _sparsity(report: Report) -> Iterator[Chart]:
    matrices = report.size_after.matrices
    if not any(matrix.zeros for matrix in matrices):
        return
    values = {matrix.name: matrix.sparsity for matrix in matrices}
    title = "Zeros of each matrix"
    figure = _by_block(values, "zeros", PercentFormatter(1.0, decimals=0))
    yield Chart(
        title=title,
        caption=(
            "Counted in the files of the result, by block and matrix. Rounding to integers makes"
            " zeros too."
            if report.recipe.quantize is not None
            else "Counted in the files of the result, by block and matrix."
        ),
        svg=_svg(figure, title),
    )


def _errors(report: Report) -> Iterator[Chart]:
    if not report.errors:
        return
    title = "Sensitivity: error of each matrix's output"
    figure = _by_block(report.error_of, "relative error of the output", None)
    yield Chart(
        title=title,
        caption=(
            "How far the output of each linear layer is from what the parent's weights give, on the"
            " calibration text and after all steps: |Wx - W'x| / |Wx|."
        ),
        svg=_svg(figure, title),
    )


def _by_block(values: Mapping[str, float], label: str, formatter: Any) -> Figure:
    """Draw one line for each kind of matrix over the numbers of the blocks."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for name, value in values.items():
        lines.setdefault(kind_of(name), []).append((block_of(name) or 0, value))
    figure = Figure(figsize=(_WIDTH_IN, 3.2), layout="constrained")
    ax = figure.subplots()
    # By name, so that a kind looks the same in every figure.
    for number, (kind, points) in enumerate(sorted(lines.items())):
        ax.plot(
            *zip(*sorted(points), strict=True), label=kind, linewidth=1, markersize=5.5, alpha=0.9,
            color=_COLOURS[number % len(_COLOURS)], marker=_SHAPES[number % len(_SHAPES)],
        )  # fmt: skip
    ax.set_xlabel("block")
    ax.set_ylabel(label)
    ax.set_ylim(0, 1.12 * max(values.values()) or 1)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if formatter is not None:
        ax.yaxis.set_major_formatter(formatter)
    figure.legend(loc="outside right upper")
    return figure


def _svg(figure: Figure, title: str) -> str:
    """Return an SVG element of class `plot` whose names are its own among many on a page."""
    out = io.StringIO()
    name = re.sub(r"\W+", "-", title.lower())
    # The salt makes the names of what is drawn the same in every run.
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    opening = f'<svg class="plot" role="img" aria-label="{escape(title)}"'
    return svg.replace("<svg", opening, 1)
