"""Clients that do not read: their streams go on without them, within bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tensorwire_protocol.connection import FEATURE_RESUME
from tensorwire_protocol.errors import ErrorCode
from tensorwire_protocol.limits import Limits
from tensorwire_protocol.messages import Failure, Finish, changed
from tensorwire_server.config import AdmissionConfig, OutcomesConfig

from .house import House, house, new_key
from .loops import pass_time
from .test_session import BareClient, request

if TYPE_CHECKING:
    from .conftest import Run
    from .fake_worker import FakeWorker

NARROW = Limits(send_high_water_bytes=1024, send_hard_bytes=32 * 1024)


async def deaf_client(
    opened: House, worker: FakeWorker, num_streams: int = 1, **fields: Any
) -> tuple[BareClient, list[bytes]]:
    """Return a client that reads nothing any more, its session paused, and its requests' keys."""
    client = BareClient(*await opened.connect_socket())
    keys = [new_key() for _ in range(num_streams)]
    requests = [changed(request(i), key=key, **fields) for i, key in enumerate(keys, 1)]
    first = len(worker.submits) + 1
    client.greet(*requests, features=(FEATURE_RESUME,))
    await pass_time()
    while not client.session.transport.is_paused:
        worker.step({first: [1]}, text="x" * 256)
        await pass_time()
    return client, keys


async def check_resumed(opened: House, worker: FakeWorker, keys: list[bytes], first: int) -> None:
    """Resume all requests from their beginning: every token must come exactly once."""
    other = await opened.connect(can_resume=True)
    streams = [other.resume(key) for key in keys]
    await pass_time()
    for number, stream in enumerate(streams, first):
        worker.step({number: [77]})
        made = list(worker.tokens[number])
        worker.end(number)
        end = await other.ended(stream)
        assert other.tokens(stream) == made
        assert end.count == len(made)


def test_a_client_that_reads_nothing_for_long_is_told_and_its_streams_go_on(
    run_fast: Run,
) -> None:
    async def test() -> None:
        async with house(limits=NARROW) as opened:
            worker = await opened.add_worker()
            client, keys = await deaf_client(opened, worker, 3)
            await pass_time(8.0)
            assert opened.gateway.sessions
            await pass_time(4.0)
            assert not opened.gateway.sessions
            opened.check_books(num_live=3)
            worker.step({1: [5], 2: [6], 3: [7]})
            await pass_time()
            await client.read_all()
            failure = client.messages[-1]
            assert isinstance(failure, Failure)
            assert (failure.stream, failure.code) == (0, ErrorCode.SLOW_CONSUMER)
            assert worker.cancels == []
            await check_resumed(opened, worker, keys, 1)
            client.close()

    run_fast(test)


def test_a_client_that_reads_before_its_time_is_over_keeps_its_connection(run_fast: Run) -> None:
    async def test() -> None:
        async with house(limits=NARROW) as opened:
            worker = await opened.add_worker()
            client, _ = await deaf_client(opened, worker)
            for _ in range(3):
                await pass_time(8.0)
                await client.read_all()
                while not client.session.transport.is_paused:
                    worker.step({1: [1]}, text="x" * 256)
                    await pass_time()
            await client.read_all()
            made = list(worker.tokens[1])
            worker.end(1)
            await pass_time()
            await client.read_all()
            assert client.tokens(1) == made
            client.close()

    run_fast(test)


def test_at_the_hard_limit_the_streams_are_detached_at_once(run_fast: Run) -> None:
    async def test() -> None:
        async with house(limits=NARROW) as opened:
            worker = await opened.add_worker()
            client, keys = await deaf_client(opened, worker, 2)
            while opened.gateway.sessions:
                held = opened.gateway.merged.num_bytes + client.session.transport.unsent_bytes
                assert held <= NARROW.send_hard_bytes
                worker.step({2: [3] * 100})
                await pass_time()
            assert opened.gateway.merged.num_bytes == 0
            assert len(worker.tokens[2]) > 2000
            opened.check_books(num_live=2)
            await check_resumed(opened, worker, keys, 1)
            client.close()

    run_fast(test)


