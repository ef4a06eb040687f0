"""One page about one or several results: no script, no font, nothing that is not in the file."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from tensorwire.loadtest.report_plots import distributions, sweeps, timeline
from tensorwire.loadtest.report_tables import (
    label,
    latencies,
    mishaps,
    summary,
    sweep_points,
    table,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tensorwire.loadtest.report_tables import Result

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
.bad { border-left: .4rem solid #c00; padding: .4rem 1rem; background: #fdecec; }
.good { border-left: .4rem solid #2a8; padding: .4rem 1rem; background: #eef8f3; }
.bad, .good { margin: .5rem 0; }
.plain, small { color: #555; } small { display: block; white-space: nowrap; }
"""


def render(results: Sequence[Result]) -> str:
    """Return a whole HTML page; with several results their lines share the plots."""
    names = [""] if len(results) == 1 else [chr(ord("A") + i) for i in range(len(results))]
    named = list(zip(names, results, strict=True))
    body = [
        "<h1>Load test</h1>",
        *(part for name, result in named for part in _verdicts(name, result)),
        summary(named),
        *sweeps(named),
        *(_sweep_table(name, result) for name, result in named if "sweep" in result),
        *distributions(named),
        "<h2>Latency</h2>",
        '<p class="plain">Below a percentile: where 95 % of other runs would have it.</p>',
        latencies(named),
        "<h2>Mishaps</h2>",
        mishaps(named),
        *(timeline(name, result) for name, result in named),
        *(_facts(name, result) for name, result in named),
    ]
    # The policy makes the browser refuse whatever would leave the page.
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Load test</title>'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _verdicts(name: str, result: Result) -> Iterator[str]:
    """Yield what was done, if its numbers count, and if its objective was met."""
    plan = result["plan"]
    yield (
        f'<p class="plain">{escape(label(name, ", ".join(plan["tasks"])))}, '
        f"{escape(plan['arrivals'])}, {plan['duration_s']:g} s measured after "
        f"{plan['warmup_s']:g} s of warm-up, which is excluded. Latency counts from the "
        "planned send.</p>"
    )
    if result["valid"]:
        yield _box("good", label(name, "valid: the load tester kept up with its plan."), ())
    else:
        words = "INVALID: these numbers are the load tester's, not the server's."
        yield _box("bad", label(name, words), result["reasons"])
    slo = result["slo"]
    if slo is None:
        return
    words = f"objective {slo['text']}: {'met' if slo['met'] else 'MISSED'}"
    if "sweep" in result:
        best = result["sweep"]["highest_rate_per_s"]
        words += f", up to {best:.6g} requests/s" if best is not None else " at every rate"
    yield _box("good" if slo["met"] else "bad", label(name, words), slo["broken"])


def _box(kind: str, title: str, reasons: Sequence[str]) -> str:
    listed = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    return f'<div class="{kind}"><b>{escape(title)}</b>{listed and f"<ul>{listed}</ul>"}</div>'


def _sweep_table(name: str, result: Result) -> str:
    title = escape(label(name, "the rates that were tried"))
    best = result["plan"]["arrivals"]
    return (
        f"<h2>{title.capitalize()}</h2>{sweep_points(result['sweep']['points'])}"
        f'<p class="plain">All else on this page is of {escape(best)}.</p>'
    )


def _facts(name: str, result: Result) -> str:
    facts = {
        "date": result["date"],
        "commit": result["commit"],
        **{f"plan: {key}": value for key, value in result["plan"].items()},
        **{f"machine: {key}": value for key, value in result["machine"].items()},
        **{f"version: {key}": value for key, value in result["versions"].items()},
        **{
            f"sending process {number}: {key}": value
            for number, own in enumerate(result["own"])
            for key, value in own.items()
        },
    }
    rows = [[key, _plain(value)] for key, value in facts.items() if value not in ("", None)]
    return f"<h2>{escape(label(name, 'how it was made')).capitalize()}</h2>" + table(["", ""], rows)


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
