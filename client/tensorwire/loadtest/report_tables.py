"""The tables of a report. Pure; whatever text comes in is escaped.

A name says which of several results a row is of; it is empty where there is only one.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    Result = Mapping[str, Any]
    Named = Sequence[tuple[str, Result]]

_RATES = {
    "requests_per_s": "requests/s",
    "goodput_per_s": "good/s",
    "tokens_in_per_s": "tokens/s in",
    "tokens_out_per_s": "tokens/s out",
}
_COUNTS = {"planned": "planned", "ok": "ok", "failed": "failed", "cancelled": "cancelled"}
_METRICS = {
    "ttft": "first token",
    "itl": "gap between tokens",
    "e2e": "end to end",
    "lag": "sent late",
}
_SERVER = "server."
_PERCENTILES = ("p50", "p90", "p99", "p99.9")


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table whose first column is text and whose others are numbers.

    A cell of two is a number and, small below it, a note.
    """
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: object) -> str:
    text, note = value if isinstance(value, tuple) else (value, "")
    return f"<td>{escape(str(text))}{note and f'<small>{escape(note)}</small>'}</td>"


def label(name: str, rest: str) -> str:
    """Return what a row or line is called that is of one of several results."""
    return f"{name}, {rest}" if name else rest


def summary(named: Named) -> str:
    """Return how many requests of each group there were, and how many a second."""
    rows = [
        [
            label(name, group),
            *(measured["counts"].get(count, 0) for count in _COUNTS),
            *(f"{measured['rates'][rate]:.5g}" for rate in _RATES),
        ]
        for name, result in named
        for group, measured in result["groups"].items()
    ]
    return table(["requests", *_COUNTS.values(), *_RATES.values()], rows)


def latencies(named: Named) -> str:
    """Return the percentiles of each group: as they were seen, and as the server told them."""
    rows = [
        [label(name, f"{group}: {title}"), metric["count"], *_percentile_cells(metric)]
        for name, result in named
        for group, measured in result["groups"].items()
        for title, metric in _titled(measured["metrics"])
    ]
    return table(["ms", "count", *_PERCENTILES, "max"], rows)


def _titled(metrics: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for metric, title in _METRICS.items():
        if metric in metrics:
            yield title, metrics[metric]
    for metric, measured in metrics.items():
        if metric.startswith(_SERVER):
            yield f"server's {metric.removeprefix(_SERVER).replace('_', ' ')}", measured


def _percentile_cells(metric: Mapping[str, Any]) -> Iterator[object]:
    for percentile in _PERCENTILES:
        interval = metric["intervals_ms"][percentile]
        ends = "" if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}"
        yield f"{metric['percentiles_ms'][percentile]:.4g}", ends
    yield f"{metric['max_ms']:.4g}"


def mishaps(named: Named) -> str:
    """Return what failed, was wrong, or was done again; a sentence if nothing was."""
    rows = [
        [label(name, what), count]
        for name, result in named
        for what, count in _mishaps_of(result)
        if count
    ]
    if not rows:
        return '<p class="plain">Nothing failed, and nothing was done again.</p>'
    return table(["what", "count"], rows)


def _mishaps_of(result: Result) -> Iterator[tuple[str, int]]:
    for group, measured in result["groups"].items():
        for code, count in measured["errors"].items():
            yield f"{group}: error {code}", count
        for fault, count in measured["faults"].items():
            yield f"{group}: {fault.replace('_', ' ')}", count
        yield f"{group}: unsent", measured["counts"].get("unsent", 0)
    yield from result["tally"].items()


def sweep_points(points: Sequence[Mapping[str, Any]]) -> str:
    """Return the rates that a sweep tried, and how each did."""
    metrics = [m for m in ("ttft", "itl", "e2e") if any(m in p["percentiles_ms"] for p in points)]
    shown = [(metric, percentile) for metric in metrics for percentile in ("p50", "p99")]
    rows = [
        [
            f"{point['rate_per_s']:.6g}",
            _verdict(point),
            f"{point['goodput_per_s']:.5g}",
            *(_shown(point["percentiles_ms"].get(m, {}).get(p)) for m, p in shown),
        ]
        for point in points
    ]
    return table(["requests/s", "objective", "good/s", *(f"{m} {p} ms" for m, p in shown)], rows)


def _verdict(point: Mapping[str, Any]) -> str:
    if not point["valid"]:
        return "INVALID"
    return "met" if point["met"] else "missed"


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
