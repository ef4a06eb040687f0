"""One page about one or several results: no script, no font, nothing that is not in the file."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from tensorwire.loadtest.histograms import Histogram
from tensorwire.loadtest.plots import Series, linear_axis, log_axis, plot, tail_axis

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Result = Mapping[str, Any]

_METRICS = (
    ("ttft", "Time to first token"),
    ("itl", "Gaps between tokens"),
    ("e2e", "End to end"),
)
_PERCENTILES = ("p50", "p90", "p99", "p99.9")
_MAX_MARK_CHARS = 40
_ALONE = "this run"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .15rem .7rem; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
svg.plot { width: 100%; height: auto; font: 11px system-ui, sans-serif; }
.grid { stroke: #e3e3e3; fill: none; } .shade { fill: #f3f3f3; }
.line { fill: none; stroke-width: 1.8; } .key { stroke-width: 3; }
.mark { stroke: #888; stroke-dasharray: 3 3; fill: none; }
.invalid { border-left: .4rem solid #c00; padding: .4rem 1rem; background: #fdecec; }
.plain { color: #555; }
"""


def render(results: Sequence[Result]) -> str:
    """Return a whole HTML page; with several results their lines share the plots."""
    names = _names(results)
    body = [
        "<h1>Load test</h1>",
        *_verdicts(names, results),
        _summary(names, results),
        *_sweeps(names, results),
        *_distributions(names, results),
        *(_timeline(name, result) for name, result in zip(names, results, strict=True)),
        *(_facts(name, result) for name, result in zip(names, results, strict=True)),
    ]
    # The policy makes the browser refuse whatever would leave the page.
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Load test</title>'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _names(results: Sequence[Result]) -> list[str]:
    if len(results) == 1:
        return [_ALONE]
    return [chr(ord("A") + i) for i in range(len(results))]


def _load(result: Result) -> Mapping[str, Any]:
    load: Mapping[str, Any] = result["groups"]["load"]
    return load


def _verdicts(names: Sequence[str], results: Sequence[Result]) -> Iterator[str]:
    for name, result in zip(names, results, strict=True):
        if not result["valid"]:
            reasons = "".join(f"<li>{escape(reason)}</li>" for reason in result["reasons"])
            yield (
                f'<div class="invalid"><b>INVALID ({escape(name)}): these numbers are the load '
                f"tester's, not the server's.</b><ul>{reasons}</ul></div>"
            )
        plan = result["plan"]
        yield (
            f'<p class="plain">{escape(name)}: {escape(", ".join(plan["tasks"]))}, '
            f"{escape(plan['arrivals'])}, {plan['duration_s']:g} s measured after "
            f"{plan['warmup_s']:g} s of warm-up, which is excluded. Latency counts from the "
            "planned send.</p>"
        )


def _summary(names: Sequence[str], results: Sequence[Result]) -> str:
    heads = ["", "group", "requests/s", "good/s", "tokens/s out", "failed", "wrong"]
    heads += [f"{metric} {p} ms" for metric in ("ttft", "e2e") for p in ("p50", "p99")]
    rows = [
        [name, group, *_summary_cells(measured)]
        for name, result in zip(names, results, strict=True)
        for group, measured in result["groups"].items()
    ]
    return _table(heads, rows)


def _summary_cells(group: Mapping[str, Any]) -> list[str]:
    rates, counts, metrics = group["rates"], group["counts"], group["metrics"]
    cells = [f"{rates[r]:.5g}" for r in ("requests_per_s", "goodput_per_s", "tokens_out_per_s")]
    cells += [str(counts.get("failed", 0)), str(counts.get("wrong_streams", 0))]
    for metric in ("ttft", "e2e"):
        for percentile in ("p50", "p99"):
            value = metrics[metric]["percentiles_ms"][percentile] if metric in metrics else None
            cells.append("-" if value is None else f"{value:.4g}")
    return cells


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _distributions(names: Sequence[str], results: Sequence[Result]) -> Iterator[str]:
    for metric, title in _METRICS:
        series = [
            Series(label=label, points=points)
            for name, result in zip(names, results, strict=True)
            for label, points in _curves(name, result, metric)
        ]
        values = [y for one in series for _, y in one.points]
        if values:
            axis = log_axis("ms", values)
            yield f"<h2>{title}</h2>" + plot(title, series, tail_axis(), axis)


def _curves(
    name: str, result: Result, metric: str
) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    for group, measured in result["groups"].items():
        if metric in measured["metrics"]:
            yield _label(name, group), _steps(Histogram(measured["metrics"][metric]["hdr"]))


