"""`tensorwire demo`: starts a server with two real models, uses it as a user would, stops it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tensorwire import Client, Generation

if TYPE_CHECKING:
    from collections.abc import Iterator

PROMPT = "This module provides"
MIN_STREAMED = 20  # fewer tokens would show no stream
SENTENCES = (
    "A cat sleeps on the warm window sill.",
    "The kitten naps in the sunshine by the window.",
    "The server lost its connection to the database.",
    "A network error interrupted the query.",
)
NUM_REQUESTS = 32
_START_S = 60.0
_STOP_S = 30.0
_READY_WORDS = 3  # "ready", the address, the models

console = Console(highlight=False)


class DemoError(RuntimeError):
    """The demo could not run; the message is one sentence for a person."""


def run() -> None:
    """Run the demo; raises DemoError if any part does not work."""
    began = time.monotonic()
    with _server() as address:
        _step(f"the server is ready on {address} after {time.monotonic() - began:.1f} s")
        with Client(address) as client:
            _stream(client)
            _embed(client)
            _mixed(client)
    _step(f"the server has stopped cleanly; {time.monotonic() - began:.1f} s in all")


@contextmanager
def _server() -> Iterator[str]:
    """Run a server with both models; yields its address."""
    command = [sys.executable, "-m", "tensorwire", "serve", "demo", "minilm", "--port", "0"]
    _step("$ tensorwire serve demo minilm --port 0")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield _wait_until_ready(process)
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.send_signal(signal.SIGTERM)
    try:
        code = process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise DemoError(f"the server did not stop within {_STOP_S:.0f} s of SIGTERM") from None
    if code:
        raise DemoError(f"the server stopped with exit code {code}")


def _wait_until_ready(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    with ThreadPoolExecutor(1) as reader:
        line = reader.submit(process.stdout.readline)
        try:
            words = line.result(_START_S).split()
        except TimeoutError:
            process.kill()
            raise DemoError(f"the server was not ready within {_START_S:.0f} s") from None
    if len(words) != _READY_WORDS or words[0] != "ready":
        raise DemoError("the server did not start; its own message is above")
    return words[1]


def _stream(client: Client) -> None:
    _step(f"an answer of 'demo' as it is made, to the prompt {PROMPT!r}")
    console.print(PROMPT, style="bold", end="")
    with client.stream("demo", PROMPT, max_new_tokens=96, seed=4) as stream:
        for delta in stream:
            console.print(delta.text, end="", markup=False, soft_wrap=True)
    console.print()
    generation = stream.generation
    if len(generation.token_ids) < MIN_STREAMED:
        raise DemoError(f"the answer has only {len(generation.token_ids)} tokens")
    first_ms = generation.timings.first_token_ms or 0.0
    console.print(
        f"{len(generation.token_ids)} tokens, finish {generation.finish_reason},"
        f" first token after {first_ms:.1f} ms",
        style="dim",
    )


def _embed(client: Client) -> None:
    _step("four sentences through 'minilm', and how alike they are")
    vectors = client.embed("minilm", SENTENCES)
    similarity = vectors @ vectors.T
    table = Table()
    table.add_column("sentence")
    for i in range(len(SENTENCES)):
        table.add_column(str(i + 1), justify="right")
    for i, sentence in enumerate(SENTENCES):
        table.add_row(f"{i + 1} {sentence}", *(f"{s:z.2f}" for s in similarity[i]))
    console.print(table)
    if not np.allclose(np.diag(similarity), 1, atol=1e-3):
        raise DemoError("a sentence is not like itself: the embeddings are wrong")


def _mixed(client: Client) -> None:
    _step(f"{NUM_REQUESTS} mixed requests at once over one connection")
    began = time.monotonic()
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        rows = list(pool.map(lambda i: _one(client, i), range(NUM_REQUESTS)))
    wall_s = time.monotonic() - began
    table = Table("request", "tokens", "queued", "first token", "total", "largest batch")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row[0])
    console.print(table)
    num_tokens = sum(row[1] for row in rows)
    console.print(
        f"{num_tokens} tokens and {sum(not row[1] for row in rows)} embeddings in {wall_s:.2f} s"
        " (* as the client saw it; all else from the server's END)",
        style="dim",
    )


def _one(client: Client, i: int) -> tuple[tuple[str, ...], int]:
    """Run one request of the mix; returns its row and how many tokens it made."""
    if i % 4 == 3:
        began = time.monotonic()
        client.embed("minilm", SENTENCES[i // 4 % len(SENTENCES)])
        total_ms = (time.monotonic() - began) * 1000
        return (f"{i:2} embed", "", "", "", f"{total_ms:.1f} ms*", ""), 0
    made = client.generate("demo", PROMPT, max_new_tokens=16 + 2 * i, seed=i, temperature=0.8)
    return (f"{i:2} generate", str(len(made.token_ids)), *_timings(made)), len(made.token_ids)


def _timings(made: Generation) -> tuple[str, ...]:
    timings = made.timings

    def ms(value: Any) -> str:
        return "" if value is None else f"{value:.1f} ms"

    largest = timings.largest_batch
    return (
        ms(timings.queued_ms),
        ms(timings.first_token_ms),
        ms(timings.total_ms),
        "" if largest is None else f"{largest:.0f}",
    )


def _step(text: str) -> None:
    console.print(f"\n[bold cyan]»[/] {text}" if text[0] != "$" else f"\n[bold]{text}[/]")
