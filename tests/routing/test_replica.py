"""The gateway's handle on a worker, over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from gateway.fake_worker import FakeWorker
from gateway.loops import FakeClockLoop, pass_time, run_on
from tensorwire_protocol.codec.typed import opened
from tensorwire_protocol.errors import ErrorCode, Executed, InternalError, WorkerLost
from tensorwire_protocol.messages import Finish, Submit
from tensorwire_server.models.lifecycle import ModelState
from tensorwire_server.routing.replica import Replica

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

    from tensorwire_protocol.errors import TensorwireError
    from tensorwire_protocol.messages import End, PackedResult

    Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]

run: Run = partial(run_on, FakeClockLoop)


class Owner:
    """Notes what becomes of an attempt."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def build_submit(self, stream: int) -> Submit:
        return Submit(stream=stream, op="generate", key=bytes(16), attempt=1)

    def on_ack(self, prompt_ids: Sequence[int] | None) -> None:
        self.told.append(("ack", list(prompt_ids or ())))

    def on_tokens(self, first_index: int, tokens: Sequence[int], text: str) -> None:
        self.told.append((first_index, list(tokens), text))

    def on_end(self, end: End) -> None:
        self.told.append(end.finish)

    def on_result(self, result: PackedResult) -> None:
        self.told.append(opened(result.extra))

    def on_failure(self, error: TensorwireError) -> None:
        self.told.append(error.code)

    def on_replica_lost(self) -> None:
        self.told.append("lost")


