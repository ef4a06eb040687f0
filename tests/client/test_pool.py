"""Connections: one until it is full, then another, and no call that the server would refuse."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from tensorwire import AsyncClient, Busy, Client, ConnectionLost, DeadlineExceeded
from tensorwire_protocol.limits import Limits

from .fake_server import FakeServer, oracle_tokens
from .test_aio import until

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

STREAMS = 4


@pytest.fixture
def narrow() -> Iterator[FakeServer]:
    """A server that takes four streams on a connection."""
    with FakeServer(Limits(streams=STREAMS)) as running:
        yield running


def with_client(
    server: FakeServer,
    test: Callable[[AsyncClient], Coroutine[Any, Any, None]],
    **options: Any,
) -> None:
    """Run a test with a client that knows what the server takes."""

    async def main() -> None:
        async with AsyncClient(server.address, **options) as client:
            await client.health()
            await test(client)

    asyncio.run(main())


def begin(client: AsyncClient, count: int, model: str = "endless") -> list[asyncio.Task[Any]]:
    """Begin so many calls."""
    return [asyncio.create_task(client.generate(model, str(i))) for i in range(count)]


# -- asyncio -------------------------------------------------------------------------------------


def test_a_full_connection_is_followed_by_another(narrow: FakeServer) -> None:
    async def test(client: AsyncClient) -> None:
        begin(client, STREAMS)
        await until(lambda: narrow.open_runs == STREAMS)
        assert narrow.num_connections == 1
        begin(client, STREAMS)
        await until(lambda: narrow.open_runs == 2 * STREAMS)
        assert narrow.num_connections == 2

    with_client(narrow, test)


def test_any_number_of_calls_is_answered_and_none_refused(narrow: FakeServer) -> None:
    count = 40 * STREAMS

    async def test(client: AsyncClient) -> None:
        made = await asyncio.gather(*begin(client, count, "oracle"))
        assert [one.token_ids for one in made] == [oracle_tokens(str(i)) for i in range(count)]

    with_client(narrow, test, max_connections=2, max_attempts=1)
    assert narrow.num_connections == 2
    assert len(narrow.requests) == count + 1  # each was sent once: it had waited for its place


def test_calls_that_wait_for_a_place_go_in_the_order_of_their_coming(narrow: FakeServer) -> None:
    async def test(client: AsyncClient) -> None:
        first = begin(client, STREAMS)
        await until(lambda: narrow.open_runs == STREAMS)
        later = begin(client, 3 * STREAMS, "oracle")
        await asyncio.sleep(0)
        assert len(narrow.requests) == STREAMS + 1
        first[0].cancel()  # from now on one at a time may run
        await asyncio.gather(*later)

    with_client(narrow, test, max_connections=1)
    prompts = [request.inputs["prompt"] for request in narrow.requests[STREAMS + 1 :]]
    assert prompts == [str(i) for i in range(3 * STREAMS)]


def test_nobody_overtakes_who_waits(narrow: FakeServer) -> None:
    async def test(client: AsyncClient) -> None:
        begin(client, STREAMS - 1)
        await until(lambda: narrow.open_runs == STREAMS - 1)
        order = []

        async def ask(name: str, times: int) -> None:
            for _ in range(times):
                await client.generate("oracle", name, max_new_tokens=1)
                order.append(name)

        await asyncio.gather(ask("greedy", 5), ask("a", 1), ask("b", 1))
        assert order[:3] == ["greedy", "a", "b"]

    with_client(narrow, test, max_connections=1)


def test_who_waits_for_a_place_waits_no_longer_than_its_timeout(narrow: FakeServer) -> None:
    async def test(client: AsyncClient) -> None:
        begin(client, STREAMS)
        await until(lambda: narrow.open_runs == STREAMS)
        with pytest.raises(DeadlineExceeded, match=r"no place on a connection within .* 0\.02 s"):
            await client.generate("oracle", "late", timeout=0.02)

    with_client(narrow, test, max_connections=1)
    assert len(narrow.requests) == STREAMS + 1


def test_a_place_that_its_call_does_not_take_goes_to_the_next(narrow: FakeServer) -> None:
    async def test(client: AsyncClient) -> None:
        first = begin(client, STREAMS, "silent")  # nothing comes that could wake anybody
        await until(lambda: narrow.open_runs == STREAMS)
        left, stays = begin(client, 2, "oracle")
        await asyncio.sleep(0)
        queue = client._link.pool._queue
        (place, _) = queue
        first[0].cancel()
        while place in queue:  # noqa: ASYNC110
            await asyncio.sleep(0)
        left.cancel()  # it was called, and has not yet heard of it
        assert (await stays).token_ids == oracle_tokens("1")
        assert left.cancelled()

    with_client(narrow, test, max_connections=1)


def test_a_lost_connection_makes_room_for_another(narrow: FakeServer) -> None:
    async def test(client: AsyncClient) -> None:
        first = begin(client, STREAMS)
        await until(lambda: narrow.open_runs == STREAMS)
        waits = begin(client, 1, "oracle")
        await asyncio.sleep(0)
        (lost_one,) = narrow.sessions
        await asyncio.to_thread(narrow.do, lost_one.abort)
        assert (await waits[0]).token_ids == oracle_tokens("0")
        lost = await asyncio.gather(*first, return_exceptions=True)
        assert {type(error) for error in lost} == {ConnectionLost}

    with_client(narrow, test, max_connections=1, max_attempts=1)


def test_a_farewell_makes_room_on_another_connection(narrow: FakeServer) -> None:
    async def test(client: AsyncClient) -> None:
        begin(client, STREAMS)
        await until(lambda: narrow.open_runs == STREAMS)
        waits = begin(client, 1, "oracle")
        await asyncio.sleep(0)
        await asyncio.to_thread(narrow.say_goaway)
        assert (await waits[0]).token_ids == oracle_tokens("0")

    with_client(narrow, test, max_connections=1)
    assert narrow.num_connections == 2


def test_close_ends_who_waits_for_a_place(narrow: FakeServer) -> None:
    async def test(client: AsyncClient) -> None:
        begin(client, STREAMS)
        await until(lambda: narrow.open_runs == STREAMS)
        (waits,) = begin(client, 1)
        await asyncio.sleep(0)
        await client.close()
        with pytest.raises(Exception, match="closed"):
            await waits

    with_client(narrow, test, max_connections=1)


# -- threads -------------------------------------------------------------------------------------


def test_streams_of_one_thread_spread_over_connections(narrow: FakeServer) -> None:
    with Client(narrow.address, max_connections=2) as client:
        client.health()
        streams = [client.stream("oracle", str(i)) for i in range(2 * STREAMS)]
        assert narrow.num_connections == 2
        for i, stream in enumerate(streams):
            assert [t for delta in stream for t in delta.token_ids] == oracle_tokens(str(i))
        assert client.health()["status"] == "ready"
        assert narrow.num_connections == 2


def test_where_all_connections_are_full_the_server_is_not_even_asked(narrow: FakeServer) -> None:
    with Client(narrow.address, max_connections=1, max_attempts=2) as client:
        client.health()
        streams = [client.stream("endless", str(i)) for i in range(STREAMS)]
        with pytest.raises(Busy, match="all 1 connections have as many calls"):
            client.health()
        assert len(narrow.requests) == STREAMS + 1
        streams[0].close()
        give_up = time.monotonic() + 10
        while client._link.pool.transports[0].connection.num_places == 0:
            assert time.monotonic() < give_up
            client._link.pool.transports[0].catch_up()
        assert client.health()["status"] == "ready"


def test_threads_that_come_at_once_do_not_overfill_a_connection(narrow: FakeServer) -> None:
    with Client(narrow.address, max_connections=8) as client, ThreadPoolExecutor(32) as pool:
        client.health()

        def ask(i: int) -> list[int]:
            return client.generate("oracle", str(i)).token_ids

        assert list(pool.map(ask, range(200))) == [oracle_tokens(str(i)) for i in range(200)]
    assert len(narrow.requests) == 201  # none was refused and sent again
