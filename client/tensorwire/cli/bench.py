"""`tensorwire bench`: put load on a server, and say what came of it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tensorwire_protocol.errors import BadParams
from typer.core import TyperGroup

from tensorwire.cli import bench_view, options

if TYPE_CHECKING:
    from tensorwire.loadtest.plan import Plan

DONE, FAILED, INVALID = 0, 1, 3
_AT = "--at"


class _BenchGroup(TyperGroup):
    """Takes `--at 30s 'CMD'` as one value of two words, which typer cannot say."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        folded: list[str] = []
        rest = iter(args)
        for word in rest:
            folded.append(word)
            if word == _AT:
                folded.append(" ".join([next(rest, ""), next(rest, "")]))
        return super().parse_args(ctx, folded)


app = typer.Typer(cls=_BenchGroup, rich_markup_mode=None, subcommand_metavar="[compare A B]")


def register(root: typer.Typer) -> None:
    """Add this command."""
    root.add_typer(app, name="bench")


def _load(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"tensorwire.loadtest.{module}")
    except ModuleNotFoundError as error:
        if error.name != "hdrh":
            raise
        raise typer.BadParameter(
            "`tensorwire bench` needs its extra: pip install 'tensorwire[bench]'"
        ) from error


@app.callback(invoke_without_command=True)
def bench(
    ctx: typer.Context,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="TASK:MODEL[*WEIGHT]",
            help="generate, chat, embed, or infer:MODEL[4x8] for an array; several make a mix.",
        ),
    ] = None,
    arrivals: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="closed:USERS, or open: constant:RATE, poisson:RATE, bursts:RATE,cv=4, ramp:A-B.",
        ),
    ] = "closed:8",
    duration: Annotated[str, typer.Option(metavar="TIME", help="Measured time.")] = "20s",
    warmup: Annotated[str, typer.Option(metavar="TIME", help="Before it, not measured.")] = "2s",
    prompt: Annotated[
        str,
        typer.Option(metavar="CHARS", help="64, 16-256 or lognormal:median=64,sigma=0.8,max=1024."),
    ] = "64",
    output: Annotated[str, typer.Option(metavar="TOKENS", help="As --prompt.")] = "32",
    prefix: Annotated[
        str,
        typer.Option(
            metavar="share=…", help="share=50%,chars=512,families=4: beginnings in common."
        ),
    ] = "",
    prompts: Annotated[str | None, typer.Option(metavar="FILE", help="One prompt a line.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed sends the same.")] = 0,
    cancel: Annotated[
        str, typer.Option(metavar="share=…", help="share=10%,after=5: leave after 5 tokens.")
    ] = "",
    slow: Annotated[
        str, typer.Option(metavar="share=…", help="share=5%,for=2s: stop reading for 2 s.")
    ] = "",
    cut: Annotated[
        str, typer.Option(metavar="share=…", help="share=5%: lose the connection, and resume.")
    ] = "",
    deadline: Annotated[
        str, typer.Option(metavar="share=…", help="share=5%,of=100ms: with a short deadline.")
    ] = "",
    bystander: Annotated[
        float, typer.Option(metavar="RATE", help="Small requests beside the load, shown apart.")
    ] = 0.0,
    at: Annotated[
        list[str] | None,
        typer.Option(_AT, metavar="TIME CMD", help="--at 30s 'CMD': run a command then."),
    ] = None,
    slo: Annotated[
        str, typer.Option(metavar="BOUNDS", help="ttft_p99=500ms,itl_p99=50ms,e2e_p90=2s,errors=1%")
    ] = "",
    sweep: Annotated[
        str,
        typer.Option(metavar="FROM-TO", help="Find the highest rate that still meets --slo."),
    ] = "",
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Check answers by the rules of oracle: and echo:; of other models some streams, "
            "made without chance, are asked for again, alone.",
        ),
    ] = False,
    kind: Annotated[
        str,
        typer.Option(
            metavar="KIND", help="tensorwire, or openai for an HTTP server of that style."
        ),
    ] = "tensorwire",
    connections: Annotated[int, typer.Option(metavar="N", help="Of each process.")] = 8,
    processes: Annotated[int, typer.Option(metavar="N", help="That send.")] = 1,
    attempts: Annotated[
        int, typer.Option(metavar="N", help="Of each request; 1 shows every failure.")
    ] = 1,
    timeout: Annotated[str, typer.Option(metavar="TIME", help="Of each request.")] = "60s",
    log: Annotated[
        str | None, typer.Option(metavar="FILE", help="Append one JSON line per request.")
    ] = None,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Write the result here.")] = None,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Write a report here.")] = None,
    address: options.Address = None,
    as_json: options.AsJson = False,
) -> None:
    """Put load on a server; say how it did, and if the load tester itself kept up.

    Exit codes: 0 measured; 1 wrong answers, no answer at all, or the objective was missed;
    3 INVALID: what was measured is the load tester, not the server.
    """
    if ctx.invoked_subcommand is not None:
        return
    units, plans, marks = _load("units"), _load("plan"), _load("marks")

    def seconds(option: str, text: str) -> float:
        with units.naming(option):
            return float(units.parse_seconds(text))

    plan: Plan = plans.Plan(
        address=address,
        kind=kind,
        tasks=tuple(task or ("generate:demo",)),
        arrivals=arrivals,
        warmup_s=seconds("--warmup", warmup),
        duration_s=seconds("--duration", duration),
        prompt_chars=prompt,
        output_tokens=output,
        prefix=prefix,
        prompts=prompts,
        timeout_s=seconds("--timeout", timeout),
        seed=seed,
        connections=connections,
        attempts=attempts,
        processes=processes,
        verify=verify,
        slo=slo,
        cancel=cancel,
        slow=slow,
        cut=cut,
        deadline=deadline,
        bystander_per_s=bystander,
        log=log,
    )
    plan.check()
    with units.naming(_AT):
        wanted = marks.parse_marks(at or (), plan.warmup_s + plan.duration_s)
    for path in filter(None, (log, out, html)):
        _check_writable(path)
    result = _sweep(plan, sweep, wanted) if sweep else _measure(plan, wanted)
    _write(result, out, html)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        bench_view.print_result(result)
    raise typer.Exit(_exit_code(result))


