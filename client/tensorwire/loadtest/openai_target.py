"""The same load on any server that speaks HTTP in OpenAI's style.

`generate` goes to /completions, `chat` to /chat/completions, both streamed, `embed` to /embeddings.
A chunk counts as one token, until the server says in `usage` how many there were in all.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from tensorwire.loadtest.http_connection import Base, HttpConnection
from tensorwire.loadtest.outcomes import CANCELLED
from tensorwire.loadtest.workloads import STREAMED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tensorwire.loadtest.outcomes import Outcome
    from tensorwire.loadtest.verifying import Faults
    from tensorwire.loadtest.workloads import Ask

_DONE = b"[DONE]"
_MESSAGE_CHARS = 200


class OpenAiTarget:
    """Keeps connections open, one for each request that is in flight."""

    def __init__(self, address: str | None, *, connections: int = 8) -> None:
        self._base = Base.parse(address)
        self._token = os.environ.get("TENSORWIRE_TOKEN")
        self._num_first = connections
        self._idle: list[HttpConnection] = []

    async def connect(self) -> None:
        """Make the first connections."""
        opening = (HttpConnection.open(self._base, self._token) for _ in range(self._num_first))
        self._idle += await asyncio.gather(*opening)

    async def recheck(self) -> Sequence[tuple[str, Faults]]:
        """Return nothing: there is no reference."""
        return ()

    async def close(self) -> None:
        """End the connections."""
        for connection in self._idle:
            connection.close()

    def tally(self) -> Mapping[str, int]:
        """Return nothing: nothing is done again."""
        return Counter[str]()

    async def perform(self, outcome: Outcome) -> None:
        """Do what `outcome.ask` says, and fill in the rest."""
        try:
            async with asyncio.timeout(outcome.ask.timeout_s):
                await self._send(outcome)
        except TimeoutError:  # an OSError, too
            _note_error(outcome, "DEADLINE", f"no answer within {outcome.ask.timeout_s:g} s")
        except OSError as error:
            _note_error(outcome, "CONNECTION_LOST", str(error))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            _note_error(outcome, "BAD_ANSWER", f"not in OpenAI's style: {error!r}")
        outcome.ended_at = time.monotonic()

    async def _send(self, outcome: Outcome) -> None:
        connection = await self._post(*_request(outcome.ask))
        try:
            if connection.status != 200:
                text = (await connection.body()).decode(errors="replace")
                outcome.status, outcome.message = f"HTTP_{connection.status}", text[:_MESSAGE_CHARS]
            elif outcome.ask.task in STREAMED:
                await _read_stream(connection, outcome)
            else:
                answer = json.loads(await connection.body())
                _ = answer["data"][0]["embedding"]
                _note_usage(outcome, answer.get("usage"))
        finally:
            if connection.is_reusable:
                self._idle.append(connection)
            else:
                connection.close()

    async def _post(self, path: str, value: Any) -> HttpConnection:
        """Send a request on an open or a new connection, and read the head of its answer."""
        while True:
            is_used = bool(self._idle)
            opened = self._idle.pop() if is_used else None
            connection = opened or await HttpConnection.open(self._base, self._token)
            try:
                await connection.post(path, value)
            except BaseException as error:
                connection.close()
                # Closed behind its last answer, as llama.cpp's server does: nobody saw the request.
                if not (is_used and isinstance(error, ConnectionError)):
                    raise
            else:
                return connection


def _request(ask: Ask) -> tuple[str, dict[str, Any]]:
    if ask.task == "embed":
        return "/embeddings", {"model": ask.model, "input": ask.text}
    value = {
        "model": ask.model,
        "max_tokens": ask.max_new_tokens,
        "seed": ask.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if ask.task == "chat":
        return "/chat/completions", value | {"messages": [{"role": "user", "content": ask.text}]}
    return "/completions", value | {"prompt": ask.text}


async def _read_stream(connection: HttpConnection, outcome: Outcome) -> None:
    ask, times, counts = outcome.ask, outcome.times, outcome.counts
    outcome.has_end = False
    async for data in connection.events():
        now = time.monotonic()
        if data == _DONE:
            outcome.has_end = True
            continue
        chunk = json.loads(data)
        _note_usage(outcome, chunk.get("usage"))
        choice = (chunk.get("choices") or [{}])[0]
        # `transformers serve` says the reason and closes the stream without [DONE].
        outcome.has_end = outcome.has_end or bool(choice.get("finish_reason"))
        if _text_of(choice):
            times.append(now)
            counts.append(1)
            if ask.cancel_after is not None and len(times) >= ask.cancel_after:
                outcome.status, outcome.has_end = CANCELLED, True
                return
    if not outcome.has_end:
        _note_error(outcome, "CONNECTION_LOST", "the stream stopped without a reason or [DONE]")


def _text_of(choice: Mapping[str, Any]) -> str | None:
    if "delta" not in choice:
        return choice.get("text")
    delta = choice["delta"]  # what a model thinks has taken time, too
    text: str | None = delta.get("content") or delta.get("reasoning_content")
    return text or delta.get("reasoning")


def _note_usage(outcome: Outcome, usage: Mapping[str, int] | None) -> None:
    if not usage:
        return
    outcome.tokens_in = usage.get("prompt_tokens", 0)
    missing = (usage.get("completion_tokens") or 0) - sum(outcome.counts)
    if outcome.counts and missing > 0:  # some chunks held several
        outcome.counts[-1] += missing


def _note_error(outcome: Outcome, status: str, message: str) -> None:
    outcome.status, outcome.message, outcome.has_end = status, message, False
