"""Batches of items that are answered once."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import pytest
from tensorwire_protocol.errors import ModelError
from tensorwire_server.scheduling.work import ModelCard
from tensorwire_server.workers.arrays import ArrayItem, ArrayLoop, BatchOutcome, InlineArrays
from tensorwire_server.workers.loop import Leave
from tensorwire_server.workers.spec import WorkerSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SPEC = WorkerSpec(model="m", source="x", max_items=4, max_batch_tokens=100)


class Ended(BaseException):
    """Takes the thread out of its loop at the end of a test."""


class Gated:
    """An engine whose runs a test lets through one by one; doubles numbers."""

    tokenizer = None
    card = ModelCard(tasks=frozenset({"infer"}), architecture="fake")

    def __init__(self) -> None:
        self.began: SimpleQueue[list[Any]] = SimpleQueue()
        self.gate = threading.Semaphore(0)

    def run(self, items: Sequence[Any]) -> list[Any]:
        self.began.put(list(items))
        assert self.gate.acquire(timeout=10)
        if "end" in items:
            raise Ended
        if "bad" in items:
            raise RuntimeError("secret")
        return [item * 2 for item in items]


@pytest.fixture
def engine() -> Gated:
    return Gated()


@pytest.fixture
def outcomes() -> SimpleQueue[BatchOutcome]:
    return SimpleQueue()


@pytest.fixture
def loop(engine: Gated, outcomes: SimpleQueue[BatchOutcome]) -> Iterator[ArrayLoop]:
    loop = ArrayLoop(engine, SPEC, post=outcomes.put)

    def run() -> None:
        try:
            loop.run()
        except Ended:
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield loop
    loop.post([item(0, "end")])
    for _ in range(10):
        engine.gate.release()
    thread.join(10)
    assert not thread.is_alive()


def item(id: int, payload: Any = 1, cost: int = 1) -> ArrayItem:
    return ArrayItem(id, 0, payload, cost)


def test_what_arrives_while_a_batch_runs_is_the_next_batch(
    loop: ArrayLoop, engine: Gated, outcomes: SimpleQueue[BatchOutcome]
) -> None:
    loop.post([item(1, 1)])
    assert engine.began.get(timeout=10) == [1]
    for id in range(2, 8):
        loop.post([item(id, id)])
    engine.gate.release()
    assert engine.began.get(timeout=10) == [2, 3, 4, 5]
    engine.gate.release()
    assert engine.began.get(timeout=10) == [6, 7]
    first, second = outcomes.get(timeout=10), outcomes.get(timeout=10)
    assert first.results == [2]
    assert [i.request_id for i in second.items] == [2, 3, 4, 5]
    assert second.results == [4, 6, 8, 10]


def test_an_item_that_left_is_not_run(loop: ArrayLoop, engine: Gated) -> None:
    loop.post([item(1, 1)])
    assert engine.began.get(timeout=10) == [1]
    loop.post([item(2, 2), item(3, 3)])
    loop.post([Leave(2)])
    engine.gate.release()
    assert engine.began.get(timeout=10) == [3]


def test_a_batch_that_raises_fails_its_items_and_the_loop_lives_on(
    loop: ArrayLoop, engine: Gated, outcomes: SimpleQueue[BatchOutcome]
) -> None:
    engine.gate.release()
    loop.post([item(1, "bad"), item(2, 2)])
    failed = outcomes.get(timeout=10).results
    assert [type(error) for error in failed] == [ModelError, ModelError]
    assert "secret" not in str(failed[0])
    engine.gate.release()
    loop.post([item(3, 3)])
    assert outcomes.get(timeout=10).results == [6]


def test_an_inline_engine_has_answered_when_post_returns(engine: Gated) -> None:
    taken: list[BatchOutcome] = []
    inline = InlineArrays(engine, SPEC, take=taken.append)
    engine.gate.release()
    inline.post([item(1, 1), Leave(9), item(2, 2)])
    assert taken[0].results == [2, 4]
    inline.post([Leave(9)])
    assert len(taken) == 1