def _check_writable(path: str) -> None:
    """Refuse now what could not be written after the run."""
    try:
        with Path(path).open("a"):
            pass
    except OSError as error:
        raise BadParams(f"cannot write {path}: {error.strerror}") from error


def _measure(plan: "Plan", marks: Any) -> dict[str, Any]:
    import asyncio

    session, results = _load("session"), _load("results")
    with bench_view.live(plan) as on_progress:
        run = asyncio.run(session.run_session(plan, marks, on_progress))
    result: dict[str, Any] = results.summarize(run)
    return result


def _sweep(plan: "Plan", text: str, marks: Any) -> dict[str, Any]:
    sweeps = _load("sweep")
    search = sweeps.parse_sweep(text)
    if not plan.slo:
        raise typer.BadParameter("--sweep needs an objective: --slo ttft_p99=500ms")
    points = []
    best: dict[str, Any] | None = None
    while (rate := search.next_rate()) is not None:
        result = _measure(plan.at_rate(rate), marks)
        if not result["valid"]:  # once more: somebody else may only just have had our core
            result = _measure(plan.at_rate(rate), marks)
        points.append(sweeps.point(rate, result))
        bench_view.print_point(points[-1])
        is_met = result["slo"]["met"] and result["valid"]
        search.tell(rate, is_met=is_met)
        if is_met or best is None:
            best = result
    whole: dict[str, Any] = sweeps.summarize(search, points, best)
    return whole


def _write(result: dict[str, Any], out: str | None, html: str | None) -> None:
    if out is not None:
        Path(out).write_text(json.dumps(result, indent=1) + "\n")
    if html is not None:
        Path(html).write_text(_load("report").render([result]))


def _exit_code(result: dict[str, Any]) -> int:
    if not result["valid"]:
        return INVALID
    faults = [group["faults"] for group in result["groups"].values()]
    is_wrong = any(sum(found.values()) for found in faults) and result["plan"]["verify"]
    is_missed = result["slo"] is not None and not result["slo"]["met"]
    load = result["groups"].get("load")
    is_nothing = load is None or not (load["counts"].get("ok") or load["counts"].get("cancelled"))
    return FAILED if is_wrong or is_missed or is_nothing else DONE


@app.command(short_help="Lay two results side by side.")
def compare(
    first: Annotated[str, typer.Argument(metavar="A.json")],
    second: Annotated[str, typer.Argument(metavar="B.json")],
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Write a report here.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Lay two results side by side, and say which differences are noise."""
    comparing = _load("comparing")
    results = [comparing.read_result(path) for path in (first, second)]
    if html is not None:
        _check_writable(html)
    rows = comparing.compare(*results)
    if html is not None:
        Path(html).write_text(_load("report").render(results))
    if as_json:
        typer.echo(json.dumps([row.to_json() for row in rows]))
    else:
        bench_view.print_comparison(rows, results, comparing.differing_plans(*results))
