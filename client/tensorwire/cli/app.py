"""The tree of commands, and the one place where errors become a sentence and an exit code."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import typer
from tensorwire_protocol.errors import TensorwireError
from typer.core import TyperGroup

from tensorwire.cli import about, arrays, bench, plugins, text

if TYPE_CHECKING:
    from collections.abc import Sequence

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130

# Click's, which newer versions of typer carry inside; every version derives BadParameter from it.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


class Commands(TyperGroup):
    """Our own commands, and behind them those of other packages, loaded when they are called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *plugins.names()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or plugins.stub(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name not in self.commands and name in plugins.names():
            return name, plugins.load(name), args[1:]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Commands,
    # Plain help: rich would make `--help` several times slower.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Run models on a Tensorwire server, and serve them.",
)
for _module in (text, arrays, about, bench):
    _module.register(app)


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: bool = typer.Option(False, "--version", help="Show the version and exit."),
) -> None:
    if version:
        from tensorwire.version import version as installed

        typer.echo(f"tensorwire {installed()}")
        raise typer.Exit(DONE)
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit(WRONG_USAGE)


@app.command()
def demo() -> None:
    """Start a server with two small real models, use it, and stop it again."""
    from tensorwire.cli.demo import DemoError, run

    try:
        run()
    except DemoError as error:
        say_error(str(error))
        raise typer.Exit(FAILED) from error


def say_error(sentence: str) -> None:
    """Write one line to stderr."""
    typer.echo(f"error: {' '.join(sentence.split())}", err=True)


def run(args: Sequence[str] | None = None) -> int:
    """Run a command line (`sys.argv` by default); return the exit code."""
    command = typer.main.get_command(app)
    listed = list(sys.argv[1:] if args is None else args)
    try:
        code = command.main(listed, prog_name="tensorwire", standalone_mode=False)
    except TensorwireError as error:
        say_error(error.message)
        return FAILED
    except _UsageError as error:
        say_error(_usage_sentence(error))
        return WRONG_USAGE
    except ModuleNotFoundError as error:
        if not plugins.is_of_server(error):
            raise
        say_error(plugins.how_to_install(next(iter(listed), "serve")))
        return WRONG_USAGE
    except typer.Abort as error:
        return FAILED if isinstance(error.__cause__, EOFError) else INTERRUPTED
    except KeyboardInterrupt:
        return INTERRUPTED
    return code if type(code) is int else DONE


def _usage_sentence(error: Any) -> str:
    sentence = str(error.format_message()).rstrip(".")
    path = error.ctx.command_path if error.ctx else "tensorwire"
    return f"{sentence} (see {path} --help)"
