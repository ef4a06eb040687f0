"""How a load test looks on a terminal: while it runs, and afterwards."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import typer

from tensorwire.cli import output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tensorwire.loadtest.comparing import Row
    from tensorwire.loadtest.plan import Plan

    Groups = dict[str, dict[str, int]]

_PERCENTILES = ("p50", "p90", "p99", "p99.9")
_METRICS = ("ttft", "itl", "e2e", "lag")
_SERVER = "server."
_SHOWN = {"lag": "sent late", "rechecked": "streams asked for again, alone"}


@contextlib.contextmanager
def live(plan: Plan) -> Iterator[Callable[[float, Groups], None] | None]:
    """Show how far a run is, where stderr is a terminal; gives what takes the progress."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield None
        return
    with Live(console=console, transient=True, auto_refresh=False) as screen:
        before: dict[str, Any] = {"at": 0.0, "groups": {}}

        def show(at_s: float, groups: Groups) -> None:
            screen.update(_progress_table(plan, at_s, groups, before), refresh=True)
            before.update(at=at_s, groups=groups)

        yield show


def _progress_table(plan: Plan, at_s: float, groups: Groups, before: dict[str, Any]) -> Any:
    from rich.table import Table

    from tensorwire.loadtest.workloads import GROUPS

    total_s = plan.warmup_s + plan.duration_s
    phase = "warm-up" if at_s < plan.warmup_s else "measuring" if at_s < total_s else "draining"
    table = Table(title=f"{phase}  {at_s:.0f} of {total_s:.0f} s", box=None, title_justify="left")
    for column in ("", "requests/s", "tokens/s", "open", "failed"):
        table.add_column(column, justify="right")
    passed_s = max(at_s - before["at"], 1e-3)
    for name in filter(groups.get, GROUPS):
        counts = groups[name]
        old = before["groups"].get(name, {})
        rates = [
            (counts.get(what, 0) - old.get(what, 0)) / passed_s for what in ("ended", "tokens")
        ]
        table.add_row(name, *(f"{rate:.0f}" for rate in rates),
                      str(counts.get("open", 0)), str(counts.get("failed", 0)))  # fmt: skip
    return table


def print_result(result: dict[str, Any]) -> None:
    """Print what a run or a sweep gave."""
    for name, group in result["groups"].items():
        _print_group(name, group)
    for line in _remarks(result):
        typer.echo(line)
    _print_verdict(result)


def _print_group(name: str, group: dict[str, Any]) -> None:
    counts, rates = group["counts"], group["rates"]
    said = [f"{counts.get(what, 0)} {what}" for what in ("ok", "failed", "cancelled", "unsent")
            if counts.get(what) or what == "ok"]  # fmt: skip
    typer.echo(
        f"{name}: {counts.get('planned', 0)} measured requests ({', '.join(said)}), "
        f"{counts.get('warmup', 0)} outside of the measured time"
    )
    typer.echo(
        f"  {rates['requests_per_s']:.6g} requests/s, good {rates['goodput_per_s']:.6g}/s, "
        f"tokens/s in {rates['tokens_in_per_s']:.6g}, out {rates['tokens_out_per_s']:.6g}"
    )
    for code, count in group["errors"].items():
        typer.echo(f"  error {code}: {count}")
    metrics = group["metrics"]
    own = {_SHOWN.get(m, m): metrics[m] for m in _METRICS if m in metrics}
    _print_metrics("ms", own, with_intervals=True)
    told = {m.removeprefix(_SERVER): metrics[m] for m in metrics if m.startswith(_SERVER)}
    _print_metrics("server's ms", told, with_intervals=False)


def _print_metrics(title: str, metrics: Mapping[str, Any], *, with_intervals: bool) -> None:
    """Print a row for each metric and, below, where 95 % of other runs would lie."""
    rows: list[list[Any]] = []
    for name, metric in metrics.items():
        values = [_short(metric["percentiles_ms"][percentile]) for percentile in _PERCENTILES]
        rows.append([name, metric["count"], *values, _short(metric["max_ms"])])
        intervals = [metric["intervals_ms"][percentile] for percentile in _PERCENTILES]
        if with_intervals and any(intervals):
            rows.append(["", "", *("-".join(map(_shorter, i)) if i else "" for i in intervals), ""])
    if rows:
        output.print_table([title, "count", *_PERCENTILES, "max"], rows)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _shorter(value: float) -> str:
    # All columns must fit the 80 characters of a plain terminal.
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.2g}" if value >= 0.1 else f"{round(value, 3):g}"


def _remarks(result: dict[str, Any]) -> Iterator[str]:
    plan = result["plan"]
    yield f"warm-up of {plan['warmup_s']:g} s excluded; latency counts from the planned send"
    again = {name: count for name, count in result["tally"].items() if count}
    if again:
        yield ", ".join(f"{count} {_SHOWN.get(name, name)}" for name, count in again.items())
    for mark in result["marks"]:
        command = " ".join(mark["command"].split())
        yield f"at {mark['began_s']:.1f} s: {command} (exit code {mark['exit_code']})"
    if plan["verify"]:
        for name, group in result["groups"].items():
            found = [f"{count} {what.replace('_', ' ')}" for what, count in group["faults"].items()]
            yield f"verified {name}: {', '.join(found)}"
    for number, own in enumerate(result["own"]):
        yield (
            f"own process {number}: {own['cpu']:.0%} of a core (at most {own['cpu_most']:.0%}), "
            f"waiting for one {own['waiting']:.0%}, loop lag p99 {own['loop_lag_p99_ms']} ms"
        )


def _print_verdict(result: dict[str, Any]) -> None:
    slo = result["slo"]
    if slo is not None:
        typer.echo(f"objective {slo['text']}: {'met' if slo['met'] else 'MISSED'}")
        for reason in slo["broken"]:
            typer.echo(f"  {reason}")
    sweep = result.get("sweep")
    if sweep is not None:
        best = sweep["highest_rate_per_s"]
        typer.echo(f"highest rate that met it: {'none' if best is None else f'{best:.6g}/s'}")
    if not result["valid"]:
        typer.secho("INVALID: these numbers are the load tester's, not the server's", bold=True)
        for reason in result["reasons"]:
            typer.echo(f"  {reason}")


def print_point(point: dict[str, Any]) -> None:
    """Print one run of a sweep, to stderr."""
    word = "met" if point["met"] else "missed"
    broken = f" ({'; '.join(point['broken'])})" if point["broken"] else ""
    typer.echo(
        f"{point['rate_per_s']:.6g}/s: {word if point['valid'] else 'INVALID'}, "
        f"good {point['goodput_per_s']:.6g}/s{broken}",
        err=True,
    )


def print_comparison(
    rows: Sequence[Row], results: Sequence[dict[str, Any]], differing: Sequence[str]
) -> None:
    """Print two results side by side."""
    for what in differing:
        typer.echo(f"not the same load: {what}")
    output.print_table(
        ["", "A", "B", "B/A", ""],
        [[row.name, f"{row.first:.5g}", f"{row.second:.5g}", row.ratio_text, row.verdict]
         for row in rows],
    )  # fmt: skip
    for letter, result in zip("AB", results, strict=True):
        if not result["valid"]:
            typer.echo(f"{letter} is INVALID: {'; '.join(result['reasons'])}")
