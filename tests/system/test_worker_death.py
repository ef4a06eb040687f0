"""Workers that are killed, hang, or are brought down by a prompt."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tensorwire import (
    AsyncClient,
    DeadlineExceeded,
    ErrorCode,
    Executed,
    Generation,
    ModelLoading,
    WorkerLost,
)

from .serving import PATIENCE_S, assert_oracle, expected, is_alive, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .serving import RunningServer

pytestmark = pytest.mark.slow


@pytest.fixture
def mortal(serve: Callable[..., RunningServer]) -> RunningServer:
    """A server of the test's own."""
    return serve("oracle:step_ms=5", "echo:").ready()


class Steady:
    """Somebody who uses the other model all the time, and notices everything."""

    def __init__(self, server: RunningServer) -> None:
        self.slowest_s = 0.0
        self.num_answers = 0
        self.errors: list[BaseException] = []
        self._is_over = threading.Event()
        self._server = server
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            with self._server.client() as client:
                while not self._is_over.is_set():
                    began = time.monotonic()
                    answer = client.infer("echo", {"n": np.int64(self.num_answers)})
                    assert answer["n"] == self.num_answers
                    self.slowest_s = max(self.slowest_s, time.monotonic() - began)
                    self.num_answers += 1
        except BaseException as error:
            self.errors.append(error)

    def __enter__(self) -> Steady:
        self._thread.start()
        wait_until(lambda: self.num_answers or self.errors, "the other model answers")
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(PATIENCE_S)
        assert self.errors == []


def _serves_again(server: RunningServer, old_pid: int) -> Callable[[], bool]:
    def has_another_ready() -> bool:
        worker = server.stats()["workers"]["oracle/0"]
        return bool(worker["state"] == "ready" and worker.get("pid", old_pid) != old_pid)

    return has_another_ready


