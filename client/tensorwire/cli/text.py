"""`generate`, `chat`, `tokenize`: what makes or takes text."""

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorwire.cli import options, output

if TYPE_CHECKING:
    from tensorwire import Client


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (generate, chat, tokenize):
        app.command()(command)


def generate(
    model: options.Model,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help='The text to continue; "-" reads stdin.')
    ],
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    stop_id: options.StopId = None,
    priority: options.Priority = 0,
    timeout: options.Timeout = 300.0,
    no_wait: options.NoWait = False,
    address: options.Address = None,
    as_json: options.AsJson = False,
) -> None:
    """Continue a text, and print what is made as it comes."""
    given = options.given(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
        stop_ids=stop_id,
        priority=priority,
        no_wait=no_wait,
    )
    text = options.text_or_stdin(prompt)
    with options.client(address, timeout) as client:
        if as_json:
            output.print_json(output.as_json(client.generate(model, text, **given)))
        else:
            output.print_stream(client.stream(model, text, **given))


def chat(
    model: options.Model,
    message: Annotated[
        str | None,
        typer.Argument(
            metavar="[MESSAGE]",
            help='What to say; "-" reads stdin; without it, a conversation begins.',
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    stop_id: options.StopId = None,
    priority: options.Priority = 0,
    timeout: options.Timeout = 300.0,
    no_wait: options.NoWait = False,
    address: options.Address = None,
    as_json: options.AsJson = False,
) -> None:
    """Answer a message, or hold a conversation (Ctrl-D ends it, Ctrl-C stops an answer)."""
    given = options.given(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
        stop_ids=stop_id,
        priority=priority,
        no_wait=no_wait,
    )
    messages = [{"role": "system", "content": system}] if system else []
    with options.client(address, timeout) as client:
        if message is None and sys.stdin.isatty():
            if as_json:
                raise typer.BadParameter("--json needs a MESSAGE")
            _converse(client, model, messages, given)
            return
        messages.append({"role": "user", "content": options.text_or_stdin(message or "-")})
        if as_json:
            output.print_json(output.as_json(client.chat(model, messages, **given)))
        else:
            output.print_stream(client.stream_chat(model, messages, **given))


def _converse(
    client: "Client", model: str, messages: list[dict[str, str]], given: dict[str, Any]
) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 gives input() its history
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            typer.echo()
            return
        if not said:
            continue
        turn = [*messages, {"role": "user", "content": said}]
        try:
            answer = output.print_stream(client.stream_chat(model, turn, **given))
        except KeyboardInterrupt:
            continue  # that answer only; the turn is forgotten
        messages[:] = [*turn, {"role": "assistant", "content": answer.text}]


def tokenize(
    model: options.Model,
    text: Annotated[str, typer.Argument(metavar="TEXT", help='"-" reads stdin.')],
    timeout: options.Timeout = 300.0,
    no_wait: options.NoWait = False,
    address: options.Address = None,
    as_json: options.AsJson = False,
) -> None:
    """Print the token ids of a text."""
    with options.client(address, timeout) as client:
        given = options.given(no_wait=no_wait)
        ids = client.tokenize(model, options.text_or_stdin(text), **given)
    if as_json:
        output.print_json({"ids": ids, "count": len(ids)})
    else:
        typer.echo(" ".join(map(str, ids)))
