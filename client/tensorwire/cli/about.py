"""`models`, `health`, `stats`: what a server says of itself."""

from typing import Any

import typer

from tensorwire.cli import options, output

_FIRST = ("id", "name", "state", "tasks")  # columns, where the server sends them


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (models, health, stats):
        app.command()(command)


def models(
    timeout: options.Timeout = 10.0,
    address: options.Address = None,
    as_json: options.AsJson = False,
) -> None:
    """List the models of a server."""
    with options.client(address, timeout) as client:
        said = client.models()
    if as_json:
        output.print_json(said)
        return
    listed: list[dict[str, Any]] = said.get("models", [])
    names = {name: None for model in listed for name in model}
    columns = [name for name in _FIRST if name in names]
    columns += [name for name in names if name not in _FIRST]
    output.print_table(columns, [[model.get(name) for name in columns] for model in listed])


def health(
    timeout: options.Timeout = 10.0,
    address: options.Address = None,
    as_json: options.AsJson = False,
) -> None:
    """Say how a server is; exit code 1 unless it is ready."""
    with options.client(address, timeout) as client:
        said = client.health()
    if as_json:
        output.print_json(said)
    else:
        output.print_facts(said)
    if said.get("status") != "ready":
        raise typer.Exit(1)


def stats(
    timeout: options.Timeout = 10.0,
    address: options.Address = None,
    as_json: options.AsJson = False,
) -> None:
    """Print a server's counters."""
    with options.client(address, timeout) as client:
        said = client.stats()
    if as_json:
        output.print_json(said)
    else:
        output.print_facts(said)
