"""What the gateway refuses, when it dispatches, and how it ends."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tensorwire_protocol.errors import ErrorCode, ModelError
from tensorwire_protocol.messages import Finish
from tensorwire_server.config import AdmissionConfig

from .fake_worker import echo, words
from .house import house
from .loops import pass_time

if TYPE_CHECKING:
    from tensorwire_protocol.messages import Submit

    from .conftest import Run
    from .fake_worker import FakeWorker


def test_a_unary_request_goes_to_a_worker_and_its_result_comes_back(run: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            await opened.add_worker(on_submit=echo)
            client = await opened.connect()
            array = np.arange(12, dtype=np.float32).reshape(3, 4)
            answer = await client.answered(client.ask("infer", inputs={"x": array}))
            assert np.array_equal(answer.outputs["x"], array)
            opened.check_books(num_live=0)
            assert opened.gateway.outcomes == {"ok": 1}

    run(test)


def test_a_stream_is_passed_on_token_by_token_and_ends_once(run: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(), await opened.connect()
            stream = client.ask()
            await worker.until(lambda w: w.submits)
            opened.check_books(num_live=1)
            worker.ack(1)
            for count, token in enumerate((5, 6, 7), start=1):
                worker.step({1: [token]})
                await client.until(lambda c, n=count: len(c.frames) == n)  # type: ignore[misc]
            worker.end(1, Finish.LENGTH)
            end = await client.ended(stream)
            assert (end.finish, end.count) == (Finish.LENGTH, 3)
            assert client.text(stream) == words([5, 6, 7])
            assert [ack.prompt_tokens for ack in client.acks] == [2]
            assert end.timings["queued_ms"] == 0.5
            assert opened.gateway.num_tokens == 3
            assert opened.gateway.outcomes == {"length": 1}

    run(test)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "code", "words_"),
    [
        ({"op": "dance"}, "UNKNOWN_OP", "there is no operation 'dance'"),
        ({"model": "other"}, "UNKNOWN_MODEL", "there is no model 'other'; this server has m"),
        ({"model": ""}, "BAD_META", "needs a model id"),
        ({"model": None}, "BAD_META", "needs a model id"),
        ({"model": "m@beef"}, "UNKNOWN_MODEL", "at least 8 of its digits, not 'beef'"),
        (
            {"model": "m@beefbeef"},
            "UNKNOWN_MODEL",
            "model 'm' has revision abcdef012345, not 'beefbeef'",
        ),
        ({"op": "embed"}, "UNKNOWN_OP", "model 'm' does not embed; it does generate"),
        ({"op": "health", "inputs": {"x": 1}}, "BAD_META", "health takes no inputs"),
        ({"params": {"temprature": 1}}, "BAD_PARAMS", "did you mean 'temperature'"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_in_words(
    run_fast: Run, request_: dict[str, Any], code: str, words_: str
) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(), await opened.connect()
            worker.beat("ready", tasks=["generate"], revision="abcdef0123456789")
            await pass_time()
            failure = await client.failed(client.ask(**request_))
            assert failure.code == ErrorCode[code]
            assert words_ in failure.message
            assert failure.executed.value == "no"
            assert not worker.submits
            opened.check_books(num_live=0)

    run_fast(test)


def test_a_revision_is_known_by_its_first_digits(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(on_submit=echo), await opened.connect()
            worker.beat("ready", revision="abcdef0123456789")
            await pass_time()
            await client.answered(client.ask("embed", model="m@abcdef01"))

    run_fast(test)


def test_one_request_above_the_bound_is_refused_and_the_others_live_on(run_fast: Run) -> None:
    async def test() -> None:
        bounds = AdmissionConfig(max_requests=5, max_requests_per_model=3)
        async with house(bounds) as opened:
            worker, client = await opened.add_worker(), await opened.connect()
            streams = [client.ask() for _ in range(3)]
            failure = await client.failed(client.ask())
            assert failure.code == ErrorCode.BUSY
            assert failure.retryable
            assert failure.retry_after_ms
            opened.check_books(num_live=3)
            worker.end(1)
            await client.ended(streams[0])
            client.ask()
            await pass_time()
            opened.check_books(num_live=3)

    run_fast(test)


def test_a_refused_request_leaves_the_connection_to_the_next(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            await opened.add_worker(on_submit=echo)
            client = await opened.connect()
            await client.failed(client.ask("dance"))
            await client.answered(client.ask("embed"))

    run_fast(test)


# -- models that load, fail and come back ----------------------------------------------------------


def test_requests_wait_for_a_loading_model_and_are_dispatched_in_order(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(is_ready=False), await opened.connect()
            worker.beat("loading", "half of it")
            streams = [client.ask("embed", inputs={"texts": [str(i)]}) for i in range(4)]
            client.cancel(streams[1])
            await pass_time(60.0)
            assert not worker.submits
            opened.check_books(num_live=3)
            worker.beat("ready")
            await pass_time()
            assert [submit.inputs["texts"] for submit in worker.submits] == [["0"], ["2"], ["3"]]
            for submit in worker.submits:
                worker.result(submit.stream)
            for stream in (streams[0], *streams[2:]):
                await client.answered(stream)
            assert (await client.ended(streams[1])).finish is Finish.CANCELLED

    run_fast(test)


def test_a_request_that_will_not_wait_is_told_how_far_the_model_is(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(is_ready=False), await opened.connect()
            worker.beat("loading", "half of it")
            await pass_time()
            failure = await client.failed(client.ask(params={"wait": False}))
            assert failure.code == ErrorCode.MODEL_LOADING
            assert failure.retryable
            assert "half of it" in failure.message
            worker.beat("ready")
            await pass_time()
            client.ask(params={"wait": False})
            await pass_time()
            assert len(worker.submits) == 1

    run_fast(test)


def test_what_waits_for_a_model_that_fails_is_failed_with_the_reason(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(is_ready=False), await opened.connect()
            streams = [client.ask() for _ in range(2)]
            await pass_time()
            worker.beat("failed", "its weights are torn")
            for stream in streams:
                failure = await client.failed(stream)
                assert failure.code == ErrorCode.MODEL_ERROR
                assert "its weights are torn" in failure.message
                assert failure.executed.value == "no"
            late = await client.failed(client.ask())
            assert late.code == ErrorCode.MODEL_ERROR
            assert "its weights are torn" in late.message
            assert late.executed.value == "no"

    run_fast(test)


@pytest.mark.parametrize(
    ("request_", "code"),
    [({"op": "embed"}, "UNKNOWN_OP"), ({"model": "m@beefbeef"}, "UNKNOWN_MODEL")],
)
def test_what_a_loading_model_cannot_do_is_found_out_when_it_is_ready(
    run_fast: Run, request_: dict[str, Any], code: str
) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(is_ready=False), await opened.connect()
            odd, good = client.ask(**request_), client.ask(model="m@abcdef01")
            await pass_time()
            assert not client.messages
            worker.beat("ready", tasks=["generate"], revision="abcdef0123456789")
            assert (await client.failed(odd)).code == ErrorCode[code]
            assert len(worker.submits) == 1
            worker.end(1)
            await client.ended(good)

    run_fast(test)


def test_what_ends_while_it_waits_takes_no_memory(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            client = await opened.connect()
            opened.add_replica()
            for _ in range(50):
                stream = client.ask(deadline_ms=20)
                other = client.ask()
                client.cancel(other)
                await client.ended(stream)
                await client.ended(other)
            assert [len(waiting) for waiting in opened.gateway._waiting.values()] == [0]
            opened.check_books(num_live=0)

    run_fast(test)


def test_a_request_survives_the_loss_of_another_replica(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            first, second = [await opened.add_worker() for _ in range(2)]
            client = await opened.connect()
            streams = [client.ask(), client.ask()]
            await pass_time()
            assert [len(w.submits) for w in (first, second)] == [1, 1]
            first.die()
            await pass_time()
            (lost,) = [s for s in streams if client.terminals(s)]
            failure = await client.failed(lost)
            assert failure.code == ErrorCode.WORKER_LOST
            assert failure.retryable
            second.end(1)
            (other,) = set(streams) - {lost}
            await client.ended(other)
            client.ask()
            await pass_time()
            assert len(second.submits) == 2

    run_fast(test)


def test_requests_wait_while_a_lost_worker_is_restarted(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            replica = opened.add_replica()
            worker, client = await opened.add_worker(replica=replica), await opened.connect()
            worker.die()
            await pass_time()
            stream = client.ask("embed")
            await pass_time(1.0)
            assert not client.messages
            await opened.add_worker(replica=replica, on_submit=echo)
            await client.answered(stream)

    run_fast(test)


def test_a_request_in_the_moment_of_a_link_s_end_is_told_to_come_again(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(), await opened.connect()
            running = client.ask()
            await pass_time()
            (replica,) = opened.pools["m"].replicas
            transport = replica._transport
            assert transport is not None
            # A violation by the worker, seen before the end of its socket.
            transport.connection.fail(ModelError("it broke the protocol"))
            assert not replica.is_ready
            session = next(iter(opened.gateway.sessions))
            session._live[running].stop(Finish.CANCELLED)
            client.ask()
            transport.flush()
            await pass_time()
            assert worker.is_lost
            assert (await client.ended(running)).finish is Finish.CANCELLED
            assert opened.gateway.admission.total == 1

    run_fast(test)


# -- stopping --------------------------------------------------------------------------------------


def test_a_cancel_stops_the_worker_and_ends_with_what_it_confirms(run: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(), await opened.connect()
            stream = client.ask()
            await worker.until(lambda w: w.submits)
            worker.step({1: [5]})
            await client.until(lambda c: c.tokens(stream))
            client.cancel(stream)
            client.cancel(stream)
            await worker.until(lambda w: w.cancels)
            worker.end(1, Finish.CANCELLED)
            end = await client.ended(stream)
            assert (end.finish, end.count) == (Finish.CANCELLED, 1)
            assert len(worker.cancels) == 1

    run(test)


def test_a_deadline_stops_the_worker_at_its_time_and_not_before(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(), await opened.connect()
            stream = client.ask(deadline_ms=5000)
            await pass_time(4.99)
            assert not worker.cancels
            await pass_time(0.05)
            (cancel,) = worker.cancels
            assert cancel.reason == "deadline"
            worker.end(1, Finish.DEADLINE)
            assert (await client.ended(stream)).finish is Finish.DEADLINE
            assert len(opened.gateway.deadlines) == 0

    run_fast(test)


def test_a_deadline_that_passes_while_a_model_loads_ends_the_request(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(is_ready=False), await opened.connect()
            stream = client.ask(deadline_ms=1000)
            await pass_time(1.05)
            end = await client.ended(stream)
            assert (end.finish, end.count) == (Finish.DEADLINE, 0)
            worker.beat("ready")
            await pass_time()
            assert not worker.submits

    run_fast(test)


def test_a_worker_that_does_not_confirm_is_given_up_after_the_grace(run_fast: Run) -> None:
    async def test() -> None:
        async with house(AdmissionConfig(stop_grace_s=2.0)) as opened:
            worker, client = await opened.add_worker(), await opened.connect()
            stream = client.ask()
            await pass_time()
            worker.step({1: [5]})
            client.cancel(stream)
            await pass_time(1.9)
            assert not client.terminals(stream)
            await pass_time(0.2)
            end = await client.ended(stream)
            assert (end.finish, end.count) == (Finish.CANCELLED, 1)
            opened.check_books(num_live=0)
            # What still comes of it is dropped, and the link lives on.
            worker.step({1: [6]})
            worker.end(1)
            await pass_time()
            assert not worker.is_lost
            assert client.tokens(stream) == [5]

    run_fast(test)


def test_the_requests_of_a_client_that_leaves_are_stopped(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(), await opened.connect()
            client.ask()
            client.ask(deadline_ms=10_000)
            await pass_time()
            client.transport.close()
            await pass_time()
            assert sorted(cancel.stream for cancel in worker.cancels) == [1, 2]
            worker.end(1, Finish.CANCELLED)
            await pass_time(3.0)
            opened.check_books(num_live=0)

    run_fast(test)


# -- the end ---------------------------------------------------------------------------------------


def test_a_drain_lets_what_runs_finish_and_takes_nothing_new(run: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(), await opened.connect()
            stream = client.ask()
            await worker.until(lambda w: w.submits)
            drain = asyncio.ensure_future(opened.gateway.drain(30.0, asyncio.Event()))
            await client.until(lambda c: c.goaways)
            (goaway,) = client.goaways
            assert (goaway.code, goaway.last_stream) == (int(ErrorCode.DRAINING), stream)
            assert goaway.grace_ms == 30_000
            refused = await client.failed(client.ask())
            assert refused.code == ErrorCode.DRAINING
            assert refused.retryable
            assert (await client.answered(client.ask("health", None))).extra["status"] == "draining"
            worker.step({1: [5]})
            worker.end(1)
            assert await drain == 0
            assert (await client.ended(stream)).count == 1
            assert await client.until_lost() is None

    run(test)


def test_a_drain_without_requests_ends_at_once(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            client = await opened.connect()
            before = opened.gateway.now()
            assert await opened.gateway.drain(30.0, asyncio.Event()) == 0
            assert opened.gateway.now() - before < 1.0
            assert await client.until_lost() is None

    run_fast(test)


def test_what_is_not_finished_after_the_grace_is_cut_and_told_so(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(), await opened.connect()
            running = client.ask()
            opened.add_replica("late")
            waiting = client.ask("embed", "late")
            await pass_time()
            worker.step({1: [5]})
            before = opened.gateway.now()
            assert await opened.gateway.drain(3.0, asyncio.Event()) == 2
            assert 3.0 <= opened.gateway.now() - before < 4.0
            for stream, executed in ((running, "maybe"), (waiting, "no")):
                failure = await client.failed(stream)
                assert failure.code == ErrorCode.DRAINING
                assert failure.retryable
                assert failure.executed.value == executed
            assert client.tokens(running) == [5]
            await worker.until(lambda w: w.cancels)
            opened.check_books(num_live=0)

    run_fast(test)


def test_a_drain_in_a_hurry_cuts_at_once(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            await opened.add_worker()
            client, hurry = await opened.connect(), asyncio.Event()
            stream = client.ask()
            await pass_time()
            drain = asyncio.ensure_future(opened.gateway.drain(30.0, hurry))
            await pass_time(1.0)
            assert not drain.done()
            hurry.set()
            before = opened.gateway.now()
            assert await drain == 1
            assert opened.gateway.now() - before < 1.0
            assert (await client.failed(stream)).code == ErrorCode.DRAINING

    run_fast(test)


def test_a_drain_waits_until_its_last_frames_have_left(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            await opened.add_worker(on_submit=echo)
            client = await opened.connect()
            large = np.zeros(2**20, dtype=np.uint8)
            stream = client.ask("infer", inputs={"x": large})
            await client.until(lambda _: opened.gateway.outcomes)
            await opened.gateway.drain(30.0, asyncio.Event())
            assert not opened.gateway.sessions
            assert len((await client.answered(stream)).outputs["x"]) == 2**20

    run_fast(test)


def test_requests_are_spread_over_the_replicas(run_fast: Run) -> None:
    async def test() -> None:
        def keep(worker: FakeWorker, submit: Submit) -> None: ...

        async with house() as opened:
            workers = [await opened.add_worker(on_submit=keep) for _ in range(3)]
            client = await opened.connect()
            for _ in range(9):
                client.ask()
            await pass_time()
            assert [len(worker.submits) for worker in workers] == [3, 3, 3]

    run_fast(test)
