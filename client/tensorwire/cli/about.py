"""`models`, `health`, `stats`: what a server says of itself."""

from typing import Any

import typer

from tensorwire.cli import options, output

# The columns of `models`, where the server says something under these names.
_COLUMNS = (
    "name", "state", "detail", "tasks", "ready_replicas", "replicas", "architecture",
    "backend", "quantization", "parameters", "context_tokens", "embedding_size",
    "kv_bytes", "kv_tokens",
)  # fmt: skip


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
    columns = [name for name in _COLUMNS if any(model.get(name) for model in listed)]
    titles = [name.replace("_", " ") for name in columns]
    output.print_table(titles, [[model.get(name) for name in columns] for model in listed])


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
