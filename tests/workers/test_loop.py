"""The compute thread of a text model: what it posts, and what it survives."""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import pytest
from emissions import each
from tensorwire_protocol.errors import (
    BadParams,
    Busy,
    ModelError,
    NumericError,
    OutOfMemory,
    TensorwireError,
)
from tensorwire_server.scheduling.continuous import ContinuousScheduler
from tensorwire_server.scheduling.pages import PagePool
from tensorwire_server.scheduling.sequences import Sequence
from tensorwire_server.scheduling.work import Sampling, StepPlan, StepResult
from tensorwire_server.workers.loop import (
    GATHERING_S,
    OUTCOMES_AHEAD,
    GenerateLoop,
    Leave,
    StepOutcome,
)
from tensorwire_server.workers.oracle import OracleEngine, oracle_tokens
from tensorwire_server.workers.spec import WorkerSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SAMPLING = Sampling(temperature=1.0, top_k=None, top_p=1.0, seed=1)
SPEC = WorkerSpec(model="m", source="oracle:", max_running=4, max_waiting=4)


class Ended(BaseException):
    """Takes the thread out of its loop at the end of a test."""


class Programmed(OracleEngine):
    """An oracle that raises where a test wants it to, and says when it is inside a step."""

    def __init__(self) -> None:
        super().__init__()
        self.before_step: Callable[[StepPlan], None] = lambda plan: None

    def step(self, plan: StepPlan) -> StepResult:
        self.before_step(plan)
        return super().step(plan)


class Driven:
    """A loop on its thread, with its outcomes in a queue."""

    def __init__(self, spec: WorkerSpec = SPEC, gathering_s: float = GATHERING_S) -> None:
        self.engine = Programmed()
        self.outcomes: SimpleQueue[StepOutcome] = SimpleQueue()
        self.loop = GenerateLoop(self.engine, spec, post=self.outcomes.put, gathering_s=gathering_s)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.loop.run()
        except Ended:
            return

    def next(self) -> StepOutcome:
        outcome = self.outcomes.get(timeout=10)
        self.loop.outcome_taken()
        return outcome

    def join(self, id: int, prompt: bytes = b"hello", max_new_tokens: int = 3, **more: Any) -> None:
        self.loop.post([a_sequence(id, prompt, max_new_tokens, **more)])

    def tokens_of(self, id: int) -> list[int]:
        """Collect what comes for one sequence until it ends."""
        tokens = []
        while True:
            for emission in each(self.next().emissions):
                if emission.sequence_id == id:
                    tokens.append(emission.token_id)
                    if emission.finish:
                        return tokens

    def close(self) -> None:
        def end(plan: StepPlan) -> None:
            raise Ended

        self.engine.before_step = end
        self.join(1 << 40)
        while self._thread.is_alive():
            self.loop.outcome_taken()
            self._thread.join(0.01)


def a_sequence(id: int, prompt: bytes = b"hello", max_new_tokens: int = 3, **more: Any) -> Sequence:
    return Sequence(
        id=id, prompt_ids=tuple(prompt), max_new_tokens=max_new_tokens, sampling=SAMPLING, **more
    )


@pytest.fixture
def driven() -> Iterator[Driven]:
    loop = Driven()
    yield loop
    loop.close()


def fail_once(driven: Driven, error: Exception) -> None:
    def before(plan: StepPlan) -> None:
        driven.engine.before_step = lambda plan: None
        raise error

    driven.engine.before_step = before


def test_a_step_is_posted_once_with_the_tokens_of_all(driven: Driven) -> None:
    driven.loop.post([a_sequence(1, b"one"), a_sequence(2, b"two")])
    outcomes = [driven.next() for _ in range(3)]
    assert outcomes[0].started == (1, 2)
    assert [outcome.num_rows for outcome in outcomes] == [2, 2, 2]
    for id, prompt in ((1, b"one"), (2, b"two")):
        made = [e.token_id for o in outcomes for e in each(o.emissions) if e.sequence_id == id]
        assert made == oracle_tokens(prompt, 1, 3)


