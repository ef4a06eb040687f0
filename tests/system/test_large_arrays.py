"""Arrays beyond one frame: through gateway and worker and back, and nothing of them stays."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tensorwire import AsyncClient, Client, DeadlineExceeded, ErrorCode, TooLarge, WorkerLost
from tensorwire_protocol.bodies import FEATURE_BODY
from tensorwire_protocol.connection import Connection
from tensorwire_protocol.messages import Request
from tensorwire_protocol.roles import Role, State

from .serving import free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from .serving import Command, RunningServer

pytestmark = pytest.mark.slow
MIB = 1024 * 1024
# Around where a message is shared with the worker, and where it becomes a body.
SIZES = [65_000, 66_000, MIB - 300, MIB - 100, MIB, MIB + 1, 3 * MIB + 7, 20 * MIB]


def arrays(num_bytes: int, seed: int = 0) -> dict[str, Any]:
    chance = np.random.default_rng(seed)
    return {
        "x": chance.integers(0, 255, num_bytes, dtype=np.uint8),
        "text": "beside it",
        "y": np.arange(3.0),
        "z": chance.standard_normal((num_bytes // 64, 2)),
    }


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("size", SIZES)
def test_arrays_of_any_size_come_back_as_they_were(server: RunningServer, size: int) -> None:
    with server.client() as client:
        assert_same(client.infer("echo", arrays(size)), arrays(size))


def test_the_async_client_sends_and_takes_them_too(server: RunningServer) -> None:
    async def ask() -> None:
        async with AsyncClient(server.address) as client:
            answers = await asyncio.gather(
                *[client.infer("echo", arrays(size, size)) for size in SIZES]
            )
            for size, answer in zip(SIZES, answers, strict=True):
                assert_same(answer, arrays(size, size))

    asyncio.run(ask())


def test_many_threads_share_the_connection_for_large_requests(server: RunningServer) -> None:
    with server.client() as client, ThreadPoolExecutor(6) as pool:

        def ask(seed: int) -> None:
            assert_same(client.infer("echo", arrays(5 * MIB, seed)), arrays(5 * MIB, seed))
            assert client.infer("echo", {"n": np.int64(seed)})["n"] == seed

        list(pool.map(ask, range(12)))
        assert server.stats()["gateway"]["sessions"] == 3  # two of this client, one that watches


def test_an_answer_that_is_kept_keeps_no_memory_of_the_server(server: RunningServer) -> None:
    with server.client() as client:
        kept = client.infer("echo", arrays(4 * MIB))
        wait_until(lambda: server.stats()["gateway"]["body_bytes"] == 0, "all memory is free")
        assert_same(kept, arrays(4 * MIB))


def test_a_remote_worker_gets_them_over_the_connection(
    serve: Callable[..., RunningServer], launch: Callable[..., Command]
) -> None:
    where = f"127.0.0.1:{free_port()}"
    launch("worker", "echo:", "--listen", where).wait_ready()
    server = serve("--remote", where).ready()
    baseline = server.held()
    with server.client() as client:
        for size in SIZES:
            assert_same(client.infer("echo", arrays(size)), arrays(size))
    server.assert_back_at(baseline)


# -- limits ---------------------------------------------------------------------------------------


def test_requests_wait_for_memory_and_all_get_it(serve: Callable[..., RunningServer]) -> None:
    memory = ("--set", "bodies.memory_bytes=8388608", "--set", "bodies.message_bytes=8000000")
    server = serve("echo:", *memory).ready()
    baseline = server.held()
    clients = [server.client() for _ in range(6)]

    def ask(client: Client) -> None:
        with client:
            x = np.full(5 * MIB, id(client) % 251, np.uint8)
            for _ in range(3):
                np.testing.assert_array_equal(client.infer("echo", {"x": x})["x"], x)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, clients))
    server.assert_back_at(baseline)


def test_a_request_above_the_limit_is_refused_before_it_is_sent(
    serve: Callable[..., RunningServer],
) -> None:
    server = serve("echo:", "--set", "bodies.message_bytes=3000000").ready()
    with server.client() as client:
        with pytest.raises(TooLarge, match="3000001 bytes; the peer accepts 3000000"):
            client.infer("echo", {"x": np.zeros(3_000_001, np.uint8)})
        client.infer("echo", {"x": np.zeros(3_000_000, np.uint8)})


def test_the_limit_of_a_meta_is_what_the_server_was_told(
    serve: Callable[..., RunningServer],
) -> None:
    many = {f"name {i}": i for i in range(2000)}  # 27 bytes of meta for each
    for words, fits in (((), False), (("--set", "admission.meta_bytes=65536"), True)):
        with serve("echo:", *words).ready().client() as client:
            client.health()  # from here on it is known what the server takes
            if fits:
                assert client.infer("echo", many) == many
            else:
                with pytest.raises(TooLarge, match="the peer accepts 16384"):
                    client.infer("echo", many)


# -- ends -----------------------------------------------------------------------------------------


def upload(server: RunningServer, num_bytes: int) -> socket.socket:
    """Return a connection on which the beginning of a large request was sent."""
    connection = Connection(Role.CLIENT, features=(FEATURE_BODY,))
    host, port = server.address.split(":")
    sock = socket.create_connection((host, int(port)))
    sock.sendall(b"".join(connection.take_output()))
    while connection.state is not State.OPEN:
        count = sock.recv_into(connection.get_buffer())
        connection.received(count, 0.0)
    inputs = {"x": np.zeros(num_bytes, np.uint8)}
    connection.send(Request(stream=1, op="infer", key=os.urandom(16), model="echo", inputs=inputs))
    sock.sendall(b"".join(connection.take_output()))
    return sock


def test_a_client_that_leaves_in_the_middle_leaves_nothing(server: RunningServer) -> None:
    baseline = server.held()
    with upload(server, 30 * MIB):
        wait_until(lambda: server.stats()["gateway"]["body_bytes"] == 30 * MIB, "memory is taken")
    server.assert_back_at(baseline)


def test_small_requests_are_answered_while_a_large_one_stands_still(server: RunningServer) -> None:
    with upload(server, 30 * MIB), server.client(5.0) as client:
        for n in range(20):
            assert client.infer("echo", {"n": np.int64(n)})["n"] == n


def test_a_deadline_ends_a_large_request(serve: Callable[..., RunningServer]) -> None:
    server = serve("echo:service_ms=3000", "--set", "admission.stop_grace_s=0.1").ready()
    baseline = server.held()
    with server.client() as client, pytest.raises(DeadlineExceeded):
        client.infer("echo", arrays(4 * MIB), timeout=0.7)
    server.assert_back_at(baseline)


def test_a_worker_that_is_killed_gives_all_its_memory_back(
    serve: Callable[..., RunningServer],
) -> None:
    server = serve("echo:").ready()
    (pid,) = server.worker_pids().values()
    os.kill(pid, signal.SIGSTOP)  # whatever is sent to it stays with it
    errors: list[WorkerLost] = []

    def ask() -> None:
        with Client(server.address, max_attempts=1) as client:
            try:
                client.infer("echo", arrays(6 * MIB))
            except WorkerLost as error:
                errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: server.stats()["gateway"]["live_requests"] == 3, "all have arrived")
    assert server.stats()["gateway"]["body_bytes"] > 18 * MIB
    os.kill(pid, signal.SIGKILL)
    for thread in threads:
        thread.join(20.0)
    assert [error.code for error in errors] == [ErrorCode.WORKER_LOST] * 3
    wait_until(lambda: server.stats()["gateway"]["body_bytes"] == 0, "all memory is free")
