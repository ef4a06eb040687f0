from __future__ import annotations

import asyncio
import contextlib
import socket
from functools import partial
from typing import TYPE_CHECKING

import pytest
from gateway.fake_worker import FakeWorker
from gateway.loops import FakeClockLoop, run_on
from tensorwire_server.models.lifecycle import ModelState
from tensorwire_server.routing.remote import RemoteAddressError, keep_connected, parse_address
from tensorwire_server.routing.replica import Replica

if TYPE_CHECKING:
    from collections.abc import Callable

run = partial(run_on, asyncio.SelectorEventLoop)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("host:1", ("host", 1)),
        ("127.0.0.1:65535", ("127.0.0.1", 65535)),
        ("[::1]:8948", ("::1", 8948)),
        ("a-b.example.org:80", ("a-b.example.org", 80)),
    ],
)
def test_an_address_is_a_host_and_a_port(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    ["", "host", ":80", "host:", "host:0", "host:65536", "host:-1", "host:8o", "[::1]", "[]:80"],
)
def test_everything_else_is_refused_with_what_was_found(text: str) -> None:
    with pytest.raises(RemoteAddressError, match="HOST:PORT, not") as error:
        parse_address(text)
    assert repr(text) in str(error.value)


class Watched:
    """A replica whose changes can be waited for."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self.replica = Replica("far", on_change=lambda _: self._changed.set())

    async def until(self, condition: Callable[[Replica], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition(self.replica):
                self._changed.clear()
                await self._changed.wait()


def test_a_remote_worker_is_connected_and_connected_again_when_it_is_lost() -> None:
    async def test() -> None:
        watched, workers = Watched(), asyncio.Queue[FakeWorker]()

        def accept() -> asyncio.BaseProtocol:
            worker = FakeWorker()
            workers.put_nowait(worker)
            return worker.transport

        loop = asyncio.get_running_loop()
        server = await loop.create_server(accept, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        keeping = asyncio.ensure_future(keep_connected(watched.replica, "127.0.0.1", port))
        for _ in range(2):
            async with asyncio.timeout(5):
                worker = await workers.get()
            await worker.until(lambda w: w.transport.connection.peer_software)
            worker.beat("ready")
            await watched.until(lambda replica: replica.is_ready)
            worker.die()
            await watched.until(lambda replica: not replica.is_ready)
            assert watched.replica.state is ModelState.LOADING
        keeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeping
        server.close()

    run(test)


def test_a_remote_worker_that_is_not_there_is_said_to_be_missing() -> None:
    async def test() -> None:
        watched = Watched()
        with socket.socket() as taken:  # bound, but nobody listens
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            keeping = asyncio.ensure_future(keep_connected(watched.replica, "127.0.0.1", port))
            expected = f"no worker answers at 127.0.0.1:{port}"
            await watched.until(lambda replica: replica.detail == expected)
            assert watched.replica.state is ModelState.LOADING
            keeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeping

    run(test)


def test_what_is_no_worker_is_named_so_and_not_asked_again_at_once() -> None:
    class Silent(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            connected.append(transport)

    connected: list[asyncio.BaseTransport] = []

    async def test() -> None:
        replica = Replica("far", on_change=lambda _: None)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Silent, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        keeping = asyncio.ensure_future(keep_connected(replica, "127.0.0.1", port))
        await asyncio.sleep(60)  # of the fake clock
        assert replica.detail == f"what answers at 127.0.0.1:{port} is no worker"
        # Five seconds of patience for each, and growing pauses between them.
        assert 3 <= len(connected) <= 10
        keeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeping
        server.close()

    run_on(FakeClockLoop, test)