def test_where_resume_is_unknown_a_slow_client_s_streams_are_stopped(run_fast: Run) -> None:
    async def test() -> None:
        async with house(limits=NARROW) as opened:
            worker = await opened.add_worker()
            client = BareClient(*await opened.connect_socket())
            client.greet(request(1))
            await pass_time()
            while opened.gateway.sessions:
                worker.step({1: [3] * 100})
                await pass_time()
            assert [cancel.stream for cancel in worker.cancels] == [1]
            worker.end(1, Finish.CANCELLED)
            client.close()
            await pass_time()

    run_fast(test)


def test_the_end_says_how_long_an_earlier_connection_did_not_read(run_fast: Run) -> None:
    async def test() -> None:
        async with house(limits=NARROW) as opened:
            worker = await opened.add_worker()
            client, keys = await deaf_client(opened, worker)
            worker.step({1: [1]})
            await pass_time(12.0)
            assert not opened.gateway.sessions
            other = await opened.connect(can_resume=True)
            stream = other.resume(keys[0])
            await pass_time(1.0)
            worker.end(1)
            end = await other.ended(stream)
            assert end.timings["write_stall_ms"] == pytest.approx(10_500, abs=600)
            client.close()

    run_fast(test)


# -- over all connections --------------------------------------------------------------------------


def test_what_all_clients_leave_merged_is_bounded_and_the_largest_goes_first(
    run_fast: Run,
) -> None:
    async def test() -> None:
        admission = AdmissionConfig(merged_bytes=20_000)
        async with house(admission, limits=NARROW) as opened:
            worker = await opened.add_worker()
            small, small_keys = await deaf_client(opened, worker)
            large, _ = await deaf_client(opened, worker)
            healthy = await opened.connect()
            stream = healthy.ask()
            await pass_time()
            worker.step({1: [1] * 500, 2: [2] * 1000, 3: [3]})
            await pass_time()
            assert len(opened.gateway.sessions) == 3
            worker.step({1: [1] * 1200})
            await pass_time()
            assert small.session not in opened.gateway.sessions
            assert len(opened.gateway.sessions) == 2
            assert opened.gateway.merged.num_bytes == 10_000
            opened.check_books(num_live=3)
            await check_resumed(opened, worker, small_keys, 1)
            await large.read_all()
            made = list(worker.tokens[2])
            worker.end(2)
            await pass_time()
            await large.read_all()
            assert large.tokens(1) == made
            worker.end(3)
            await healthy.ended(stream)
            assert healthy.tokens(stream) == [3]
            for client in (small, large):
                client.close()

    run_fast(test)


def test_what_runs_without_readers_keeps_is_bounded_and_the_largest_goes_first(
    run_fast: Run,
) -> None:
    async def test() -> None:
        outcomes = OutcomesConfig(detached_bytes=10_000)
        async with house(outcomes=outcomes) as opened:
            worker = await opened.add_worker()
            client = await opened.connect(can_resume=True)
            keys = [new_key() for _ in range(3)]
            for key in keys:
                client.ask(key=key)
            await pass_time()
            worker.step({1: [1] * 50, 2: [2] * 100, 3: [3] * 10})
            await pass_time()
            client.cut()
            await pass_time()
            opened.check_books(num_live=3)
            worker.step({3: [3] * 30})
            await pass_time()
            assert worker.cancels == []
            worker.step({1: [1] * 60})
            await pass_time()
            assert [cancel.stream for cancel in worker.cancels] == [1]
            opened.check_books(num_live=3)
            other = await opened.connect(can_resume=True)
            gone = await other.failed(other.resume(keys[0]))
            assert gone.code == ErrorCode.UNKNOWN_KEY
            worker.end(1, Finish.CANCELLED)
            for number in (2, 3):
                stream = other.resume(keys[number - 1])
                await pass_time()
                made = list(worker.tokens[number])
                worker.end(number)
                await other.ended(stream)
                assert other.tokens(stream) == made
            assert opened.gateway.detached.num_bytes == 0

    run_fast(test)
