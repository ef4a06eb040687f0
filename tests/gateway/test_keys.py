"""Request keys: join, replay, resume, through a real gateway."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from tensorwire_protocol.auth import Principal, Right
from tensorwire_protocol.errors import Busy, ErrorCode, Executed, InternalError, WorkerLost
from tensorwire_protocol.messages import Failure, Finish
from tensorwire_protocol.tensors import ids_checksum
from tensorwire_server.config import OutcomesConfig

from .fake_worker import echo, words
from .house import Client, House, house, new_key
from .loops import FakeClockLoop, pass_time, run_on


async def streaming(opened: House) -> tuple[Client, bytes, int]:
    """Return a client whose stream has brought three tokens, its key, and its worker's stream."""
    worker = await opened.add_worker()
    client = await opened.connect(can_resume=True)
    key = new_key()
    client.ask(key=key)
    await pass_time()
    (stream,) = worker.tokens
    worker.ack(stream)
    worker.step({stream: [1, 2]})
    worker.step({stream: [3]})
    await pass_time()
    return client, key, stream


@pytest.mark.parametrize("num_have", range(4))
def test_resume_goes_on_behind_any_token(num_have: int) -> None:
    async def test() -> None:
        async with house() as opened:
            client, key, stream = await streaming(opened)
            client.cut()
            await pass_time()
            (worker,) = opened.workers
            worker.step({stream: [4]})  # while nobody reads
            await pass_time(4.9)
            opened.check_books(num_live=1)
            other = await opened.connect(can_resume=True)
            resumed = other.resume(key, num_have, len(words([1, 2, 3][:num_have])))
            await pass_time()
            worker.step({stream: [5]})
            worker.end(stream)
            end = await other.ended(resumed)
            assert other.tokens(resumed) == [1, 2, 3, 4, 5][num_have:]
            assert other.text(resumed) == words([1, 2, 3, 4, 5][num_have:])
            assert (end.count, end.checksum) == (5, ids_checksum([1, 2, 3, 4, 5]))
            assert [ack.prompt_tokens for ack in other.acks] == [2]
            assert worker.cancels == []

    run_on(FakeClockLoop, test)


def test_text_that_is_late_is_resumed_by_characters() -> None:
    async def test() -> None:
        async with house() as opened:
            client, key, stream = await streaming(opened)
            (worker,) = opened.workers
            worker.step({stream: []}, text="held back")
            client.cut()
            await pass_time()
            for has_chars, missing in ((6, "held back"), (10, " back"), (15, "")):
                other = await opened.connect(can_resume=True)
                resumed = other.resume(key, 3, has_chars)
                await pass_time()
                assert (other.tokens(resumed), other.text(resumed)) == ([], missing)
                other.cut()
                await pass_time()
            worker.end(stream)
            await pass_time()

    run_on(FakeClockLoop, test)


def test_the_same_request_joins_from_the_beginning_and_the_newest_reader_wins() -> None:
    async def test() -> None:
        async with house() as opened:
            client, key, stream = await streaming(opened)
            other = await opened.connect(can_resume=True)
            joined = other.ask(key=key)
            await pass_time()
            assert other.tokens(joined) == [1, 2, 3]
            # The old one is told; CANCELLED is no error that a client tries again.
            dismissed = await client.failed(1)
            assert (dismissed.code, dismissed.retryable) == (ErrorCode.CANCELLED, False)
            opened.check_books(num_live=1)
            client.cut()  # is no longer its reader
            await pass_time(6.0)
            (worker,) = opened.workers
            worker.step({stream: [4]})
            worker.end(stream)
            assert (await other.ended(joined)).count == 4
            assert len(worker.submits) == 1

    run_on(FakeClockLoop, test)


def test_log_probabilities_reach_the_client_and_are_kept_however_many_they_are() -> None:
    reports = {"token_logprobs": bytes(12), "top_ids": bytes(120_000), "top_logprobs": b""}

    async def test() -> None:
        async with house() as opened:
            client, key, stream = await streaming(opened)
            (worker,) = opened.workers
            extra = {"attempt": 1, "logprobs": reports, "prompt_logprobs": reports, "own": 5}
            worker.end(stream, extra=extra)
            end = await client.ended(1)
            # What else a worker says is for the gateway.
            assert end.extra == {"logprobs": reports, "prompt_logprobs": reports}
            again = client.ask(key=key)
            replayed = await client.ended(again)
            assert replayed.extra == end.extra
            resumed = client.resume(key, 3, len(words([1, 2, 3])))
            assert (await client.ended(resumed)).extra == end.extra
            assert len(worker.submits) == 1

    run_on(FakeClockLoop, test)


def test_what_has_ended_is_replayed_until_its_time_is_over() -> None:
    async def test() -> None:
        async with house(outcomes=OutcomesConfig(seconds=60)) as opened:
            client, key, stream = await streaming(opened)
            (worker,) = opened.workers
            worker.end(stream, Finish.LENGTH)
            first = await client.ended(1)
            for _ in range(2):
                stream = client.ask(key=key)
                end = await client.ended(stream)
                assert (client.tokens(stream), client.text(stream)) == ([1, 2, 3], "1 2 3 ")
                assert (end.finish, end.count, end.usage) == (first.finish, 3, first.usage)
            resumed = client.resume(key, 2, 4)
            await client.ended(resumed)
            assert (client.tokens(resumed), client.text(resumed)) == ([3], "3 ")
            assert len(worker.submits) == 1
            await pass_time(61.0)
            assert (await client.failed(client.resume(key))).code == ErrorCode.UNKNOWN_KEY
            assert opened.gateway.by_key.num_kept == 0

    run_on(FakeClockLoop, test)


