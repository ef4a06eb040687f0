"""The load on a Tensorwire server, through the same client that everybody uses."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from tensorwire_protocol.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    ErrorCode,
    TensorwireError,
)

from tensorwire.aio import AsyncClient
from tensorwire.loadtest import insides
from tensorwire.loadtest.oracle import chat_prompt, oracle_tokens
from tensorwire.loadtest.outcomes import CANCELLED, OK, Outcome
from tensorwire.loadtest.rechecking import Said, Sample
from tensorwire.loadtest.verifying import Faults, find_faults
from tensorwire.loadtest.workloads import STREAMED
from tensorwire.retrying import MAX_ATTEMPTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tensorwire.aio import AsyncStream
    from tensorwire.loadtest.workloads import Ask
    from tensorwire.results import Generation, Timings

_TIMES = ("queued_ms", "first_token_ms", "prefill_ms", "decode_ms", "write_stall_ms", "total_ms",
          "gateway_ms")  # fmt: skip
WRONG_ANSWER = "WRONG_ANSWER"
_RECHECK_S = 30.0  # for all that is asked again


class TensorwireTarget:
    """Sends over a few connections in turn; what makes trouble has a connection of its own.

    Args:
        address: as `AsyncClient` takes it.
        connections: among which the requests are spread.
        attempts: of each request; 1 shows every failure.
        verify: compare each answer with what `oracle:` and `echo:` must give. Streams of other
            models are made without chance, and a few are asked for again by `recheck`.
        slow_s: so long a slow reader does not read.
    """

    def __init__(
        self,
        address: str | None,
        *,
        connections: int = 8,
        attempts: int = 1,
        verify: bool = False,
        slow_s: float = 1.0,
    ) -> None:
        self._address = address
        self._attempts = attempts
        self._verify = verify
        self._slow_s = slow_s
        self._clients = [self._new_client(attempts) for _ in range(connections)]
        self._again: Counter[str] = Counter()
        self._known: dict[str, dict[str, Any]] = {}  # what the server says of its models
        self._sample = Sample()

    def _new_client(self, attempts: int) -> AsyncClient:
        return AsyncClient(self._address, timeout=None, max_attempts=attempts, max_connections=1)

    async def connect(self) -> None:
        """Make the connections, so that the first requests do not pay for them."""
        await asyncio.gather(*(client.health(timeout=30.0) for client in self._clients))
        if self._verify:
            told = await self._clients[0].models(timeout=30.0)
            self._known = {model["name"]: model for model in told["models"]}

    async def close(self) -> None:
        """End the connections."""
        for client in self._clients:
            await client.close()

    def tally(self) -> Mapping[str, int]:
        """Return the retries and resumes of all connections."""
        return self._again + sum(map(insides.again, self._clients), Counter())

    async def recheck(self) -> Sequence[tuple[str, Faults]]:
        """Ask for the streams that no rule could check again, alone; give group and faults."""
        found: list[tuple[str, Faults]] = []
        end = time.monotonic() + _RECHECK_S
        for said in self._sample.kept:
            if time.monotonic() > end:
                break
            reference = Outcome(replace(said.ask, cancel_after=None), time.monotonic(), 0.0)
            ids = await self._again_alone(reference)
            if reference.status == OK:
                expected = ids if said.is_whole else ids[: len(said.ids)]
                found.append((said.ask.group, find_faults(expected, said.ids)))
        return found

    async def _again_alone(self, reference: Outcome) -> list[int]:
        ids: list[int] = []
        try:
            async for delta in self._open(self._clients[0], reference.ask):
                ids += delta.token_ids
        except TensorwireError as error:
            self._note_error(reference, error)
        return ids

    async def perform(self, outcome: Outcome) -> None:
        """Do what `outcome.ask` says, and fill in the rest."""
        ask = outcome.ask
        try:
            if ask.is_slow or ask.is_cut:
                await self._with_own_connection(ask, outcome)
            else:
                await self._send(self._clients[ask.index % len(self._clients)], ask, outcome)
        except TensorwireError as error:
            self._note_error(outcome, error)
        outcome.ended_at = time.monotonic()

    async def _with_own_connection(self, ask: Ask, outcome: Outcome) -> None:
        attempts = max(self._attempts, MAX_ATTEMPTS if ask.is_cut else 1)
        async with self._new_client(attempts) as client:
            try:
                await self._send(client, ask, outcome)
            finally:
                self._again += insides.again(client)

    async def _send(self, client: AsyncClient, ask: Ask, outcome: Outcome) -> None:
        if ask.task in STREAMED:
            await self._stream(client, ask, outcome)
        elif ask.task == "embed":
            await client.embed(ask.model, ask.text, timeout=ask.timeout_s)
        else:
            assert ask.array is not None
            answer = await client.infer(ask.model, {"x": ask.array}, timeout=ask.timeout_s)
            if self._architecture(ask) == "echo" and not np.array_equal(
                np.asarray(answer.get("x")), ask.array
            ):
                outcome.status, outcome.message = WRONG_ANSWER, "the array came back changed"

    async def _stream(self, client: AsyncClient, ask: Ask, outcome: Outcome) -> None:
        stream = self._open(client, ask)
        times, counts, ids = outcome.times, outcome.counts, list[int]()
        is_plain = not (ask.cancel_after or ask.is_slow or ask.is_cut)
        try:
            async for delta in stream:
                if not delta.token_ids:
                    continue
                times.append(time.monotonic())
                counts.append(len(delta.token_ids))
                ids += delta.token_ids
                if not is_plain and not await self._make_trouble(client, stream, ask, ids):
                    outcome.status = CANCELLED
                    break
            else:
                self._note_end(outcome, stream.generation)
        except TensorwireError as error:
            self._note_error(outcome, error)
        if self._verify:
            self._check(outcome, ids)

    async def _make_trouble(
        self, client: AsyncClient, stream: AsyncStream, ask: Ask, ids: list[int]
    ) -> bool:
        """Do to a stream what it is there for; False if it was left."""
        if ask.cancel_after is not None and len(ids) >= ask.cancel_after:
            await stream.close()
            return False
        if ask.is_slow:
            ask.is_slow = False  # once is enough
            await insides.stop_reading(client, self._slow_s)
        if ask.is_cut and 2 * len(ids) >= ask.max_new_tokens:
            ask.is_cut = False
            insides.cut(client)
        return True

    def _open(self, client: AsyncClient, ask: Ask) -> AsyncStream:
        options: Any = {
            "max_new_tokens": ask.max_new_tokens, "seed": ask.seed, "timeout": ask.timeout_s,
        }  # fmt: skip
        if self._verify and self._architecture(ask) != "oracle":
            options["temperature"] = 0.0
        if ask.task == "chat":
            messages = [{"role": "user", "content": ask.text}]
            return client.stream_chat(ask.model, messages, **options)
        return client.stream(ask.model, ask.text, **options)

    def _architecture(self, ask: Ask) -> str | None:
        """Return what kind of model is asked; None if nobody wants to know."""
        return self._told(ask).get("architecture")

    def _told(self, ask: Ask) -> Mapping[str, Any]:
        return self._known.get(ask.model.partition("@")[0], {})

    def _check(self, outcome: Outcome, ids: list[int]) -> None:
        ask, is_whole = outcome.ask, outcome.status == OK
        if outcome.status == ErrorCode.SEQUENCE.name:
            outcome.faults = Faults(caught=1)
        elif self._architecture(ask) == "oracle":
            prompt = chat_prompt(ask.text) if ask.task == "chat" else ask.text.encode()
            vocab = self._told(ask)["vocab_size"]
            count = ask.max_new_tokens if is_whole else len(ids)  # what was cut short: so far
            outcome.faults = find_faults(oracle_tokens(prompt, ask.seed, count, vocab), ids)
        elif ids:
            self._sample.take(Said(ask=ask, ids=ids, is_whole=is_whole))

    @staticmethod
    def _note_end(outcome: Outcome, made: Generation) -> None:
        outcome.tokens_in = made.usage.prompt_tokens or 0
        outcome.server_ms = _server_ms(made.timings)

    @staticmethod
    def _note_error(outcome: Outcome, error: TensorwireError) -> None:
        outcome.status, outcome.message = error.code.name, error.message
        partial: Generation | None = error.detail.get("partial")
        if partial is not None:
            outcome.server_ms = _server_ms(partial.timings)
        # The client gives up by itself on a server that says nothing: then no END came.
        is_silent = isinstance(error, DeadlineExceeded) and not outcome.server_ms
        outcome.has_end = not (isinstance(error, ConnectionFailed) or is_silent)


def _server_ms(timings: Timings) -> dict[str, float]:
    found = {name: getattr(timings, name) for name in _TIMES}
    return {name: value for name, value in found.items() if value is not None}
