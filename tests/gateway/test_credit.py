"""A client that counts the events it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tensorwire_protocol.limits import Limits
from tensorwire_protocol.messages import EventBatch, Finish

from .fake_worker import words
from .house import house, new_key
from .loops import pass_time

if TYPE_CHECKING:
    from .conftest import Run
    from .fake_worker import FakeWorker


async def steps(worker: FakeWorker, stream: int, tokens: range) -> None:
    """Make tokens one by one, each in a turn of its own."""
    for token in tokens:
        worker.step({stream: [token]})
        await pass_time()


def test_out_of_credit_a_stream_s_tokens_merge_into_one_later_event(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(), await opened.connect(has_credit=True)
            stream = client.ask(credit=2)
            await pass_time()
            await steps(worker, 1, range(10))
            assert [list(e.tokens) for e in client.events(stream)] == [[0], [1]]
            client.allow(stream, 1)
            await pass_time()
            *_, merged = client.events(stream)
            assert (merged.index, list(merged.tokens)) == (2, [*range(2, 10)])
            assert merged.text == words(range(2, 10))
            await steps(worker, 1, range(10, 12))
            assert len(client.events(stream)) == 3
            worker.end(1)
            end = await client.ended(stream)
            assert end.count == 12
            assert client.tokens(stream) == [*range(12)]
            assert end.timings["write_stall_ms"] > 0

    run_fast(test)


def test_a_stream_without_credit_gets_what_it_made_with_its_end(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(), await opened.connect(has_credit=True)
            stream = client.ask(credit=0)
            await pass_time()
            await steps(worker, 1, range(5))
            assert client.events(stream) == []
            worker.end(1)
            assert (await client.ended(stream)).finish is Finish.STOP
            assert [list(e.tokens) for e in client.events(stream)] == [[*range(5)]]

    run_fast(test)


def test_a_stream_out_of_credit_holds_up_nobody_else(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(), await opened.connect(has_credit=True)
            starved, free, rich = client.ask(credit=0), client.ask(), client.ask(credit=100)
            await pass_time()
            for token in range(6):
                worker.step({1: [token], 2: [token], 3: [token]})
                await pass_time()
            assert client.tokens(free) == client.tokens(rich) == [*range(6)]
            assert client.tokens(starved) == []
            # What leaves in one turn still leaves in one frame.
            assert all(isinstance(frame, EventBatch) for frame in client.frames)
            assert len(client.frames) == 6
            for stream in (1, 2, 3):
                worker.end(stream)
            await client.ended(starved)
            assert client.tokens(starved) == [*range(6)]

    run_fast(test)


def test_credit_without_the_feature_changes_nothing(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(), await opened.connect()
            stream = client.ask(credit=0)
            await pass_time()
            await steps(worker, 1, range(3))
            assert len(client.events(stream)) == 3
            worker.end(1)
            await client.ended(stream)

    run_fast(test)


def test_credit_for_a_stream_without_a_limit_sets_none(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(), await opened.connect(has_credit=True)
            stream = client.ask()
            await pass_time()
            client.allow(stream, 1)
            client.allow(stream + 7, 1)
            await pass_time()
            await steps(worker, 1, range(4))
            assert len(client.events(stream)) == 4
            worker.end(1)
            await client.ended(stream)

    run_fast(test)


def test_an_event_that_must_be_cut_takes_credit_for_each_piece(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker = await opened.add_worker()
            client = await opened.connect(Limits(server_meta_bytes=4096), has_credit=True)
            stream = client.ask(credit=0)
            await pass_time()
            worker.step({1: list(range(600))}, text="x")
            await pass_time()
            client.allow(stream, 2)
            await pass_time()
            assert [len(e.tokens) for e in client.events(stream)] == [169, 169]
            client.allow(stream, 1)
            await pass_time()
            assert client.tokens(stream) == [*range(507)]
            worker.end(1)
            await client.ended(stream)
            assert client.tokens(stream) == [*range(600)]
            assert client.text(stream) == "x"

    run_fast(test)


@pytest.mark.parametrize("again", ["resume", "request"])
def test_whoever_comes_back_counts_anew(run_fast: Run, again: str) -> None:
    async def test() -> None:
        async with house() as opened:
            worker = await opened.add_worker()
            first = await opened.connect(can_resume=True, has_credit=True)
            key = new_key()
            first.ask(key=key, credit=1)
            await pass_time()
            await steps(worker, 1, range(4))
            first.cut()
            second = await opened.connect(can_resume=True, has_credit=True)
            if again == "resume":
                stream, have = second.resume(key, 1, len(words([0])), credit=0), 1
            else:
                stream, have = second.ask(key=key, credit=0), 0
            await pass_time()
            assert second.events(stream) == []
            second.allow(stream, 1)
            await pass_time()
            (event,) = second.events(stream)
            assert (event.index, list(event.tokens)) == (have, [*range(have, 4)])
            await steps(worker, 1, range(4, 6))
            worker.end(1)
            await second.ended(stream)
            assert second.tokens(stream) == [*range(have, 6)]

    run_fast(test)


def test_what_waits_for_credit_is_bounded(run_fast: Run) -> None:
    async def test() -> None:
        limits = Limits(send_hard_bytes=64 * 1024)
        async with house(limits=limits) as opened:
            worker, client = await opened.add_worker(), await opened.connect(has_credit=True)
            client.ask(credit=0)
            await pass_time()
            worker.step({1: [1]}, text="x" * 60_000)
            await pass_time()
            assert not client.lost
            worker.step({1: [2]}, text="x" * 6_000)
            await pass_time()
            assert client.lost
            assert not opened.gateway.sessions
            worker.end(1, Finish.CANCELLED)
            await pass_time()

    run_fast(test)