def test_where_requests_come_in_bursts_an_idle_engine_lets_the_rest_of_one_come() -> None:
    driven = Driven(gathering_s=0.5)

    def before(plan: StepPlan) -> None:
        driven.engine.before_step = lambda plan: None
        driven.join(2, b"while the first of a burst is read")
        time.sleep(2.0)  # of which 5 % are waited for the rest of the next burst

    driven.engine.before_step = before
    driven.join(1, b"the first of a burst")
    assert driven.next().started == (1,)
    driven.tokens_of(2)
    driven.join(3, b"the first of another")
    while not driven.loop._commands.empty():  # until it was taken
        pass
    driven.join(4, b"the rest of it")
    assert driven.next().started == (3, 4)
    driven.tokens_of(4)
    for id in range(5, 5 + 4):  # who come alone wait for a few times, and no more
        assert driven.loop._gatherings_left
        driven.join(id)
        driven.tokens_of(id)
    assert not driven.loop._gatherings_left
    driven.close()


def test_the_rest_of_a_burst_is_waited_for_before_anything_is_known_of_who_asks() -> None:
    driven = Driven(gathering_s=0.5)
    driven.loop._first_step_s = 6000.0
    driven.join(1, b"the first of a burst")
    while not driven.loop._commands.empty():  # until it was taken
        pass
    driven.join(2, b"the rest of it")
    assert driven.next().started == (1, 2)
    driven.close()


def test_a_burst_that_came_whole_is_one_too() -> None:
    driven = Driven(gathering_s=0.001)
    driven.loop._gatherings_left = 1
    driven.loop.post([a_sequence(id, bytes([id])) for id in (1, 2)])
    driven.tokens_of(2)
    assert driven.loop._gatherings_left > 1
    driven.close()


def test_a_full_batch_is_not_waited_for() -> None:
    driven = Driven(gathering_s=60.0)  # far more than `next` waits
    driven.loop._gatherings_left, driven.loop._first_step_s = 1, 6000.0
    driven.loop.post([a_sequence(id, bytes([id])) for id in range(SPEC.max_running)])
    assert len(driven.next().started) == SPEC.max_running
    driven.close()


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (RuntimeError("secret"), ModelError),
        (MemoryError(), OutOfMemory),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), OutOfMemory),
    ],
)
def test_a_step_that_raises_fails_who_was_in_it_and_the_loop_lives_on(
    driven: Driven, raised: Exception, told: type[TensorwireError]
) -> None:
    fail_once(driven, raised)
    driven.join(1)
    error = driven.next().failed[1]
    assert type(error) is told
    assert error.log_id
    assert "secret" not in str(error)
    driven.join(2)
    assert driven.tokens_of(2) == oracle_tokens(b"hello", 1, 3)


def test_a_failed_row_is_a_numeric_error_of_its_request_alone(driven: Driven) -> None:
    driven.loop.post([a_sequence(1, b"!NAN"), a_sequence(2, b"two")])
    outcome = driven.next()
    assert isinstance(outcome.failed[1], NumericError)
    assert outcome.emissions.sequence_ids == [2]


def test_who_leaves_is_released_and_gives_its_pages_back(driven: Driven) -> None:
    driven.join(1, max_new_tokens=1000)
    driven.next()
    driven.loop.post([Leave(1)])
    driven.join(2)
    assert driven.tokens_of(2) == oracle_tokens(b"hello", 1, 3)
    driven.join(3, max_new_tokens=1)
    driven.tokens_of(3)
    load = driven.loop.load()
    assert (load["running"], load["waiting"], load["pages_used"]) == (0, 0, 0)