def _label(name: str, group: str) -> str:
    return group if name == _ALONE else f"{name}, {group}"


def _steps(histogram: Histogram) -> list[tuple[float, float]]:
    """Return a curve that is at a duration from the share below it to the share up to it.

    The slowest of n values stands at 1 - 1/n: what is beyond, they cannot say.
    """
    last = float(histogram.count)
    points: list[tuple[float, float]] = []
    below = 0.0
    for seconds, share in histogram.cumulative():
        up_to = min(1 / (1 - share), last) if share < 1 else last
        points += (1 / (1 - below), seconds * 1000), (max(up_to, 1 / (1 - below)), seconds * 1000)
        below = share
    return points


def _timeline(name: str, result: Result) -> str:
    plan = result["plan"]
    marks = [
        (mark["began_s"], mark["command"][:_MAX_MARK_CHARS]) for mark in result.get("marks", ())
    ]
    last = max([0, *(int(s) for g in result["groups"].values() for s in g["seconds"]["ended"])])
    end_s = plan["warmup_s"] + plan["duration_s"]
    x = linear_axis("seconds since the start (shaded: not measured)", [last + 1])
    shaded = [(0.0, plan["warmup_s"]), (end_s, x.high)]

    def over_time(what: str, group: Mapping[str, Any]) -> list[tuple[float, float]]:
        counts = group["seconds"].get(what, {})
        return [(second + 0.5, counts.get(str(second), 0)) for second in range(last + 1)]

    requests = [
        Series(label=f"{group} {what}", points=over_time(what, measured))
        for group, measured in result["groups"].items()
        for what in ("ended", "failed")
        if what == "ended" or measured["seconds"].get(what) or group == "load"
    ]
    parts = [f"<h2>Timeline of {escape(name)}</h2>"]
    tokens = [
        Series(label=f"{group} tokens", points=over_time("tokens", measured))
        for group, measured in result["groups"].items()
        if any(measured["seconds"].get("tokens", {}).values())
    ]
    for title, series in (("requests/s", requests), ("tokens/s", tokens)):
        if series:
            y = linear_axis(title, [y for one in series for _, y in one.points])
            shown = plot(title, series, x, y, marks=marks, shaded=shaded)
            parts.append(shown)
    return "".join(parts)


def _sweeps(names: Sequence[str], results: Sequence[Result]) -> Iterator[str]:
    swept = [
        (name, sorted(result["sweep"]["points"], key=lambda point: point["rate_per_s"]))
        for name, result in zip(names, results, strict=True)
        if "sweep" in result
    ]
    if not swept:
        return
    metric = "ttft" if any("ttft" in p["percentiles_ms"] for _, ps in swept for p in ps) else "e2e"
    series = [
        Series(
            label=f"{name} {percentile}", points=_against_rate(points, _value(metric, percentile))
        )
        for name, points in swept
        for percentile in _PERCENTILES[:3]
    ]
    x = linear_axis("requests/s asked for", [px for one in series for px, _ in one.points])
    y = log_axis("ms", [py for one in series for _, py in one.points])
    title = f"{metric.upper()} against rate"
    yield f"<h2>{title}</h2>" + plot(title, series, x, y)
    goodput = [
        Series(label=name, points=_against_rate(points, lambda point: point["goodput_per_s"]))
        for name, points in swept
    ]
    y = linear_axis("good requests/s", [py for one in goodput for _, py in one.points])
    yield "<h2>Goodput against rate</h2>" + plot("Goodput against rate", goodput, x, y)


def _value(metric: str, percentile: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda point: point["percentiles_ms"].get(metric, {}).get(percentile)


def _against_rate(
    points: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float | None]
) -> list[tuple[float, float]]:
    found = [(point["rate_per_s"], value(point)) for point in points]
    return [(rate, number) for rate, number in found if number is not None]


def _facts(name: str, result: Result) -> str:
    facts = {
        "date": result["date"],
        "commit": result["commit"],
        **{
            f"plan.{key}": value for key, value in result["plan"].items() if value not in ("", None)
        },
        **{f"machine.{key}": value for key, value in result["machine"].items()},
        **{f"version.{key}": value for key, value in result["versions"].items()},
        **{f"own.{i}": own for i, own in enumerate(result["own"])},
    }
    rows = [[key, str(value)] for key, value in facts.items()]
    return f"<h2>How {escape(name)} was made</h2>" + _table(["", ""], rows)