def _without_processes(held: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    return {
        name: {key: value for key, value in counts.items() if key != "pid"}
        for name, counts in held.items()
    }


def test_a_killed_worker_costs_each_of_its_requests_one_typed_error_and_nobody_else_anything(
    mortal: RunningServer,
) -> None:
    baseline = mortal.held()
    old_pid = mortal.worker_pids()["oracle/0"]

    async def use() -> list[Generation | BaseException]:
        async with AsyncClient(mortal.address) as client:
            streams = [
                client.stream("oracle", f"doomed {i}", seed=i, max_new_tokens=3000)
                for i in range(48)
            ]
            firsts = await asyncio.gather(*(anext(stream) for stream in streams))
            assert [delta.index for delta in firsts] == [0] * len(streams)
            os.kill(old_pid, signal.SIGKILL)

            async def rest(i: int) -> Generation:
                ids = firsts[i].token_ids + [t async for d in streams[i] for t in d.token_ids]
                raise AssertionError(f"the stream ended as if it was whole, with {len(ids)} tokens")

            ends = await asyncio.gather(*(rest(i) for i in range(48)), return_exceptions=True)
            # After its error a stream is over: no second error, and no token.
            for stream in streams:
                with pytest.raises(StopAsyncIteration):
                    await anext(stream)
            return list(ends)

    with Steady(mortal) as steady:
        ends = asyncio.run(use())
        answers_at_death = steady.num_answers
        killed_at = time.monotonic()
        wait_until(_serves_again(mortal, old_pid), "another worker is ready")
        print(f"measured recovery_s={round(time.monotonic() - killed_at, 3)}")
        made = mortal.watcher.generate("oracle", "after", seed=9, max_new_tokens=20)
        assert_oracle(made, "after", 9, 20)
        assert steady.num_answers > answers_at_death

    for i, end in enumerate(ends):
        assert isinstance(end, WorkerLost), end
        assert (end.code, end.retryable) == (ErrorCode.WORKER_LOST, True)
        assert end.executed is Executed.MAYBE
        partial = end.detail["partial"]
        assert partial.token_ids == expected(f"doomed {i}", i, len(partial.token_ids))
        assert end.detail["tokens"] == len(partial.token_ids) >= 1
    outcomes = mortal.stats()["gateway"]["outcomes"]
    assert outcomes["WORKER_LOST"] == 48
    assert mortal.worker_pids()["echo/0"] == baseline["echo/0"]["pid"]
    wait_until(
        lambda: _without_processes(mortal.held()) == _without_processes(baseline),
        "everything is given back",
    )
    assert mortal.process.poll() is None
    assert not is_alive(old_pid)


def test_a_prompt_that_kills_its_worker_does_not_end_the_server(mortal: RunningServer) -> None:
    old_pid = mortal.worker_pids()["oracle/0"]
    with mortal.client() as client, pytest.raises(WorkerLost):
        client.generate("oracle", "please !KILL yourself", max_new_tokens=5)
    wait_until(_serves_again(mortal, old_pid), "another worker is ready")
    made = mortal.watcher.generate("oracle", "after", seed=1, max_new_tokens=5)
    assert_oracle(made, "after", 1, 5)


def test_while_a_worker_restarts_requests_wait_or_are_refused_as_they_chose(
    serve: Callable[..., RunningServer],
) -> None:
    server = serve("oracle:load_ms=700").ready()
    with server.client() as client:
        os.kill(server.worker_pids()["oracle/0"], signal.SIGKILL)
        wait_until(lambda: client.health()["status"] == "loading", "the death is noticed")
        with pytest.raises(ModelLoading) as refused:
            client.generate("oracle", "now or never", max_new_tokens=3, wait=False)
        assert refused.value.executed is Executed.NO
        waited = client.generate("oracle", "later", seed=4, max_new_tokens=3)
        assert_oracle(waited, "later", 4, 3)


def test_with_two_replicas_the_other_one_serves_at_once(
    serve: Callable[..., RunningServer],
) -> None:
    server = serve("oracle:step_ms=5,load_ms=500", "--workers", "2").ready()
    wait_until(lambda: server.watcher.models()["models"][0]["ready_replicas"] == 2, "both serve")
    pids = server.worker_pids()
    with server.client() as client:
        streams = [client.stream("oracle", "s", seed=i, max_new_tokens=150) for i in range(8)]
        for stream in streams:
            next(stream)
        in_flight = {name: w["in_flight"] for name, w in server.stats()["workers"].items()}
        assert in_flight == {"oracle/0": 4, "oracle/1": 4}
        os.kill(pids["oracle/0"], signal.SIGKILL)
        ends = [_end_of(stream) for stream in streams]
        assert [type(end) for end in ends].count(WorkerLost) == 4
        for seed, end in enumerate(ends):
            if isinstance(end, Generation):
                assert_oracle(end, "s", seed, 150)
        made = client.generate("oracle", "now", seed=2, max_new_tokens=3, wait=False)
        assert_oracle(made, "now", 2, 3)


def _end_of(stream: Iterator[object]) -> object:
    try:
        for _ in stream:
            pass
    except WorkerLost as error:
        return error
    return stream.generation  # type: ignore[attr-defined]


def test_a_worker_that_stands_still_cannot_hold_a_deadline_or_a_cancel(
    serve: Callable[..., RunningServer],
) -> None:
    mortal = serve("oracle:step_ms=5", "echo:", "--set", "admission.stop_grace_s=0.2").ready()
    baseline = mortal.held()
    pid = mortal.worker_pids()["oracle/0"]

    async def use() -> None:
        async with AsyncClient(mortal.address) as client:
            late = client.stream("oracle", "late", seed=1, max_new_tokens=3000, timeout=0.5)
            left = client.stream("oracle", "left", seed=2, max_new_tokens=3000)
            await anext(late)
            await anext(left)
            os.kill(pid, signal.SIGSTOP)
            await left.close()
            with pytest.raises(DeadlineExceeded) as over:
                async for _ in late:
                    pass
            ids = over.value.partial.token_ids
            assert ids == expected("late", 1, len(ids))
            # The gateway has closed its books although the worker has confirmed nothing.
            gateway = {"live_requests": -1}
            deadline = time.monotonic() + 3
            while gateway["live_requests"] and time.monotonic() < deadline:
                gateway = (await client.stats())["gateway"]
            assert gateway["live_requests"] == 0

    try:
        asyncio.run(asyncio.wait_for(use(), PATIENCE_S))
    finally:
        os.kill(pid, signal.SIGCONT)
    # It confirms, too late, what nobody waits for any more; nothing comes of it.
    mortal.assert_back_at(baseline)
    outcomes = mortal.stats()["gateway"]["outcomes"]
    assert outcomes == {"deadline": 1, "cancelled": 1}
    assert_oracle(mortal.watcher.generate("oracle", "x", seed=3, max_new_tokens=4), "x", 3, 4)


def test_a_kill_between_cancel_and_its_confirmation_ends_the_request_once(
    mortal: RunningServer,
) -> None:
    pid = mortal.worker_pids()["oracle/0"]
    with mortal.client() as client:
        streams = [client.stream("oracle", "s", seed=i, max_new_tokens=3000) for i in range(16)]
        for stream in streams:
            next(stream)
        os.kill(pid, signal.SIGSTOP)
        for stream in streams:
            stream.close()
        # Behind the cancels on the same connection: they have been taken.
        assert client.health()["models"]["echo"]["state"] == "ready"
        os.kill(pid, signal.SIGKILL)
        wait_until(_serves_again(mortal, pid), "another worker is ready")
    gateway = mortal.stats()["gateway"]
    assert gateway["outcomes"] == {"cancelled": 16}
    assert (gateway["live_requests"], gateway["journal_entries"]) == (0, 0)


def test_non_finite_numbers_fail_their_request_and_not_its_batch(mortal: RunningServer) -> None:
    async def use() -> None:
        async with AsyncClient(mortal.address) as client:
            prompts = ["fine", "so !NAN it is", "fine as well"]
            ends = await asyncio.gather(
                *(client.generate("oracle", p, seed=5, max_new_tokens=30) for p in prompts),
                return_exceptions=True,
            )
        fine, sick, as_well = ends
        assert isinstance(fine, Generation)
        assert isinstance(as_well, Generation)
        assert_oracle(fine, "fine", 5, 30)
        assert_oracle(as_well, "fine as well", 5, 30)
        assert getattr(sick, "code", None) is ErrorCode.NUMERIC

    baseline = mortal.held()
    asyncio.run(use())
    mortal.assert_back_at(baseline)
