"""Large requests through a whole gateway: from socket to slab to worker to socket, and no copy."""

from __future__ import annotations

import asyncio
import socket
import tracemalloc
from typing import TYPE_CHECKING

import numpy as np
from tensorwire_protocol.bodies import FEATURE_BODY, FEATURE_SHM
from tensorwire_protocol.codec import encode
from tensorwire_protocol.connection import Connection
from tensorwire_protocol.frames import (
    DATA_BYTES,
    HEADER,
    HEADER_BYTES,
    PREFACE,
    SCRATCH_BYTES,
    Flag,
    build_body,
)
from tensorwire_protocol.limits import CLIENT_LINK
from tensorwire_protocol.messages import Data, Hello, Kind, Request
from tensorwire_protocol.roles import Role
from tensorwire_protocol.transports.aio import AioTransport
from tensorwire_server.memory.intake import IntakeMemory
from tensorwire_server.memory.sharing import GATEWAY, Sharing
from tensorwire_server.memory.slab import Borrowed, Slab, make_shared

from .fake_worker import FakeWorker, echo
from .house import House, house, new_key

if TYPE_CHECKING:
    from typing import Any

    from tensorwire_protocol.messages import Submit

    from .conftest import Run

MIB = 1024 * 1024
SIZE = 32 * MIB
FEATURES = (FEATURE_BODY, FEATURE_SHM)


class Memories:
    """What the gateway gives out, and what the worker does."""

    def __init__(self) -> None:
        asked, answered = make_shared(2 * SIZE), make_shared(2 * SIZE)
        self.asked, self.answered = Slab(asked), Slab(answered)
        self.gateway_end = Sharing(self.asked, Borrowed(self.answered.fd), is_gateway=True)
        self.worker_end = Sharing(self.answered, Borrowed(self.asked.fd), is_gateway=False)


async def share(opened: House, memories: Memories, worker: FakeWorker) -> None:
    """Put a worker behind the gateway that sees its memory."""
    opened.gateway.bodies = IntakeMemory(memories.asked)
    connection = Connection(Role.WORKER, features=FEATURES, sharing=memories.worker_end)
    worker.transport = AioTransport(connection, worker)
    opened.workers.append(worker)
    replica, loop = opened.add_replica(), asyncio.get_running_loop()
    near, far = socket.socketpair()
    await loop.create_unix_connection(lambda: worker.transport, sock=far)
    transport = replica.build_transport(None, memories.gateway_end)
    await loop.create_unix_connection(lambda: transport, sock=near)
    await worker.until(lambda w: w.transport.connection.peer_software)
    worker.beat("ready", model="m")


def asked(x: np.ndarray[Any, Any]) -> bytes:
    """Return all that a client says to have an array echoed."""
    request = Request(stream=1, op="infer", key=new_key(), model="m", inputs={"x": x})
    head, (segment,) = build_body(encode(request, CLIENT_LINK))
    said = [PREFACE, *encode(Hello(features=(FEATURE_BODY,)), CLIENT_LINK), head]
    for at in range(0, len(segment), DATA_BYTES):
        part = segment[at : at + DATA_BYTES]
        is_last = at + DATA_BYTES >= len(segment)
        said += encode(Data(stream=1, segment=0, payload=part, last=is_last), CLIENT_LINK)
    return b"".join(said)


def talk(sock: socket.socket, said: memoryview, answer: memoryview) -> None:
    """Say it, and put the body of the answer where it belongs; makes no memory."""
    sock.sendall(said)
    header, at, is_last = bytearray(HEADER_BYTES), 0, False
    while not is_last:
        fill(sock, memoryview(header))
        body_bytes, kind, flags, *_ = HEADER.unpack(header)
        assert kind != Kind.ERR
        fill(sock, answer[at : at + body_bytes])
        if kind == Kind.DATA:
            at += body_bytes
            is_last = bool(flags & Flag.END)


def fill(sock: socket.socket, room: memoryview) -> None:
    while len(room):
        num_bytes = sock.recv_into(room)
        assert num_bytes
        room = room[num_bytes:]


def test_a_large_request_and_its_answer_are_not_copied_in_the_gateway(run: Run) -> None:
    x = np.arange(SIZE // 8)
    said, answer = memoryview(asked(x)), memoryview(bytearray(SIZE))

    async def test() -> None:
        memories = Memories()
        in_slab: list[bool] = []

        def locate_and_echo(worker: FakeWorker, submit: Submit) -> None:
            seen = memories.worker_end._memories[GATEWAY]
            in_slab.append(seen.locate(submit.inputs["x"].data.cast("B")) is not None)
            echo(worker, submit)

        async with house() as opened:
            await share(opened, memories, FakeWorker(locate_and_echo))
            session, loop = opened.gateway.open_session(), asyncio.get_running_loop()
            near, far = socket.socketpair()
            await loop.create_unix_connection(lambda: session.transport, sock=near)
            decoder = session.transport.connection._decoder
            tracemalloc.start()
            try:
                await asyncio.to_thread(talk, far, said, answer)
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
                far.close()
            assert (
                0 < decoder.num_copied_bytes <= SCRATCH_BYTES
            )  # what came in one read with the head
            # The standard loop copies what the kernel did not take of a DATA frame.
            assert peak < 4 * DATA_BYTES
        assert in_slab == [True]  # and the worker read it there
        assert memories.answered.num_used_bytes == 0  # as the gateway did the answer
        assert answer == x.data.cast("B")

    run(test)
