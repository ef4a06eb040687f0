"""How results look: JSON for programs, plain text and tables for people."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tensorwire import Generation, Stream


def print_json(value: Any) -> None:
    """Print one JSON object on one line."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table; it is as wide as it must be where stdout is not a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_shown(value)) for value in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000
    console.print(table)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print nested facts, one to a line: `gateway.sessions  3`."""
    flat = list(_flattened(facts, ""))
    width = max((len(name) for name, _ in flat), default=0)
    for name, value in flat:
        typer.echo(f"{name:<{width}}  {_shown(value)}")


def _flattened(value: Any, name: str) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flattened(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _shown(value: Any) -> str:
    if value is None or value == {}:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_shown(item) for item in value) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{key}={_shown(inner)}" for key, inner in value.items())
    return str(value)


def print_stream(stream: Stream) -> Generation:
    """Print a text as it is made, then a line about it to stderr; an interrupt cancels it."""
    last = "\n"
    try:
        with stream:
            for delta in stream:
                if delta.text:
                    sys.stdout.write(delta.text)
                    sys.stdout.flush()
                    last = delta.text
    finally:
        if not last.endswith("\n"):
            typer.echo()
    generation = stream.generation
    typer.secho(summary(generation), err=True, dim=True)
    return generation


def summary(generation: Generation) -> str:
    """Return in one line how much was made, why it ended, and how fast."""
    usage, timings = generation.usage, generation.timings
    parts = [f"{len(generation.token_ids)} tokens", f"finish {generation.finish_reason}"]
    if usage.prompt_tokens is not None:
        parts.insert(0, f"prompt {usage.prompt_tokens} tokens")
    if timings.first_token_ms is not None:
        parts.append(f"first token after {timings.first_token_ms:.1f} ms")
    if timings.total_ms is not None:
        parts.append(f"{timings.total_ms:.1f} ms in all")
    more_tokens = len(generation.token_ids) - 1
    if timings.decode_ms and more_tokens > 0:
        parts.append(f"{more_tokens / timings.decode_ms * 1000:.1f} tokens/s")
    return ", ".join(parts)


def as_json(generation: Generation) -> dict[str, Any]:
    """Return a generation as JSON carries it."""
    return asdict(generation)
