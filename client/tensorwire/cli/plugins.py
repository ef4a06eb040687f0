"""Commands of other packages, found through the entry points of group `tensorwire.commands`.

An entry point names a `typer.Typer` or a function. It is loaded when its command is called, never
for `--help`: a server's modules are heavy.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata
from typing import Any

import typer
from typer.core import TyperCommand

GROUP = "tensorwire.commands"
_HOW_TO_INSTALL = "`tensorwire {name}` needs {what}: pip install 'tensorwire[{extra}]'"

# Listed in the help even where the server is not installed.
_HELP = {
    "compress": "Prune or quantize a model, and measure what that did to it.",
    "serve": "Serve models from this machine.",
    "token": "Make the tokens with which clients log in to a server of yours.",
    "worker": "Run one replica of a model (`serve` starts these).",
}
_SERVER_MODULES = frozenset(
    {"jinja2", "msgspec", "safetensors", "tensorwire_server", "tokenizers", "torch", "transformers"}
    | {"matplotlib", "tomli_w", "uvloop"}
)


def how_to_install(name: str) -> str:
    """Return the sentence for whoever calls a command whose packages are not there."""
    extra = "compress" if name == "compress" else "server"
    what = "its extra" if name == "compress" else "the server"
    return _HOW_TO_INSTALL.format(name=name, what=what, extra=extra)


@cache
def _entry_points() -> dict[str, metadata.EntryPoint]:
    return {point.name: point for point in metadata.entry_points(group=GROUP)}


def names() -> list[str]:
    """Return the names of all such commands."""
    return [*_HELP, *(name for name in _entry_points() if name not in _HELP)]


def stub(name: str) -> TyperCommand | None:
    """Return what the list of commands shows for `name`."""
    return TyperCommand(name, help=_HELP.get(name, "")) if name in names() else None


def load(name: str) -> Any:
    """Return the real command.

    Raises:
        typer.BadParameter: the package it needs is not installed.
    """
    point = _entry_points().get(name)
    if point is None:
        raise ModuleNotFoundError(how_to_install(name), name="tensorwire_server")
    target = point.load()
    if not isinstance(target, typer.Typer):
        wrapped = typer.Typer(add_completion=False, rich_markup_mode=None)
        wrapped.command(name)(target)
        target = wrapped
    command: Any = typer.main.get_command(target)
    command.name = name
    return command


def is_of_server(error: ModuleNotFoundError) -> bool:
    """Say if what is missing comes with the server extra."""
    return (error.name or "").partition(".")[0] in _SERVER_MODULES
