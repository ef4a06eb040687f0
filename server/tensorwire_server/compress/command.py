"""`tensorwire compress`: from flags to a recipe, and from what happens to a sentence."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tensorwire_server.compress.recipe import (
    RecipeError,
    make_recipe,
    parse_floors,
    parse_pruning,
    parse_quantization,
    parse_tables,
    refine,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tensorwire_server.compress.recipe import Recipe

FAILED, WRONG_USAGE, FLOOR_MISSED = 1, 2, 4

_Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a hub name, or 'demo'.")]
_Out = Annotated[Path, typer.Option(metavar="DIR", help="The folder to make; it must not exist.")]
_RecipeFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A recipe in TOML; flags replace what stands in it."),
]
_Prune = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WHAT:SHARE",
        help="unstructured:0.5 makes weights zero; heads:, neurons:, layers:0.25 remove them.",
    ),
]
_Method = Annotated[
    str | None, typer.Option(help="Of unstructured: magnitude, or wanda (wants --calibrate).")
]
_Scope = Annotated[str | None, typer.Option(help="Of unstructured: layer or global.")]
_Quantize = Annotated[str | None, typer.Option(metavar="NUMBERS", help="int8 or int4.")]
_Rounding = Annotated[
    str | None, typer.Option(help="nearest or gptq (the default with --calibrate).")
]
_GroupSize = Annotated[
    int | None, typer.Option(metavar="N", help="int4: inputs that share a scale (32).")
]
_Calibrate = Annotated[
    str | None, typer.Option(metavar="FILE", help="Text that shows what is important.")
]
_Eval = Annotated[
    str | None, typer.Option("--eval", metavar="FILE", help="Another text, to measure quality on.")
]
_Labels = Annotated[
    str | None, typer.Option(metavar="FILE", help='JSON Lines of {"text": …, "label": …}.')
]
_Floor = Annotated[
    list[str] | None,
    typer.Option(
        metavar="METRIC=LIMIT",
        help="ppl=1.10x, kl=0.1, agreement=0.9, cosine=0.99, accuracy=0.95x; missed: exit code 4.",
    ),
]
_Seed = Annotated[int | None, typer.Option(metavar="N", help="Chooses windows of the texts (0).")]
_Speed = Annotated[
    bool | None, typer.Option("--speed/--no-speed", help="Measure tokens/s through a server.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]


def compress(
    model: _Model,
    out: _Out,
    recipe: _RecipeFile = None,
    prune: _Prune = None,
    method: _Method = None,
    scope: _Scope = None,
    quantize: _Quantize = None,
    rounding: _Rounding = None,
    group_size: _GroupSize = None,
    calibrate: _Calibrate = None,
    evaluate: _Eval = None,
    labels: _Labels = None,
    floor: _Floor = None,
    seed: _Seed = None,
    speed: _Speed = None,
    as_json: _Json = False,
) -> None:
    """Prune or quantize a model, measure what that did, and write a folder that serves.

    The folder holds the model, and in `compression/` the recipe and the report (JSON and HTML).
    """
    flags: dict[str, Any] = {
        "calibrate": calibrate,
        "evaluate": evaluate,
        "labels": labels,
        "seed": seed,
        "speed": speed,
    }
    try:
        if prune:
            flags["prune"] = [parse_pruning(text) for text in prune]
        if quantize:
            flags["quantize"] = parse_quantization(quantize)
        if floor:
            flags["floors"] = {item.metric: item.bound for item in parse_floors(floor)}
        tables = _read(recipe) | {key: value for key, value in flags.items() if value is not None}
        refine(tables, method=method, scope=scope, rounding=rounding, group_size=group_size)
        final = make_recipe(tables)
    except RecipeError as error:
        _exit(str(error), WRONG_USAGE)
    _run(model, final, out, as_json=as_json)


def _read(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        return parse_tables(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {str(file)!r}: {error.strerror}") from error
    except ValueError as error:
        raise RecipeError(f"the recipe {str(file)!r}: {error}") from error


def _run(model: str, recipe: Recipe, out: Path, *, as_json: bool) -> None:
    # Torch and transformers: only now, not for --help or a wrong flag.
    from tensorwire_server.compress.errors import MeasurementError, is_out_of_memory
    from tensorwire_server.compress.pipeline import FloorMissed
    from tensorwire_server.compress.pipeline import compress as run
    from tensorwire_server.compress.saving import OutputError
    from tensorwire_server.compress.terminal import show
    from tensorwire_server.engine.errors import ModelLoadError
    from tensorwire_server.models.spec import SpecError

    try:
        with _interrupted_by_sigterm(), _progress() as on_progress:
            report = run(model, recipe, out, on_progress=on_progress)
    except (SpecError, RecipeError) as error:
        _exit(str(error), WRONG_USAGE)
    except FloorMissed as error:
        show(error.report, as_json=as_json)
        _exit(str(error), FLOOR_MISSED)
    except (MeasurementError, ModelLoadError, OutputError) as error:
        _exit(str(error), FAILED)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _exit(f"there is not enough memory to compress {model!r}", FAILED)
    show(report, as_json=as_json)
    if not as_json:
        print(f"written to {os.path.abspath(out)}; serve it with: tensorwire serve {out}")


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Tidy up on SIGTERM as on Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress() -> Iterator[Any]:
    """Give what shows how far each stage is: bars on a terminal, a line a stage elsewhere."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    stages: dict[str, Any] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def on_progress(stage: str, done: int, total: int, what: str) -> None:
            if stage not in stages:
                stages[stage] = progress.add_task(stage, total=total)
                if not console.is_terminal:
                    print(stage, file=sys.stderr, flush=True)
            description = f"{stage}: {what}" if what else stage
            progress.update(stages[stage], completed=done, total=total, description=description)

        yield on_progress


def _exit(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(code)