class Changes:
    """A replica, and the states that it told of."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.replica = Replica("m/0", on_change=self._note)

    def _note(self, replica: Replica) -> None:
        assert replica is self.replica
        self.seen.append((replica.state.value, replica.detail))


@contextlib.asynccontextmanager
async def linked() -> AsyncIterator[tuple[Changes, FakeWorker]]:
    changes, worker = Changes(), FakeWorker()
    await worker.attach(changes.replica)
    await pass_time()
    yield changes, worker
    worker.die()
    await pass_time()
    assert changes.replica.num_in_flight == 0


def test_a_replica_begins_without_a_worker() -> None:
    replica = Changes().replica
    assert (replica.state, replica.detail, replica.is_ready) == (
        ModelState.LOADING,
        "starting",
        False,
    )
    with pytest.raises(WorkerLost, match="m/0 has no connection") as error:
        replica.submit(1, Owner())
    assert error.value.executed is Executed.NO
    assert error.value.retryable
    replica.cancel(1, "cancelled")
    replica.abandon(1)
    replica.drain(1.0)
    replica.close()
    replica.on_timer()


def test_heartbeats_say_how_far_the_worker_is_and_only_changes_are_told() -> None:
    async def test() -> None:
        async with linked() as (changes, worker):
            for state, detail in [
                ("loading", "half"),
                ("loading", "half"),
                ("loading", "all"),
                ("ready", None),
                ("ready", None),
            ]:
                worker.beat(state, detail)
            await pass_time()
            assert changes.seen == [("loading", "half"), ("loading", "all"), ("ready", "")]
            assert changes.replica.is_ready
            assert changes.replica.card["model"] == "m"
            assert changes.replica.steps == 1

    run(test)


def test_another_card_is_a_change() -> None:
    async def test() -> None:
        async with linked() as (changes, worker):
            worker.beat("ready")
            worker.beat("ready", tasks=["embed"])
            worker.beat("ready", tasks=["embed"])
            await pass_time()
            assert changes.seen == [("ready", "")] * 2

    run(test)


def test_an_attempt_s_owner_is_told_everything_in_order() -> None:
    async def test() -> None:
        async with linked() as (changes, worker):
            owner, replica = Owner(), changes.replica
            stream = replica.submit(1, owner)
            assert replica.num_in_flight == 1
            await pass_time()
            worker.ack(stream)
            worker.step({stream: [5, 6]})
            worker.step({stream: [7]})
            worker.end(stream, Finish.LENGTH)
            await pass_time()
            told = [("ack", [7, 8]), (0, [5, 6], "5 6 "), (2, [7], "7 "), Finish.LENGTH]
            assert owner.told == told
            assert replica.num_in_flight == 0

    run(test)


def test_results_and_failures_reach_their_owners() -> None:
    async def test() -> None:
        async with linked() as (changes, worker):
            first, second = Owner(), Owner()
            streams = [changes.replica.submit(1, o) for o in (first, second)]
            await pass_time()
            worker.fail(streams[1], InternalError("broken"))
            worker.result(streams[0], extra={"x": 1})
            await pass_time()
            assert (first.told, second.told) == ([{"x": 1}], [ErrorCode.INTERNAL])

    run(test)


def test_tokens_of_another_attempt_are_dropped() -> None:
    async def test() -> None:
        async with linked() as (changes, worker):
            owners = [Owner(), Owner()]
            for owner in owners:
                changes.replica.submit(1, owner)
            await pass_time()
            worker.step({1: [5], 2: [6]}, attempt=2)
            worker.step({1: [7], 2: [8]})
            await pass_time()
            assert [owner.told for owner in owners] == [[(0, [7], "7 ")], [(0, [8], "8 ")]]
            for stream in (1, 2):
                worker.end(stream)

    run(test)


def test_the_tokens_of_an_abandoned_attempt_do_not_shift_those_of_its_neighbours() -> None:
    async def test() -> None:
        async with linked() as (changes, worker):
            owners = [Owner() for _ in range(3)]
            streams = [changes.replica.submit(1, owner) for owner in owners]
            await pass_time()
            changes.replica.abandon(streams[1])
            worker.step({streams[0]: [1, 2], streams[1]: [3, 4, 5], streams[2]: [6]})
            for stream in streams:
                worker.end(stream)
            await pass_time()
            assert owners[0].told == [(0, [1, 2], "1 2 "), Finish.STOP]
            assert owners[1].told == []
            assert owners[2].told == [(0, [6], "6 "), Finish.STOP]

    run(test)


def test_the_loss_of_a_worker_is_told_to_each_owner_once() -> None:
    async def test() -> None:
        async with linked() as (changes, worker):
            worker.beat("ready")
            owners = [Owner() for _ in range(3)]
            streams = [changes.replica.submit(1, owner) for owner in owners]
            await pass_time()
            worker.end(streams[0])
            await pass_time()
            worker.die()
            await pass_time()
            assert [owner.told for owner in owners] == [[Finish.STOP], ["lost"], ["lost"]]
            assert changes.seen[-1] == ("loading", "restarting")
            assert not changes.replica.is_ready
            assert changes.replica.num_in_flight == 0

    run(test)


def test_a_worker_s_next_life_begins_with_fresh_streams() -> None:
    async def test() -> None:
        async with linked() as (changes, worker):
            first, second = Owner(), Owner()
            changes.replica.submit(1, first)
            await pass_time()
            worker.die()
            await pass_time()
            again = FakeWorker()
            await again.attach(changes.replica)
            again.beat("ready")
            await pass_time()
            assert changes.replica.is_ready
            assert changes.replica.submit(1, second) == 1
            await pass_time()
            again.end(1)
            await pass_time()
            assert (first.told, second.told) == (["lost"], [Finish.STOP])
            again.die()

    run(test)


def test_a_model_that_failed_stays_failed_when_its_worker_ends() -> None:
    async def test() -> None:
        async with linked() as (changes, worker):
            worker.beat("failed", "no such file")
            await pass_time()
            worker.die()
            await pass_time()
            changes.replica.disconnected("nobody there")
            assert changes.replica.state is ModelState.FAILED
            assert changes.replica.detail == "no such file"

    run(test)


def test_a_failed_worker_that_was_repaired_can_be_lost_like_any_other() -> None:
    async def test() -> None:
        async with linked() as (changes, worker):
            worker.beat("failed", "no such file")
            await pass_time()
            worker.die()
            await pass_time()
            again = FakeWorker()
            await again.attach(changes.replica)
            await pass_time()
            again.beat("ready")
            await pass_time()
            assert changes.replica.is_ready
            again.die()
            await pass_time()
            assert changes.replica.state is ModelState.LOADING

    run(test)


def test_a_link_that_has_just_broken_takes_nothing_and_raises_nothing_odd() -> None:
    async def test() -> None:
        async with linked() as (changes, worker):
            worker.beat("ready")
            owner = Owner()
            await pass_time()
            stream = changes.replica.submit(1, owner)
            transport = changes.replica._transport
            assert transport is not None
            transport.connection.fail(InternalError("a violation"))
            assert not changes.replica.is_ready
            changes.replica.cancel(stream, "cancelled")
            changes.replica.drain(1.0)
            with pytest.raises(WorkerLost):
                changes.replica.submit(1, owner)
            transport.flush()
            await pass_time()
            assert owner.told == ["lost"]

    run(test)


def test_cancel_and_drain_reach_the_worker() -> None:
    async def test() -> None:
        async with linked() as (changes, worker):
            owner = Owner()
            stream = changes.replica.submit(1, owner)
            changes.replica.cancel(stream, "deadline")
            changes.replica.cancel(stream + 1, "unknown")
            changes.replica.drain(2.5)
            await pass_time()
            assert [(c.stream, c.reason) for c in worker.cancels] == [(stream, "deadline")]
            assert [drain.grace_ms for drain in worker.drains] == [2500]
            changes.replica.close()
            await pass_time()
            assert worker.is_lost

    run(test)


def test_the_end_of_a_link_is_told_to_who_made_it() -> None:
    async def test() -> None:
        changes, worker, lost = Changes(), FakeWorker(), asyncio.Event()
        await worker.attach(changes.replica, lost.set)
        await pass_time()
        assert not lost.is_set()
        worker.die()
        await pass_time()
        assert lost.is_set()

    run(test)


def test_a_reason_for_having_no_connection_is_told_when_it_changes() -> None:
    changes = Changes()
    for reason in ("no worker answers", "no worker answers", "another reason"):
        changes.replica.disconnected(reason)
    assert changes.seen == [("loading", "no worker answers"), ("loading", "another reason")]


def test_a_replica_that_is_given_up_says_why() -> None:
    changes = Changes()
    changes.replica.fail("it ended three times")
    assert changes.seen == [("failed", "it ended three times")]


def test_a_worker_that_comes_back_with_another_model_is_refused_until_the_right_one_is_back() -> (
    None
):
    async def test() -> None:
        changes = Changes()
        for model, is_ready in [("m", True), ("other", False), ("m", True)]:
            worker = FakeWorker()
            await worker.attach(changes.replica)
            await pass_time()
            worker.beat("ready", model=model)
            await pass_time()
            assert changes.replica.is_ready is is_ready
            if not is_ready:
                assert changes.replica.detail == "the worker at m/0 now holds 'other'"
            worker.die()
            await pass_time()

    run(test)
