"""Whatever comes, goes, waits or breaks: nothing leaks, nothing is shared wrongly, all finish."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emissions import each
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tensorwire_server.scheduling.continuous import ContinuousScheduler, NeverFits, WaitingFull
from tensorwire_server.scheduling.pages import PagePool
from tensorwire_server.scheduling.sequences import Sequence
from tensorwire_server.scheduling.work import Sampling, StepPlan, StepResult

from .model_engine import ModelEngine

if TYPE_CHECKING:
    from collections.abc import Iterable

GREEDY = Sampling(temperature=0.0, top_k=None, top_p=1.0, seed=0)
PAGE_TOKENS = 4
STOP = 99
MAX_WAITING = 6
# Texts that begin alike: the second differs from the first behind 9 tokens.
TEXTS = (tuple(range(1, 31)), (*range(1, 10), *range(41, 62)), tuple(range(70, 100)))


def answer(plan: StepPlan, token_id: int = 50) -> StepResult:
    return StepResult(
        tokens={row.sequence_id: token_id for row in plan.rows if row.sample}, failed={}
    )


class AnyHistory(RuleBasedStateMachine):
    """Arrivals, cancels, expiries, failures and lost plans in any order, in pools of any size."""

    @initialize(
        num_pages=st.integers(4, 24),
        max_running=st.integers(1, 5),
        slack=st.integers(0, 12),
        expected_share=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
        saved_on_leaving=st.sampled_from([0, 1, 64]),
        num_layers=st.sampled_from([1, 3, 5]),
    )
    def start(
        self,
        num_pages: int,
        max_running: int,
        slack: int,
        expected_share: float,
        saved_on_leaving: int,
        num_layers: int,
    ) -> None:
        self.pool = PagePool(num_pages, PAGE_TOKENS)
        self.step_tokens = max_running + slack
        self.subject = ContinuousScheduler(
            self.pool,
            max_running=max_running,
            step_tokens=self.step_tokens,
            max_waiting=MAX_WAITING,
            expected_share=expected_share,
            saved_on_leaving=saved_on_leaving,
            num_layers=num_layers,
        )
        self.now = 0.0
        self.next_id = 0
        self.live: dict[int, Sequence] = {}
        self.known: dict[int, Sequence] = {}
        self.ended: set[int] = set()
        self.engine = ModelEngine(
            self.known, num_pages=num_pages, page_tokens=PAGE_TOKENS, num_layers=num_layers
        )

    @rule(
        text=st.integers(0, 2),
        prompt=st.integers(1, 30),
        new=st.integers(1, 12),
        so_far=st.integers(0, 3),
        wait=st.none() | st.integers(1, 60),
        priority=st.integers(-1, 1),
        tenant=st.sampled_from(["", "", "", "other"]),
    )
    def submit(
        self,
        text: int,
        prompt: int,
        new: int,
        so_far: int,
        wait: int | None,
        priority: int,
        tenant: str,
    ) -> None:
        candidate = Sequence(
            id=self.next_id,
            prompt_ids=TEXTS[text][:prompt],
            so_far=tuple(range(60, 60 + so_far)),
            max_new_tokens=new + so_far,
            sampling=GREEDY,
            stop_ids=frozenset({STOP}),
            deadline=None if wait is None else self.now + wait,
            priority=priority,
            arrived_at=self.now,
            tenant=tenant,
        )
        is_full = self.subject.num_waiting >= MAX_WAITING
        never_fits = self.pool.pages_for(candidate.num_tokens_at_most) > self.pool.num_pages
        refused: type[Exception] | None = None
        try:
            self.subject.submit(candidate)
        except (WaitingFull, NeverFits) as refusal:
            refused = type(refusal)
        else:
            self.live[self.next_id] = self.known[self.next_id] = candidate
        assert refused is (WaitingFull if is_full else NeverFits if never_fits else None)
        self.next_id += 1

    @rule(pick=st.integers(0, 100))
    def cancel(self, pick: int) -> None:
        if self.live:
            number = sorted(self.live)[pick % len(self.live)]
            assert self.subject.cancel(number)
            self.end(number)

    @rule()
    def lose_a_plan(self) -> None:
        self.plan()

    @rule(runs=st.booleans())
    def break_a_step(self, runs: bool) -> None:
        plan = self.plan()
        if plan is not None:
            if runs or not plan.rows:  # what does not even release is beyond help
                self.engine.run(plan)
            in_step = {row.sequence_id for row in plan.rows}
            failed = self.subject.fail(plan)
            assert set(failed) == in_step
            for number in failed:
                self.end(number)

    @rule(
        token=st.sampled_from([50, 51, STOP]),
        fails=st.booleans(),
        cancels=st.booleans(),
        took_s=st.sampled_from([0.0, 0.001, 0.01, 1.0]),
    )
    def step(self, token: int, fails: bool, cancels: bool, took_s: float) -> None:
        plan = self.plan()
        if plan is None:
            return
        self.run_engine(plan)
        if cancels and plan.rows:
            number = plan.rows[0].sequence_id
            assert self.subject.cancel(number)
            self.end(number)
        failing = {plan.rows[-1].sequence_id: "broken"} if fails and plan.rows else {}
        sampled = {row.sequence_id: token for row in plan.rows if row.sample}
        tokens = {number: token for number, token in sampled.items() if number not in failing}
        before = {number: live.num_new for number, live in self.live.items()}
        result = StepResult(tokens=tokens, failed=failing)
        took_s *= sum(len(row.token_ids) for row in plan.rows)
        for emission in each(self.subject.commit(plan, result, took_s=took_s)):
            assert emission.index == before[emission.sequence_id]
            if emission.finish is not None:
                self.end(emission.sequence_id)
        for number in self.subject.take_failed():
            self.end(number)

    @rule(count=st.integers(1, 12))
    def some_steps(self, count: int) -> None:
        for _ in range(count):
            self.step(token=52, fails=False, cancels=False, took_s=0.001)

    def plan(self) -> StepPlan | None:
        self.now += 1.0
        plan = self.subject.plan(self.now)
        for number in self.subject.take_expired():
            deadline = self.live[number].deadline
            assert deadline is not None
            assert deadline <= self.now
            self.end(number)
        return plan

    def run_engine(self, plan: StepPlan) -> None:
        assert sum(len(row.token_ids) for row in plan.rows) <= self.step_tokens
        in_step = {row.sequence_id for row in plan.rows}
        assert {load.sequence_id for load in plan.loads} <= in_step
        assert in_step <= self.live.keys()
        self.engine.run(plan)
        decoding = {
            number
            for number, live in self.live.items()
            if live.state.value == "running" and live.num_to_feed == 1
        }
        assert decoding <= in_step, "a decode was left out"

    def end(self, number: int) -> None:
        del self.live[number]
        self.ended.add(number)

    @invariant()
    def nothing_leaks(self) -> None:
        if hasattr(self, "subject"):
            self.subject.check_invariants()
            assert self.subject.num_waiting + self.subject.num_running == len(self.live)

    def teardown(self) -> None:
        if not hasattr(self, "subject"):
            return
        for _ in range(3000):
            plan = self.plan()
            if plan is None:
                break
            self.run_engine(plan)
            for emission in each(self.subject.commit(plan, answer(plan))):
                if emission.finish is not None:
                    self.end(emission.sequence_id)
            self.nothing_leaks()
        assert not self.live, "some never finished"
        assert not self.engine.rows, "some were never released"
        assert self.pool.used == self.pool.num_pins == 0
        assert len(self.engine.store) == self.pool.cached, "memory is held for nothing"


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def run_to_the_end(
    subject: ContinuousScheduler, engine: ModelEngine, arrivals: Iterable[list[Sequence]]
) -> dict[int, int]:
    """Submit one list before each step; return the step at which each sequence ended."""
    ended: dict[int, int] = {}
    coming = iter(arrivals)
    step = 0
    while step < 20_000:
        for sequence in next(coming, []):
            subject.submit(sequence)
        plan = subject.plan(float(step))
        if plan is None:
            return ended
        engine.run(plan)
        for emission in each(subject.commit(plan, answer(plan))):
            if emission.finish is not None:
                ended[emission.sequence_id] = step
        subject.check_invariants()
        step += 1
    raise AssertionError("it does not end")


@given(
    shapes=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 30), st.integers(1, 30), st.integers(-2, 2)),
        min_size=1,
        max_size=30,
    ),
    num_pages=st.integers(15, 30),
)
@settings(deadline=None, max_examples=60)
def test_everybody_finishes_however_optimistic_admission_is(
    shapes: list[tuple[int, int, int, int]], num_pages: int
) -> None:
    subject = ContinuousScheduler(
        PagePool(num_pages, PAGE_TOKENS),
        max_running=8,
        step_tokens=16,
        max_waiting=64,
        expected_share=0.0,
    )
    sequences = {
        number: Sequence(
            id=number,
            prompt_ids=TEXTS[text][:prompt],
            max_new_tokens=new,
            sampling=GREEDY,
            priority=priority,
        )
        for number, (text, prompt, new, priority) in enumerate(shapes)
    }
    engine = ModelEngine(sequences, num_pages=num_pages, page_tokens=PAGE_TOKENS)
    ended = run_to_the_end(subject, engine, [list(sequences.values())])
    assert ended.keys() == sequences.keys()


@given(
    rival=st.integers(0, 2) | st.just(100),
    size=st.integers(1, 24),
    deadline=st.none() | st.integers(1, 40),
    expected_share=st.sampled_from([0.0, 1.0]),
)
@settings(deadline=None, max_examples=12)
def test_nobody_waits_for_ever_behind_newcomers_of_higher_priority(
    rival: int, size: int, deadline: int | None, expected_share: float
) -> None:
    subject = ContinuousScheduler(
        PagePool(12, PAGE_TOKENS),
        max_running=2,
        step_tokens=16,
        max_waiting=4096,
        expected_share=expected_share,
    )
    patient = Sequence(id=0, prompt_ids=TEXTS[0][:size], max_new_tokens=20, sampling=GREEDY)
    known = {0: patient}

    engine = ModelEngine(known, num_pages=12, page_tokens=PAGE_TOKENS)
    # More come than can be served: one each two steps, and none takes less than five of two.
    for step in range(1000):
        newcomer = Sequence(
            id=step,
            prompt_ids=TEXTS[1 + step // 2 % 2],
            max_new_tokens=4,
            sampling=GREEDY,
            priority=rival,
            arrived_at=float(step),
            deadline=None if deadline is None else float(step + deadline),
        )
        if step % 2 == 0:
            newcomer = known.setdefault(step, newcomer)
            subject.submit(newcomer)
        plan = subject.plan(float(step))
        subject.take_expired()
        assert plan is not None
        engine.run(plan)
        made = each(subject.commit(plan, answer(plan)))
        if any(one.sequence_id == 0 and one.finish for one in made):
            break
    # Whoever came in the time that two steps of priority are worth goes before, and nobody later.
    assert step <= 15 * (min(rival, 2) + 1) * 8 + 100
