"""The protocol library alone, on both ends: no gateway, no worker, no client.

Usage: python -m wire.library PORT
       python -m wire.library client HOST:PORT
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import uvloop
from tensorwire_protocol.bodies import FEATURE_BODY
from tensorwire_protocol.codec.typed import PACKING, TYPED
from tensorwire_protocol.connection import Connection
from tensorwire_protocol.messages import Packed, PackedResult, Request, Result, Welcome
from tensorwire_protocol.pool import PooledMemory
from tensorwire_protocol.roles import Role
from tensorwire_protocol.transports.aio import AioTransport, shared_scratch
from wire.load import Call, Figures, Job, do_jobs, measure, new_runner
from wire.ours import inputs_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from tensorwire_protocol.errors import TensorwireError
    from tensorwire_protocol.messages import Message

_POOL = PooledMemory(256 << 20)


class Echo:
    """Answers each request with its inputs."""

    def __init__(self) -> None:
        connection = Connection(
            Role.SERVER,
            scratch=shared_scratch(),
            features=(FEATURE_BODY,),
            codec=PACKING,
            bodies=_POOL,
        )
        self.transport = AioTransport(connection, self)

    def on_messages(self, messages: Sequence[Message]) -> None:
        """Answer the requests of one read."""
        for message in messages:
            if isinstance(message, Request):
                assert isinstance(message.inputs, Packed)
                nothing = dict.fromkeys(("usage", "timings", "extra"))
                self.transport.send(
                    PackedResult(stream=message.stream, outputs=message.inputs, **nothing)
                )

    def on_writable(self) -> None:
        """Nothing is held back."""

    def on_lost(self, error: TensorwireError | None) -> None:
        """Nobody waits for anything."""


class Asker:
    """Sends a request, and waits for its answer."""

    def __init__(self) -> None:
        connection = Connection(Role.CLIENT, features=(FEATURE_BODY,), codec=TYPED, bodies=_POOL)
        self.transport = AioTransport(connection, self)
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self.greeted = self._waiting[0] = self._loop.create_future()

    def on_messages(self, messages: Sequence[Message]) -> None:
        """Wake whoever waits."""
        for message in messages:
            if isinstance(message, Welcome):
                self.greeted.set_result(None)
            elif isinstance(message, Result):
                self._waiting.pop(message.stream).set_result(None)

    def on_writable(self) -> None:
        """Nothing is held back."""

    def on_lost(self, error: TensorwireError | None) -> None:
        """Fail whoever still waits."""
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(error or ConnectionError())

    async def ask(self, job_inputs: dict[str, object]) -> int:
        """Have inputs echoed."""
        stream = self.transport.connection.next_stream()
        waiting = self._waiting[stream] = self._loop.create_future()
        self.transport.send(Request(stream=stream, op="infer", key=bytes(16), inputs=job_inputs))
        await waiting
        return 1


@asynccontextmanager
async def connect(address: str, job: Job) -> AsyncIterator[Call]:
    """Give the call for one connection."""
    host, port = address.rsplit(":", 1)
    asker = Asker()
    loop = asyncio.get_running_loop()
    await loop.create_connection(lambda: asker.transport, host, int(port))
    await asker.greeted
    inputs = inputs_of(job)
    yield lambda: asker.ask(inputs)
    asker.transport.close()


async def serve(port: int) -> None:
    """Serve until killed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Echo().transport, "127.0.0.1", port)
    await server.serve_forever()


def main() -> None:
    """Serve, or do jobs until stdin ends."""
    if sys.argv[1] != "client":
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(int(sys.argv[1])))
    address = sys.argv[2]

    def do(job: Job) -> Figures:
        with new_runner() as runner:
            return runner.run(measure(lambda job: connect(address, job), job))

    do_jobs(do)


if __name__ == "__main__":
    main()