@pytest.mark.parametrize("has_ended", [False, True])
def test_a_key_with_another_body_is_refused(has_ended: bool) -> None:
    async def test() -> None:
        async with house() as opened:
            client, key, stream = await streaming(opened)
            (worker,) = opened.workers
            if has_ended:
                worker.end(stream)
                await client.ended(1)
            for other in (
                {"inputs": {"prompt": "ho"}},
                {"params": {"seed": 1}},
                {"op": "tokenize"},
            ):
                failure = await client.failed(client.ask(key=key, **{"op": "generate"} | other))
                assert (failure.code, failure.executed) == (ErrorCode.KEY_REUSED, Executed.NO)
            if not has_ended:
                worker.end(stream)
                assert (await client.ended(1)).count == 3

    run_on(FakeClockLoop, test)


def test_urgency_is_no_part_of_the_body() -> None:
    async def test() -> None:
        async with house() as opened:
            client, key, stream = await streaming(opened)
            opened.workers[0].end(stream)
            await client.ended(1)
            again = client.ask(key=key, deadline_ms=50, priority=7, trace="t")
            assert (await client.ended(again)).finish is Finish.STOP

    run_on(FakeClockLoop, test)


@pytest.mark.parametrize(("index", "char"), [(4, 0), (0, 7)])
def test_a_client_cannot_have_more_than_was_made(index: int, char: int) -> None:
    async def test() -> None:
        async with house() as opened:
            client, key, stream = await streaming(opened)
            failure = await client.failed(client.resume(key, index, char))
            assert failure.code == ErrorCode.BAD_META
            opened.workers[0].end(stream)
            assert (await client.ended(1)).count == 3  # its reader was left in peace

    run_on(FakeClockLoop, test)


def test_nobody_comes_back_within_the_grace() -> None:
    async def test() -> None:
        async with house() as opened:
            client, key, stream = await streaming(opened)
            client.cut()
            await pass_time(5.1)
            (worker,) = opened.workers
            assert [c.stream for c in worker.cancels] == [stream]
            other = await opened.connect(can_resume=True)
            assert (await other.failed(other.resume(key, 3, 6))).code == ErrorCode.UNKNOWN_KEY
            # A client that has nothing of it yet may begin anew, though the old one is not over.
            again = other.ask(key=key)
            await pass_time()
            assert len(worker.submits) == 2
            worker.end(stream, Finish.CANCELLED)
            worker.end(next(iter(worker.tokens)))
            assert (await other.ended(again)).count == 0
            opened.check_books(num_live=0)

    run_on(FakeClockLoop, test)


@pytest.mark.parametrize("can_resume", [False, True])
def test_without_resume_or_grace_a_lost_client_cancels_at_once(can_resume: bool) -> None:
    async def test() -> None:
        outcomes = OutcomesConfig(resume_grace_s=0.0 if can_resume else 5.0)
        async with house(outcomes=outcomes) as opened:
            worker = await opened.add_worker()
            client = await opened.connect(can_resume=can_resume)
            client.ask()
            await pass_time()
            client.cut()
            await pass_time()
            assert len(worker.cancels) == 1

    run_on(FakeClockLoop, test)


@pytest.mark.parametrize("error", [Busy("full"), WorkerLost("gone"), InternalError("bad")])
def test_a_failure_is_kept_unless_a_retry_may_cure_it(error: Busy | WorkerLost) -> None:
    async def test() -> None:
        async with house() as opened:
            client, key, stream = await streaming(opened)
            (worker,) = opened.workers
            worker.fail(stream, error)
            assert (await client.failed(1)).code == error.code
            client.ask(key=key)
            await pass_time()
            assert len(worker.submits) == (2 if error.retryable else 1)
            for left in list(worker.tokens):
                worker.end(left)
            await pass_time()

    run_on(FakeClockLoop, test)


@pytest.mark.parametrize("num_floats", [4, 40_000])
def test_an_answer_is_replayed_if_it_is_small(num_floats: int) -> None:
    async def test() -> None:
        async with house() as opened:
            worker = await opened.add_worker(on_submit=echo)
            client = await opened.connect(can_resume=True)
            key, array = new_key(), np.arange(num_floats, dtype=np.float32)
            await client.answered(client.ask("infer", key=key, inputs={"x": array}))
            terminal = await client.terminal(client.ask("infer", key=key, inputs={"x": array}))
            if num_floats == 4:
                assert (terminal.outputs["x"] == array).all()  # type: ignore[union-attr]
            else:
                assert isinstance(terminal, Failure)
                assert terminal.code == ErrorCode.UNKNOWN_KEY
                assert terminal.executed is Executed.YES
            assert len(worker.submits) == 1

    run_on(FakeClockLoop, test)


def test_another_principal_finds_nothing() -> None:
    async def test() -> None:
        async with house() as opened:
            client, key, stream = await streaming(opened)
            other = await opened.connect(can_resume=True)
            (session,) = [s for s in opened.gateway.sessions if not s.num_live]
            eve = Principal(name="eve", rights=frozenset(Right))
            session.transport.connection.principal = eve
            assert (await other.failed(other.resume(key))).code == ErrorCode.UNKNOWN_KEY
            opened.workers[0].end(stream)
            await client.ended(1)

    run_on(FakeClockLoop, test)


def test_a_server_that_leaves_does_not_wait_for_who_cannot_come_back() -> None:
    async def test() -> None:
        async with house() as opened:
            client, _, stream = await streaming(opened)
            client.cut()
            await pass_time()
            began = opened.gateway.now()
            await opened.gateway.drain(100.0, asyncio.Event())
            assert opened.gateway.now() - began < 3.0
            assert [c.stream for c in opened.workers[0].cancels] == [stream]

    run_on(FakeClockLoop, test)
