"""The plots of a report: which lines they have. Pure."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from tensorwire.loadtest.histograms import Histogram
from tensorwire.loadtest.plots import Series, linear_axis, log_axis, plot, tail_axis
from tensorwire.loadtest.report_tables import label
from tensorwire.loadtest.slo import parse_slo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tensorwire.loadtest.report_tables import Named, Result

    Points = list[tuple[float, float]]

_TITLES = {"ttft": "Time to first token", "itl": "Gaps between tokens", "e2e": "End to end"}
_SWEPT = ("p50", "p90", "p99")
_MAX_MARK_CHARS = 40


def distributions(named: Named) -> Iterator[str]:
    """Yield a plot for each metric; several results share it."""
    for metric, title in _TITLES.items():
        series = [
            Series(label=label(name, group), points=_steps(measured["metrics"][metric]))
            for name, result in named
            for group, measured in result["groups"].items()
            if metric in measured["metrics"]
        ]
        values = [y for one in series for _, y in one.points]
        if values:
            yield f"<h2>{title}</h2>" + plot(title, series, tail_axis(), log_axis("ms", values))


def _steps(metric: Mapping[str, Any]) -> Points:
    """Return a curve that is at a duration from the share below it to the share up to it.

    The slowest of n values stands at 1 - 1/n: what is beyond, they cannot say.
    """
    histogram = Histogram(metric["hdr"])
    last = float(histogram.count)
    points: Points = []
    below = 0.0
    for seconds, share in histogram.cumulative():
        up_to = min(1 / (1 - share), last) if share < 1 else last
        points += (1 / (1 - below), seconds * 1000), (max(up_to, 1 / (1 - below)), seconds * 1000)
        below = share
    return points


def timeline(name: str, result: Result) -> str:
    """Return what happened in each second of a run, with its marks."""
    plan = result["plan"]
    marks = [(mark["began_s"], mark["command"][:_MAX_MARK_CHARS]) for mark in result["marks"]]
    last = max([0, *(int(s) for g in result["groups"].values() for s in g["seconds"]["ended"])])
    end_s = plan["warmup_s"] + plan["duration_s"]
    x = linear_axis("seconds since the start (shaded: not measured)", [last + 1])
    shaded = [(0.0, plan["warmup_s"]), (end_s, x.high)]

    def over_time(what: str, group: Mapping[str, Any]) -> Points:
        counts = group["seconds"].get(what, {})
        return [(second + 0.5, counts.get(str(second), 0)) for second in range(last + 1)]

    requests = [
        Series(label=f"{group} {what}", points=over_time(what, measured))
        for group, measured in result["groups"].items()
        for what in ("ended", "failed")
        if what == "ended" or measured["seconds"].get(what) or group == "load"
    ]
    tokens = [
        Series(label=f"{group} tokens", points=over_time("tokens", measured))
        for group, measured in result["groups"].items()
        if any(measured["seconds"].get("tokens", {}).values())
    ]
    parts = [f"<h2>{escape(label(name, 'timeline')).capitalize()}</h2>"]
    for title, series in (("requests/s", requests), ("tokens/s", tokens)):
        if series:
            y = linear_axis(title, [y for one in series for _, y in one.points])
            parts.append(plot(title, series, x, y, marks=marks, shaded=shaded))
    return "".join(parts)


def sweeps(named: Named) -> Iterator[str]:
    """Yield what the rates of a sweep did to the first token, and how many requests were good."""
    swept = [
        (name, sorted(result["sweep"]["points"], key=lambda point: point["rate_per_s"]))
        for name, result in named
        if "sweep" in result
    ]
    if not swept:
        return
    is_streamed = any("ttft" in p["percentiles_ms"] for _, points in swept for p in points)
    metric = "ttft" if is_streamed else "e2e"
    series = [
        Series(label=label(name, percentile), points=_against(points, _value(metric, percentile)))
        for name, points in swept
        for percentile in _SWEPT
    ]
    x = linear_axis("requests/s asked for", [px for one in series for px, _ in one.points])
    series += _bounds(named, metric, x.high)
    y = log_axis("ms", [py for one in series for _, py in one.points])
    title = f"{metric.upper()} against rate"
    yield f"<h2>{title}</h2>" + plot(title, series, x, y)
    goodput = [
        Series(label=name, points=_against(points, lambda point: point["goodput_per_s"]))
        for name, points in swept
    ]
    y = linear_axis("good requests/s", [py for one in goodput for _, py in one.points])
    yield "<h2>Goodput against rate</h2>" + plot("Goodput against rate", goodput, x, y)


def _bounds(named: Named, metric: str, last: float) -> Iterator[Series]:
    """Yield a level line for each bound that the sweeps had to keep."""
    texts = [result["slo"]["text"] for _, result in named if "sweep" in result]
    bounds = dict.fromkeys(bound for text in texts for bound in parse_slo(text).bounds)
    for bound in bounds:
        if bound.metric == metric:
            level = bound.most_s * 1000
            yield Series(
                label=f"objective p{bound.percent:g}", points=[(0.0, level), (last, level)]
            )


def _value(metric: str, percentile: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda point: point["percentiles_ms"].get(metric, {}).get(percentile)


def _against(
    points: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float | None]
) -> Points:
    found = [(point["rate_per_s"], value(point)) for point in points]
    return [(rate, number) for rate, number in found if number is not None]
