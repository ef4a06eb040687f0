"""Large messages over real sockets: without copies, within bounds, and small ones pass them."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import tracemalloc
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tensorwire_protocol.bodies import FEATURE_BODY, Placed
from tensorwire_protocol.codec.typed import PACKING, TYPED
from tensorwire_protocol.connection import Connection
from tensorwire_protocol.frames import SCRATCH_BYTES
from tensorwire_protocol.messages import PackedResult, Request, Result
from tensorwire_protocol.roles import Role, State
from tensorwire_protocol.tensors import aligned_buffer
from tensorwire_protocol.transports.aio import AioTransport, shared_scratch
from tensorwire_protocol.transports.blocking import BlockingTransport

from protocol.samples import request
from protocol.transports.driving import PATIENCE_S, Recorder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
    from typing import Any

    from tensorwire_protocol.messages import Message

    Test = Callable[[], Coroutine[Any, Any, None]]

MIB = 1024 * 1024
SIZE = 24 * MIB


class Prepared:
    """Memory that was there before anybody counted."""

    def __init__(self, num_bytes: int) -> None:
        self.block = aligned_buffer(num_bytes)

    def reserve(self, lengths: Sequence[int], on_ready: Callable[[], None]) -> Placed:
        (length,) = lengths
        return Placed([self.block[:length]])


class Echo(Recorder):
    """Answers each request with its inputs, unopened."""

    transport: AioTransport

    def on_messages(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if isinstance(message, Request):
                nothing = dict.fromkeys(("usage", "timings", "extra"))
                answer = PackedResult(stream=message.stream, outputs=message.inputs, **nothing)
                self.transport.send(answer)
        super().on_messages(messages)


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Test], None]:
    factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.SelectorEventLoop
    if request.param == "uvloop":
        factory = pytest.importorskip("uvloop").new_event_loop

    def run_on_loop(test: Test) -> None:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(test())

    return run_on_loop


@asynccontextmanager
async def echoed() -> AsyncIterator[tuple[AioTransport, Recorder, AioTransport]]:
    """Give a client that knows bodies, what it hears, and the server's transport."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    driver, recorder = Echo(), Recorder()
    server = Connection(
        Role.SERVER,
        features=(FEATURE_BODY,),
        scratch=shared_scratch(),
        codec=PACKING,
        bodies=Prepared(SIZE),
    )
    driver.transport = AioTransport(server, driver)
    await loop.create_connection(lambda: driver.transport, sock=theirs)
    client = Connection(Role.CLIENT, features=(FEATURE_BODY,), codec=TYPED, bodies=Prepared(SIZE))
    transport = AioTransport(client, recorder)
    await loop.create_connection(lambda: transport, sock=ours)
    await recorder.until(lambda _: client.state is State.OPEN)
    yield transport, recorder, driver.transport
    transport.close()
    driver.transport.close()
    await recorder.until_lost()


def test_a_large_message_costs_no_memory_beside_where_it_lands(run: Callable[[Test], None]) -> None:
    x = np.arange(SIZE // 8)

    async def test() -> None:
        async with echoed() as (client, recorder, _):
            tracemalloc.start()
            try:
                client.send(request(1, op="infer", inputs={"x": x}))
                await recorder.until(lambda r: isinstance(r.messages[-1], Result))
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            answer = recorder.messages[-1]
            assert isinstance(answer, Result)
            np.testing.assert_array_equal(answer.outputs["x"], x)
            # The standard loop copies what the kernel did not take of a DATA frame, at both ends.
            assert peak < 4 * MIB

    run(test)


def test_all_but_one_read_is_received_in_place(run: Callable[[Test], None]) -> None:
    async def test() -> None:
        async with echoed() as (client, recorder, server):
            client.send(request(1, op="infer", inputs={"x": np.zeros(SIZE, np.uint8)}))
            await recorder.until(lambda r: isinstance(r.messages[-1], Result))
            assert server.connection._decoder.num_copied_bytes <= SCRATCH_BYTES

    run(test)


def test_bulk_stops_where_the_peer_does_not_read(run: Callable[[Test], None]) -> None:
    async def test() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            server = Connection(Role.SERVER, features=(FEATURE_BODY,), scratch=shared_scratch())
            peer = Connection(Role.CLIENT, features=(FEATURE_BODY,))
            loop = asyncio.get_running_loop()
            transport = AioTransport(server, Recorder())
            await loop.create_connection(lambda: transport, sock=ours)
            server.feed(b"".join(peer.take_output()), loop.time())
            peer.send(request(1))
            server.feed(b"".join(peer.take_output()), loop.time())
            transport.send(Result(stream=1, outputs={"x": np.zeros(SIZE, np.uint8)}))
            for _ in range(20):
                await asyncio.sleep(0)
                assert transport.unsent_bytes < 2 * MIB
            assert transport.is_paused
            assert server.has_bulk
            transport.connection.close()
            transport.flush()

    run(test)


def test_small_answers_pass_a_large_one(run: Callable[[Test], None]) -> None:
    async def test() -> None:
        async with echoed() as (client, recorder, _):
            client.send(request(1, op="infer", inputs={"x": np.zeros(SIZE, np.uint8)}))
            client.send(request(2, op="infer", inputs={"n": 7}))
            await recorder.until(lambda r: isinstance(r.messages[-1], Result))
            (first,) = [m for m in recorder.messages if isinstance(m, Result)]
            assert first.stream == 2
            await recorder.until(lambda r: len(r.messages) == 3)

    run(test)


def test_a_blocking_client_sends_and_takes_large_messages() -> None:
    near, far = socket.socketpair()
    server = Connection(Role.SERVER, features=(FEATURE_BODY,))

    def serve() -> None:
        while not server.is_closed:
            count = far.recv_into(server.get_buffer())
            if not count:
                return
            for message in server.received(count, time.monotonic()):
                if isinstance(message, Request):
                    server.send(Result(stream=message.stream, outputs=message.inputs))
            for buffer in server.take_output():
                far.sendall(buffer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    transport = BlockingTransport(near, Connection(Role.CLIENT, features=(FEATURE_BODY,)))
    transport.wait_for_greeting()
    x = np.arange(SIZE // 8)
    mailbox = transport.open(lambda stream: request(stream, op="infer", inputs={"x": x}))
    answer = transport.receive(mailbox, time.monotonic() + PATIENCE_S)
    assert isinstance(answer, Result)
    np.testing.assert_array_equal(answer.outputs["x"], x)
    transport.close()
    thread.join(PATIENCE_S)
    far.close()
