"""Options that several commands share, and the client they ask for."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tensorwire import Client

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Model id: name or name@revision.")]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        envvar="TENSORWIRE_ADDRESS",
        help="Where the server is; by default 127.0.0.1:8947.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Timeout = Annotated[float, typer.Option(metavar="SECONDS", help="For the request in all.")]
NoWait = Annotated[
    bool, typer.Option("--no-wait", help="Fail at once if the model is still loading.")
]
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", "-n", help="At most so many tokens.")
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", "-t", help="0 always takes the likeliest token.")
]
TopK = Annotated[int | None, typer.Option(help="Sample among the K likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Sample among the likeliest P of probability.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")]
StopId = Annotated[list[int] | None, typer.Option(help="End at this token id; may be repeated.")]
Priority = Annotated[int, typer.Option(help="-100 to 100, higher first.")]


def client(address: str | None, timeout_s: float | None) -> "Client":
    """Return a client; nothing is connected yet.

    Raises:
        typer.BadParameter: the address is none.
    """
    from tensorwire import BadParams, Client

    try:
        return Client(address, timeout=timeout_s)
    except BadParams as error:
        raise typer.BadParameter(error.message) from error


def given(**options: Any) -> dict[str, Any]:
    """Return the options that were given; `no_wait` becomes the library's `wait`."""
    if options.pop("no_wait", False):
        options["wait"] = False
    return {name: value for name, value in options.items() if value is not None and value != []}


def text_or_stdin(text: str) -> str:
    """Return `text`, or for "-" all of standard input without its last line break."""
    return sys.stdin.read().removesuffix("\n") if text == "-" else text
