"""Client, gateway and worker on one event loop, without sockets: what a request costs in Python.

Everything is real but the wires between them, which hold bytes until they are carried over. So a
turn of the loop does one thing, and its CPU time is that of our code and nobody else's.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from tensorwire import AsyncClient
from tensorwire.address import parse_address
from tensorwire.aio_lane import Lane
from tensorwire_protocol.limits import CLIENT_LINK
from tensorwire_protocol.messages import Heartbeat
from tensorwire_server.config import AdmissionConfig
from tensorwire_server.gateway.gateway import Gateway
from tensorwire_server.routing.pool import ModelPool
from tensorwire_server.routing.replica import Replica
from tensorwire_server.workers.arrays import InlineArrays
from tensorwire_server.workers.echo import EchoEngine
from tensorwire_server.workers.link import Link
from tensorwire_server.workers.service import Service
from tensorwire_server.workers.spec import WorkerSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tensorwire_protocol.transports.aio import AioTransport

_ADDRESS = "127.0.0.1:1"
_TURNS = 3  # of the loop, until what it was told has left as bytes


class _Wire(asyncio.Transport):
    """Holds what one end has written."""

    def __init__(self) -> None:
        super().__init__()
        self._held: list[bytes | bytearray | memoryview] = []

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self._held.append(bytes(data))

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview[Any]]) -> None:
        self._held += map(bytes, list_of_data)

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """There is no buffer."""

    def is_closing(self) -> bool:
        return False

    def carry_to(self, end: AioTransport) -> None:
        """Let the other end receive what is held."""
        data, self._held = memoryview(b"".join(self._held)), []
        while len(data):
            buffer = end.get_buffer(-1)
            part = data[: len(buffer)]
            buffer[: len(part)] = part
            end.buffer_updated(len(part))
            data = data[len(part) :]


def _plugged(transport: AioTransport) -> _Wire:
    wire = _Wire()
    transport.connection_made(wire)
    return wire


class OneProcess:
    """An `echo` model behind a gateway, and a client in front of it."""

    def __init__(self) -> None:
        worker, pool = Service(WorkerSpec(model="echo", source="echo:")), ModelPool("echo")
        gateway = Gateway(AdmissionConfig(), CLIENT_LINK, {"echo": pool}, "one process")
        replica = Replica(
            "echo/0", model="echo", on_change=lambda r: gateway.on_replica_change(r, pool)
        )
        pool.replicas.append(replica)
        spec = WorkerSpec(model="echo", source="echo:")
        worker.start(InlineArrays(EchoEngine(), spec, take=worker.answers.on_batch))
        self._link = Link(worker, on_greeted=lambda _: None, on_lost=lambda _: None)
        self._lane = Lane(parse_address(_ADDRESS), None)
        self._gateway = gateway
        self.client = AsyncClient(_ADDRESS)
        self.client._link.pool.lanes.append(self._lane)
        session = gateway.open_session().transport
        dispatcher = replica.build_transport()
        ends = [self._lane.transport, session, dispatcher, self._link.transport]
        wires = [_plugged(end) for end in ends]
        # From whom to whom, in the order in which a request and its answer go.
        self._ways = [
            (wires[0], session),
            (wires[2], self._link.transport),
            (wires[3], dispatcher),
            (wires[1], self._lane.transport),
        ]

    async def start(self) -> None:
        """Greet, and say that the model is ready."""
        for _ in self._ways:
            await self.carry()
        self._link.send(Heartbeat(state="ready", card={"model": "echo", "tasks": ["infer"]}))
        await self.carry()

    async def carry(self) -> None:
        """Carry what is on the wires once around."""
        for wire, end in self._ways:
            wire.carry_to(end)
            for _ in range(_TURNS):
                await asyncio.sleep(0)

    async def ask(self, inputs: Mapping[str, Any], num_requests: int) -> float:
        """Have so many requests answered at once; return the CPU seconds it took."""
        began = time.thread_time()
        tasks = [
            asyncio.ensure_future(self.client.infer("echo", inputs)) for _ in range(num_requests)
        ]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await self.carry()
        answers = [task.result() for task in tasks]
        took_s = time.thread_time() - began
        assert len(answers) == num_requests
        return took_s
