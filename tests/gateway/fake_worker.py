"""A worker whose answers a test writes: the real protocol on a real socket, no model behind it."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

from tensorwire_protocol.connection import Connection
from tensorwire_protocol.messages import (
    Ack,
    Cancel,
    Drain,
    End,
    Failure,
    Finish,
    Heartbeat,
    Result,
    Step,
    Submit,
)
from tensorwire_protocol.roles import Role
from tensorwire_protocol.tensors import ids_checksum
from tensorwire_protocol.transports.aio import AioTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tensorwire_protocol.errors import TensorwireError
    from tensorwire_protocol.messages import Message
    from tensorwire_server.routing.replica import Replica

TASKS = ("chat", "embed", "generate", "infer", "tokenize")
PATIENCE_S = 5.0


class FakeWorker:
    """One life of a worker.

    Args:
        on_submit: answers each request at once; without it a test answers by hand.
    """

    def __init__(self, on_submit: Callable[[FakeWorker, Submit], None] | None = None) -> None:
        self.submits: list[Submit] = []
        self.cancels: list[Cancel] = []
        self.drains: list[Drain] = []
        self.tokens: dict[int, list[int]] = {}  # of each open stream
        self.is_lost = False
        self.transport = AioTransport(Connection(Role.WORKER, software="fake"), self)
        self._on_submit = on_submit
        self._attempts: dict[int, int] = {}
        self._changed = asyncio.Event()

    async def attach(self, replica: Replica, on_lost: Callable[[], None] | None = None) -> None:
        """Connect to a replica, as a freshly started process does."""
        loop = asyncio.get_running_loop()
        near, far = socket.socketpair()
        await loop.create_unix_connection(lambda: self.transport, sock=far)
        await loop.create_unix_connection(lambda: replica.build_transport(on_lost), sock=near)

    async def until(self, condition: Callable[[FakeWorker], object]) -> None:
        """Wait until what has come fulfils `condition`."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition(self):
                self._changed.clear()
                await self._changed.wait()

    # -- the transport's driver ---------------------------------------------------------------

    def on_messages(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if isinstance(message, Submit):
                self.submits.append(message)
                self.tokens[message.stream] = list(message.so_far)
                self._attempts[message.stream] = message.attempt
                if self._on_submit is not None:
                    self._on_submit(self, message)
            elif isinstance(message, Cancel):
                self.cancels.append(message)
            elif isinstance(message, Drain):
                self.drains.append(message)
        self._changed.set()

    def on_writable(self) -> None: ...

    def on_lost(self, error: TensorwireError | None) -> None:
        self.is_lost = True
        self._changed.set()

    # -- what a test has it say ---------------------------------------------------------------

    def beat(self, state: str, detail: str | None = None, **card: Any) -> None:
        """Say how far the model is; a card belongs to "ready"."""
        known = {"model": "m", "tasks": list(TASKS)} | card if state == "ready" else None
        self.transport.send(Heartbeat(state=state, detail=detail, card=known, steps=1))

    def ack(self, stream: int, prompt_ids: Sequence[int] | None = (7, 8)) -> None:
        """Accept a request."""
        self.transport.send(Ack(stream=stream, prompt_ids=prompt_ids))

    def step(
        self,
        made: Mapping[int, Sequence[int]],
        *,
        text: str | None = None,
        attempt: int | None = None,
        skip: int = 0,
    ) -> None:
        """Send the tokens of one engine step.

        Args:
            made: the new tokens of each stream.
            text: of each stream; None: one word for each token.
            attempt: a lie about which attempt made them.
            skip: how far the index is wrong.
        """
        firsts = [len(self.tokens[stream]) + skip for stream in made]
        self.transport.send(
            Step(
                streams=list(made),
                attempts=[attempt or self._attempts[stream] for stream in made],
                first_indexes=firsts,
                counts=[len(tokens) for tokens in made.values()],
                tokens=[token for tokens in made.values() for token in tokens],
                texts=[words(tokens) if text is None else text for tokens in made.values()],
            )
        )
        if attempt is None and not skip:
            for stream, tokens in made.items():
                self.tokens[stream] += tokens

    def end(self, stream: int, finish: Finish = Finish.STOP, **lies: Any) -> None:
        """End a stream with what was sent; `lies` replace its count, checksum or extra."""
        tokens = self.tokens.pop(stream)
        self.transport.send(
            End(
                stream=stream,
                finish=finish,
                count=lies.get("count", len(tokens)),
                checksum=lies.get("checksum", ids_checksum(tokens)),
                usage={"prompt_tokens": 2, "completion_tokens": len(tokens)},
                timings={"queued_ms": 0.5},
                extra=lies.get("extra", {}),
            )
        )

    def result(self, stream: int, **fields: Any) -> None:
        """Answer a unary request."""
        self.tokens.pop(stream)
        self.transport.send(Result(stream=stream, **fields))

    def fail(self, stream: int, error: TensorwireError) -> None:
        """Refuse a request, or fail on it."""
        self.tokens.pop(stream)
        self.transport.send(Failure.of(stream, error))

    def die(self) -> None:
        """Cut the link, as the end of the process does."""
        self.transport.close()


def words(tokens: Sequence[int]) -> str:
    """Return the text of tokens."""
    return "".join(f"{token} " for token in tokens)


def echo(worker: FakeWorker, submit: Submit) -> None:
    """Answer a unary request with its inputs."""
    worker.result(submit.stream, outputs=dict(submit.inputs))