def test_steps_wait_for_an_asyncio_side_that_falls_behind(driven: Driven) -> None:
    reached = threading.Semaphore(0)
    driven.engine.before_step = lambda plan: reached.release()
    driven.join(1, max_new_tokens=1000)
    for _ in range(OUTCOMES_AHEAD + 1):  # the last one computed and held
        assert reached.acquire(timeout=10)
    assert not reached.acquire(timeout=0.1)
    driven.next()
    assert reached.acquire(timeout=10)


def test_the_next_step_begins_before_the_tokens_of_the_last_are_turned_to_text() -> None:
    """Each outcome is taken only when the engine is already in a later step."""
    begun = threading.Condition()
    counts = {"steps": 0, "overlapped": 0}

    def before(plan: StepPlan) -> None:
        with begun:
            counts["steps"] += 1
            begun.notify_all()

    driven = Driven()
    driven.engine.before_step = before
    driven.join(1, max_new_tokens=50)
    for number in range(1, 50):
        outcome = driven.outcomes.get(timeout=10)
        with begun:
            while counts["steps"] <= number:
                assert begun.wait(timeout=10), "the engine waits for the tokens to be taken"
        counts["overlapped"] += len(outcome.emissions.token_ids)
        driven.loop.outcome_taken()
    assert counts["overlapped"] == 49
    assert driven.next().emissions.finishes == {1: "length"}
    driven.close()


def test_an_answer_that_its_text_ended_tells_the_scheduler_how_long_answers_become() -> None:
    expected = {}
    for is_whole in (False, True):
        driven = Driven()
        for id in range(8):
            driven.join(id, max_new_tokens=1000)
            while id not in driven.next().emissions.sequence_ids:
                pass
            driven.loop.post([Leave(id, is_whole=is_whole)])
        driven.join(8, max_new_tokens=1)
        driven.tokens_of(8)
        forecast = driven.loop._scheduler._forecast
        expected[is_whole] = forecast.tokens(a_sequence(9, max_new_tokens=1000))
        driven.close()
    assert expected[True] < expected[False] == 1005


def test_a_request_that_can_never_fit_is_refused_alone() -> None:
    driven = Driven()
    driven.loop._scheduler = ContinuousScheduler(
        PagePool(4, 16), max_running=4, step_tokens=64, max_waiting=4
    )
    driven.join(1, max_new_tokens=60)
    error = driven.next().failed[1]
    assert type(error) is BadParams
    assert "needs room for 65 tokens, the cache holds 64; shorten the prompt" in str(error)
    assert "--kv-memory" in str(error)
    driven.join(2)
    assert driven.tokens_of(2) == oracle_tokens(b"hello", 1, 3)
    driven.close()


def test_the_load_says_what_was_found_and_what_was_preempted(driven: Driven) -> None:
    for id in (1, 2):
        driven.join(id, prompt=b"x" * 40, max_new_tokens=1)
        driven.tokens_of(id)
    load = driven.loop.load()
    assert (load["prefix_asked_tokens"], load["prefix_hit_tokens"]) == (80, 32)
    assert load["prefix_hit_rate"] == 0.4
    assert load["pages_cached"] == 2
    assert load["preemptions"] == load["recomputed_tokens"] == load["page_evictions"] == 0


def test_a_queue_beyond_its_bound_is_busy() -> None:
    driven = Driven(WorkerSpec(model="m", source="oracle:", max_running=1, max_waiting=1))
    gate = threading.Event()
    driven.engine.before_step = lambda plan: assert_set(gate)
    driven.loop.post([a_sequence(id) for id in range(1, 6)])
    assert {type(e) for e in driven.next().failed.values()} == {Busy}
    gate.set()
    assert driven.tokens_of(1) == oracle_tokens(b"hello", 1, 3)
    driven.close()


def assert_set(gate: threading.Event) -> None:
    assert gate.wait(10)


def test_a_passed_deadline_is_posted(driven: Driven) -> None:
    driven.join(1, deadline=0.0)
    assert driven.next().expired == [1]
