"""What the scheduler decides, with a torch-free engine that answers at once."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from emissions import Emission, each
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorwire_server.scheduling.continuous import (
    ContinuousScheduler,
    NeverFits,
    WaitingFull,
)
from tensorwire_server.scheduling.pages import PagePool
from tensorwire_server.scheduling.sequences import Sequence, SequenceState
from tensorwire_server.scheduling.work import Sampling, StepPlan, StepResult

from .model_engine import ModelEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

GREEDY = Sampling(temperature=0.0, top_k=None, top_p=1.0, seed=0)
PAGE_TOKENS = 4
STOP = 99


def sequence(
    number: int,
    *,
    prompt: int = 3,
    max_new_tokens: int = 4,
    so_far: tuple[int, ...] = (),
    deadline: float | None = None,
    priority: int = 0,
    arrived_at: float = 0.0,
    tenant: str | None = None,
) -> Sequence:
    """Make one that shares nothing with others, unless it is told a tenant."""
    return Sequence(
        id=number,
        prompt_ids=tuple(range(1, prompt + 1)),
        so_far=so_far,
        max_new_tokens=max_new_tokens,
        sampling=GREEDY,
        stop_ids=frozenset({STOP}),
        deadline=deadline,
        priority=priority,
        arrived_at=arrived_at,
        tenant=str(number) if tenant is None else tenant,
    )


def scheduler(
    *, num_pages: int = 64, max_running: int = 4, step_tokens: int = 16, max_waiting: int = 16
) -> ContinuousScheduler:
    pool = PagePool(num_pages, PAGE_TOKENS)
    return ContinuousScheduler(
        pool, max_running=max_running, step_tokens=step_tokens, max_waiting=max_waiting
    )


def answer(plan: StepPlan, token_id: int = 50) -> StepResult:
    return StepResult(
        tokens={row.sequence_id: token_id for row in plan.rows if row.sample}, failed={}
    )


def steps(subject: ContinuousScheduler) -> Iterator[tuple[StepPlan, list[Emission]]]:
    """Run to the end."""
    while (plan := subject.plan(0.0)) is not None:
        seen = replace(plan, rows=tuple(map(replace, plan.rows)))  # rows are lent, and move on
        emissions = each(subject.commit(plan, answer(plan)))
        subject.check_invariants()
        yield seen, emissions


def fed(plan: StepPlan) -> dict[int, tuple[int, ...]]:
    return {row.sequence_id: row.token_ids for row in plan.rows}


def test_a_sequence_is_read_then_continued_then_released() -> None:
    subject = scheduler()
    subject.submit(sequence(7, max_new_tokens=2))
    seen = list(steps(subject))
    assert [fed(plan) for plan, _ in seen] == [{7: (1, 2, 3)}, {7: (50,)}, {}]
    assert [plan.released for plan, _ in seen] == [(), (), (7,)]
    assert [row.start for plan, _ in seen for row in plan.rows] == [0, 3]
    assert [emission for _, emissions in seen for emission in emissions] == [
        Emission(7, 0, 50, None),
        Emission(7, 1, 50, "length"),
    ]


def test_nothing_to_do_is_no_plan() -> None:
    assert scheduler().plan(0.0) is None


def test_a_stop_token_is_emitted_and_ends_the_sequence() -> None:
    subject = scheduler()
    subject.submit(sequence(1))
    plan = subject.plan(0.0)
    assert plan is not None
    (emission,) = each(subject.commit(plan, answer(plan, STOP)))
    assert (emission.token_id, emission.finish) == (STOP, "stop")
    assert subject.num_running == 0


def test_a_stop_token_as_the_last_allowed_token_is_a_stop() -> None:
    subject = scheduler()
    subject.submit(sequence(1, max_new_tokens=1))
    plan = subject.plan(0.0)
    assert plan is not None
    assert each(subject.commit(plan, answer(plan, STOP)))[0].finish == "stop"


def test_a_long_prompt_is_read_in_chunks_and_sampled_once() -> None:
    subject = scheduler(step_tokens=5)
    subject.submit(sequence(1, prompt=12, max_new_tokens=1))
    seen = [plan for plan, _ in steps(subject)]
    assert [fed(plan).get(1) for plan in seen] == [
        (1, 2, 3, 4, 5),
        (6, 7, 8, 9, 10),
        (11, 12),
        None,
    ]
    assert [row.sample for plan in seen for row in plan.rows] == [False, False, True]
    assert [len(row.pages) for plan in seen for row in plan.rows] == [2, 3, 3]


def test_decodes_go_first_and_a_long_prompt_takes_what_is_left() -> None:
    subject = scheduler(max_running=3, step_tokens=6)
    subject.submit(sequence(1, prompt=2))
    subject.submit(sequence(2, prompt=2))
    first = subject.plan(0.0)
    assert first is not None
    subject.commit(first, answer(first))
    subject.submit(sequence(3, prompt=10))
    second = subject.plan(0.0)
    assert second is not None
    assert fed(second) == {1: (50,), 2: (50,), 3: (1, 2, 3, 4)}


def test_who_ended_with_the_step_is_not_in_the_next_one() -> None:
    # As many run as before: the one that had no place in the step.
    subject = scheduler(max_running=2, step_tokens=4)
    subject.submit(sequence(1, prompt=4, max_new_tokens=1))
    subject.submit(sequence(2, prompt=5))
    assert [fed(plan).keys() for plan, _ in steps(subject)][:2] == [{1}, {2}]


def test_tokens_of_an_earlier_attempt_are_fed_and_numbering_goes_on() -> None:
    subject = scheduler()
    subject.submit(sequence(1, prompt=2, so_far=(30, 31), max_new_tokens=4))
    seen = list(steps(subject))
    assert fed(seen[0][0]) == {1: (1, 2, 30, 31)}
    emitted = [(e.index, e.finish) for _, emissions in seen for e in emissions]
    assert emitted == [(2, None), (3, "length")]


def test_the_higher_priority_goes_first_then_the_earlier_arrival() -> None:
    subject = scheduler(max_running=1)
    for number, priority, arrived_at in [(1, 0, 2.0), (2, 0, 1.0), (3, 5, 3.0), (4, 0, 2.0)]:
        subject.submit(sequence(number, priority=priority, arrived_at=arrived_at))
    order = [e.sequence_id for _, emissions in steps(subject) for e in emissions if e.finish]
    assert order == [3, 2, 1, 4]


def test_a_full_queue_refuses_with_the_numbers() -> None:
    subject = scheduler(max_waiting=2)
    subject.submit(sequence(1))
    subject.submit(sequence(2))
    with pytest.raises(WaitingFull) as caught:
        subject.submit(sequence(3))
    assert (caught.value.queued, caught.value.limit) == (2, 2)


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(NeverFits) as caught:
        scheduler(num_pages=2).submit(sequence(1, prompt=5, max_new_tokens=4))
    assert (caught.value.needed_tokens, caught.value.limit_tokens) == (9, 8)


def test_an_id_in_use_is_refused() -> None:
    subject = scheduler()
    subject.submit(sequence(1))
    with pytest.raises(ValueError, match="already known"):
        subject.submit(sequence(1))


def test_a_short_sequence_does_not_overtake_a_long_one_that_waits_for_pages() -> None:
    subject = scheduler(num_pages=4, max_running=4)
    subject.submit(sequence(1, prompt=6, max_new_tokens=2))  # 2 pages
    subject.submit(sequence(2, prompt=10, max_new_tokens=2))  # 3 pages: must wait
    subject.submit(sequence(3, prompt=2, max_new_tokens=2))  # 1 page: would fit
    plan = subject.plan(0.0)
    assert plan is not None
    assert fed(plan).keys() == {1}


def test_a_cancelled_sequence_is_released_before_the_next_step_and_frees_its_pages() -> None:
    subject = scheduler(num_pages=2, max_running=4)
    subject.submit(sequence(1))
    subject.submit(sequence(2))
    plan = subject.plan(0.0)
    assert plan is not None
    assert fed(plan).keys() == {1}
    subject.commit(plan, answer(plan))
    assert subject.cancel(1)
    plan = subject.plan(0.0)
    assert plan is not None
    assert plan.released == (1,)
    assert fed(plan).keys() == {2}


def test_a_cancel_while_the_step_runs_swallows_its_token() -> None:
    subject = scheduler()
    subject.submit(sequence(1))
    plan = subject.plan(0.0)
    assert plan is not None
    assert subject.cancel(1)
    assert each(subject.commit(plan, answer(plan))) == []
    plan = subject.plan(0.0)
    assert plan is not None
    assert (plan.rows, plan.released) == ((), (1,))


def test_an_id_used_again_while_the_old_step_runs_gets_no_old_token() -> None:
    subject = scheduler()
    subject.submit(sequence(1))
    plan = subject.plan(0.0)
    assert plan is not None
    subject.cancel(1)
    subject.submit(sequence(1, prompt=2))
    assert each(subject.commit(plan, answer(plan))) == []
    plan = subject.plan(0.0)
    assert plan is not None
    assert (fed(plan), plan.released) == ({1: (1, 2)}, (1,))


def test_a_waiting_sequence_that_is_cancelled_leaves_no_trace() -> None:
    subject = scheduler()
    subject.submit(sequence(1))
    assert subject.cancel(1)
    assert subject.plan(0.0) is None
    subject.check_invariants()


def test_cancelling_the_unknown_is_false() -> None:
    assert not scheduler().cancel(5)


def test_submits_and_cancels_behind_a_blocked_head_do_not_grow_the_queue() -> None:
    subject = scheduler(num_pages=2, max_waiting=4)
    subject.submit(sequence(1))
    subject.plan(0.0)
    subject.submit(sequence(2))
    for number in range(3, 1000):
        subject.submit(sequence(number))
        subject.cancel(number)
    subject.check_invariants()
    assert len(subject._queue) <= 32


def test_expired_sequences_leave_before_the_step_waiting_or_running() -> None:
    subject = scheduler(max_running=1)
    subject.submit(sequence(1, deadline=10.0))
    subject.submit(sequence(2, deadline=10.0))
    subject.submit(sequence(3, deadline=20.0))
    plan = subject.plan(9.0)
    assert plan is not None
    subject.commit(plan, answer(plan))
    plan = subject.plan(10.0)
    assert plan is not None
    assert (set(fed(plan)), plan.released) == ({3}, (1,))
    assert subject.take_expired() == [1, 2]
    assert subject.take_expired() == []


def test_a_failed_sequence_leaves_and_says_why_while_the_others_go_on() -> None:
    subject = scheduler()
    subject.submit(sequence(1))
    subject.submit(sequence(2))
    plan = subject.plan(0.0)
    assert plan is not None
    emissions = subject.commit(plan, StepResult(tokens={2: 50}, failed={1: "non-finite logits"}))
    assert emissions.sequence_ids == [2]
    assert subject.take_failed() == {1: "non-finite logits"}
    assert subject.take_failed() == {}
    plan = subject.plan(0.0)
    assert plan is not None
    assert (set(fed(plan)), plan.released) == ({2}, (1,))


def test_a_plan_that_was_not_committed_is_planned_again() -> None:
    subject = scheduler()
    subject.submit(sequence(1))
    lost = subject.plan(0.0)
    again = subject.plan(0.0)
    assert lost == again
    assert again is not None
    with pytest.raises(AssertionError, match="latest plan"):
        subject.commit(StepPlan(rows=(), released=()), answer(again))
    assert len(each(subject.commit(again, answer(again)))) == 1


def test_counts_say_who_waits_and_who_runs() -> None:
    subject = scheduler(max_running=2)
    for number in range(3):
        subject.submit(sequence(number))
    assert (subject.num_waiting, subject.num_running) == (3, 0)
    subject.plan(0.0)
    assert (subject.num_waiting, subject.num_running) == (1, 2)


def test_a_budget_below_the_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="step_tokens"):
        scheduler(max_running=8, step_tokens=7)


def run_one(
    subject: ContinuousScheduler,
    token_id: int = 50,
    *,
    takes: Callable[[StepPlan], float] = lambda plan: 0.0,
) -> StepPlan:
    plan = subject.plan(0.0)
    assert plan is not None
    seen = replace(plan, rows=tuple(map(replace, plan.rows)))
    subject.commit(plan, answer(plan, token_id), took_s=takes(plan))
    subject.check_invariants()
    return seen


def test_within_a_priority_the_nearer_deadline_goes_first() -> None:
    subject = scheduler(max_running=1)
    for number, deadline in [(1, None), (2, 25.0), (3, 9.0), (4, 100.0)]:
        subject.submit(sequence(number, deadline=deadline))
    order = [e.sequence_id for _, emissions in steps(subject) for e in emissions if e.finish]
    assert order == [3, 2, 1, 4]


def test_a_priority_is_worth_30_seconds_of_arrival() -> None:
    subject = scheduler(max_running=1)
    for number, priority, arrived_at in [(1, 0, 100.0), (2, 1, 129.0), (3, 1, 131.0)]:
        subject.submit(sequence(number, priority=priority, arrived_at=arrived_at))
    order = [e.sequence_id for _, emissions in steps(subject) for e in emissions if e.finish]
    assert order == [2, 1, 3]


@pytest.mark.parametrize(
    ("priority", "arrived_at", "order"),
    [(100, 159.0, [2, 1]), (100, 161.0, [1, 2]), (-100, 41.0, [1, 2]), (-100, 39.0, [2, 1])],
)
def test_the_highest_priority_gets_a_minute_ahead_and_no_more(
    priority: int, arrived_at: float, order: list[int]
) -> None:
    subject = scheduler(max_running=1)
    subject.submit(sequence(1, arrived_at=100.0))
    subject.submit(sequence(2, priority=priority, arrived_at=arrived_at))
    assert [e.sequence_id for _, made in steps(subject) for e in made if e.finish] == order


# -- prefixes --------------------------------------------------------------------------------------


def test_a_text_that_begins_like_one_before_begins_with_its_pages() -> None:
    subject = scheduler()
    subject.submit(sequence(1, prompt=11, max_new_tokens=1, tenant="a"))
    run_one(subject)
    subject.submit(sequence(2, prompt=13, max_new_tokens=1, tenant="a"))
    plan = run_one(subject)
    pages = tuple(save.page for save in plan.saves)
    assert [(save.sequence_id, save.start, save.end) for save in plan.saves] == [
        (1, 0, 4),
        (1, 4, 8),
    ]
    assert [(load.sequence_id, load.pages) for load in plan.loads] == [(2, pages)]
    assert plan.loads[0].token_ids == tuple(range(1, 9))
    assert fed(plan) == {2: (9, 10, 11, 12, 13)}
    assert plan.rows[0].start == 8
    stats = subject.stats()
    assert (stats["prefix_asked_tokens"], stats["prefix_hit_tokens"]) == (24, 8)
    assert stats["prefix_hit_rate"] == round(8 / 24, 4)


def test_of_a_text_that_is_all_there_the_last_token_is_fed_for_its_logits() -> None:
    subject = scheduler()
    for number in (1, 2):
        subject.submit(sequence(number, prompt=8, max_new_tokens=1, tenant="a"))
        plan = run_one(subject)
    assert fed(plan) == {2: (5, 6, 7, 8)}


@pytest.mark.parametrize("prompt", [6, 7, 8, 10])
def test_choices_of_one_prompt_have_it_computed_once_all_but_its_last_token(prompt: int) -> None:
    subject = scheduler()
    for number in (1, 2, 3):
        subject.submit(sequence(number, prompt=prompt, tenant="a"))
    whole = tuple(range(1, prompt + 1))
    assert fed(run_one(subject)) == {1: whole}
    plan = run_one(subject)
    assert fed(plan) == {1: (50,), 2: whole[-1:], 3: whole[-1:]}
    assert [load.token_ids for load in plan.loads] == [whole[:-1]] * 2
    # Pages of prompts are saved as they are read, what is behind the last one for whoever wants it.
    ends = [(one.sequence_id, one.start, one.end) for one in plan.saves if one.end == prompt - 1]
    assert ends == [(1, (prompt - 1) // 4 * 4, prompt - 1)]
    assert subject.stats()["prefix_hit_tokens"] == 2 * (prompt - 1)


def test_nobody_waits_a_step_for_less_than_a_page() -> None:
    subject = scheduler()
    for number in (1, 2):
        subject.submit(sequence(number, prompt=4, tenant="a"))
    assert fed(run_one(subject)) == {1: (1, 2, 3, 4), 2: (1, 2, 3, 4)}
    subject.submit(sequence(3, prompt=4, tenant="a"))
    assert fed(run_one(subject)) == {1: (50,), 2: (50,), 3: (4,)}  # but what is there it takes


def test_a_choice_that_comes_later_begins_with_what_one_that_still_runs_has() -> None:
    subject = scheduler()
    subject.submit(sequence(1, prompt=7, max_new_tokens=6, tenant="a"))
    for _ in range(3):
        run_one(subject)
    assert subject.stats()["pages_cached"] == 1, "what nobody asked for was saved"
    subject.submit(sequence(2, prompt=7, max_new_tokens=6, tenant="a"))
    subject.submit(sequence(3, prompt=7, max_new_tokens=6, tenant="b"))
    subject.submit(sequence(4, prompt=6, max_new_tokens=6, tenant="a"))
    plan = run_one(subject)
    assert fed(plan) == {1: (50,), 2: (7,), 3: tuple(range(1, 8)), 4: (5, 6)}


def test_of_what_is_gone_only_whole_pages_are_found() -> None:
    subject = scheduler()
    for number in (1, 2):
        subject.submit(sequence(number, prompt=7, max_new_tokens=1, tenant="a"))
        plan = run_one(subject)
    assert fed(plan) == {2: (5, 6, 7)}


def test_who_waits_for_the_end_of_a_prompt_goes_on_alone_when_its_reader_leaves() -> None:
    subject = scheduler(step_tokens=4)
    for number in (1, 2):
        subject.submit(sequence(number, prompt=7, tenant="a"))
    run_one(subject)
    assert fed(run_one(subject)) == {1: (5, 6, 7)}
    subject.cancel(1)
    assert fed(run_one(subject)) == {2: (5, 6, 7)}


def test_the_end_of_a_prompt_is_copied_only_where_there_is_room() -> None:
    for num_pages, token_ids in [(5, (5, 6, 7)), (6, (7,))]:
        subject = optimist(num_pages)
        for number in (1, 2):  # each takes two pages, and one is cached
            subject.submit(sequence(number, prompt=7, tenant="a"))
            plan = run_one(subject)
        assert fed(plan) == {1: (50,), 2: token_ids}


def test_another_tenant_finds_nothing_unless_prefixes_are_shared() -> None:
    for share, hits in [(False, 0), (True, 8)]:
        subject = ContinuousScheduler(
            PagePool(64, PAGE_TOKENS),
            max_running=4,
            step_tokens=16,
            max_waiting=16,
            share_prefixes=share,
        )
        for number in (1, 2):
            subject.submit(sequence(number, prompt=11, max_new_tokens=1, tenant=str(number)))
            run_one(subject)
        assert subject.stats()["prefix_hit_tokens"] == hits


def test_an_answer_is_found_by_the_text_that_goes_on_from_it() -> None:
    subject = scheduler()
    subject.submit(sequence(1, prompt=3, max_new_tokens=6, tenant="a"))
    for _ in range(7):
        run_one(subject)
    going_on = replace_prompt(sequence(2, tenant="a"), (1, 2, 3, 50, 50, 50, 50, 50, 50, 7))
    subject.submit(going_on)
    assert fed(run_one(subject)) == {2: (50, 7)}  # the last token was never fed, so never cached


def replace_prompt(one: Sequence, prompt_ids: tuple[int, ...]) -> Sequence:
    return Sequence(
        id=one.id,
        prompt_ids=prompt_ids,
        max_new_tokens=one.max_new_tokens,
        sampling=one.sampling,
        tenant=one.tenant,
    )


def test_who_needs_what_another_one_computes_waits_for_it_and_then_finds_it() -> None:
    subject = scheduler(step_tokens=8)
    for number in (1, 2, 3):
        subject.submit(sequence(number, prompt=13, max_new_tokens=2, tenant="a"))
    subject.submit(sequence(4, prompt=14, max_new_tokens=9))
    plans = [run_one(subject) for _ in range(3)]
    assert [fed(plan) for plan in plans] == [
        {1: tuple(range(1, 9))},
        {1: tuple(range(9, 14)), 4: (1, 2, 3)},  # who shares nothing does not wait
        {1: (50,), 2: (13,), 3: (13,), 4: (4, 5, 6, 7, 8)},
    ]
    assert [len(load.pages) for load in plans[2].loads] == [3, 3]
    assert subject.stats()["prefix_hit_tokens"] == 24


def test_who_waits_for_a_prefix_goes_on_alone_when_its_reader_leaves() -> None:
    subject = scheduler(step_tokens=4)
    for number in (1, 2):
        subject.submit(sequence(number, prompt=13, tenant="a"))
    run_one(subject)
    subject.cancel(1)
    plan = run_one(subject)
    assert fed(plan) == {2: (5, 6, 7, 8)}  # the page that was computed is not lost


def test_who_was_held_back_four_times_is_held_back_no_more() -> None:
    subject = scheduler(step_tokens=4)
    patient = sequence(0, prompt=13, tenant="a")
    subject.submit(patient)
    for number in range(1, 6):
        # One of higher priority that begins to compute the same, and leaves.
        subject.submit(sequence(number, prompt=13, tenant="a", priority=1))
        row = run_one(subject).rows[0]
        if row.sequence_id == 0:
            break
        subject.cancel(number)
        subject._pool.forget_page(subject._pool.find(patient.digests[row.start // 4]) or 0)
        subject._prefixes._note_evicted()
    assert patient.num_held_back <= 4


def test_what_failed_is_not_kept_for_others() -> None:
    subject = scheduler(step_tokens=8)
    subject.submit(sequence(1, prompt=11, tenant="a"))
    run_one(subject)
    plan = subject.plan(0.0)
    assert plan is not None
    assert len(plan.saves) == 2
    subject.commit(plan, StepResult(tokens={}, failed={1: "non-finite logits"}))
    subject.check_invariants()
    subject.submit(sequence(2, prompt=11, tenant="a"))
    assert fed(run_one(subject)) == {2: tuple(range(1, 9))}


def test_what_a_broken_step_may_not_have_saved_is_not_kept() -> None:
    subject = scheduler(step_tokens=8)
    subject.submit(sequence(1, prompt=8, max_new_tokens=1, tenant="a"))
    run_one(subject)
    subject.submit(sequence(2, prompt=2))
    plan = subject.plan(0.0)
    assert plan is not None
    assert len(plan.saves) == 2
    assert subject.fail(plan) == [2]
    subject.check_invariants()
    subject.submit(sequence(3, prompt=8, tenant="a"))
    plan = run_one(subject)
    assert fed(plan) == {3: tuple(range(1, 9))}
    assert plan.released == (1, 2)


def test_who_was_to_begin_with_what_a_broken_step_did_not_save_computes_it_itself() -> None:
    subject = scheduler(step_tokens=16)
    known: dict[int, Sequence] = {}
    engine = ModelEngine(known, num_pages=128, page_tokens=PAGE_TOKENS)
    for number, prompt, tenant in [(1, 12, "a"), (2, 60, "c"), (3, 7, "d"), (4, 20, "a")]:
        known[number] = sequence(number, prompt=prompt, tenant=tenant)

    def run_engine() -> StepPlan:
        plan = subject.plan(0.0)
        assert plan is not None
        engine.run(plan)
        return plan

    subject.submit(known[1])
    plan = run_engine()
    subject.commit(plan, answer(plan))
    for number in (2, 3, 4):  # 2 and 3 take all of the step, 4 finds what 1 has computed
        subject.submit(known[number])
    broken = subject.plan(0.0)
    assert broken is not None
    assert (len(broken.saves), len(broken.loads), subject.num_running) == (3, 0, 4)
    assert set(subject.fail(broken)) == {1, 2, 3}
    subject.check_invariants()
    ended = set()
    while subject.num_running or subject.num_waiting:
        plan = run_engine()
        ended |= {one.sequence_id for one in each(subject.commit(plan, answer(plan))) if one.finish}
        subject.check_invariants()
    assert ended == {4}


def test_what_was_used_longest_ago_goes_first_and_of_a_text_its_end() -> None:
    subject = scheduler(num_pages=12)
    for number, tenant in [(1, "a"), (2, "b"), (3, "a")]:
        subject.submit(sequence(number, prompt=12, max_new_tokens=1, tenant=tenant))
        run_one(subject)
    assert subject.stats()["pages_cached"] == 6
    # Takes 4 pages and keeps as many, where 6 are free.
    subject.submit(sequence(4, prompt=16, max_new_tokens=1, tenant="c"))
    run_one(subject)
    found = {}
    for number, tenant in [(5, "a"), (6, "b")]:
        one = sequence(number, prompt=13, tenant=tenant)
        found[tenant] = len(subject._prefixes.find(one))
    assert found == {"a": 3, "b": 1}
    assert subject.stats()["page_evictions"] == 2


def test_who_waits_for_room_gets_that_of_pages_which_have_been_loaded() -> None:
    subject = scheduler(num_pages=14, step_tokens=64)
    subject.submit(sequence(1, prompt=24, max_new_tokens=1, tenant="a"))
    run_one(subject)
    subject.submit(sequence(2, prompt=25, max_new_tokens=7, tenant="a"))
    subject.submit(sequence(3, prompt=4, max_new_tokens=2))
    assert len(run_one(subject).loads[0].pages) == 6
    # 2 has 7 pages and will want 1 more, 3 wants 2: no room while those that 2 loads are pinned.
    assert subject.num_waiting == 1
    assert 3 in fed(run_one(subject))


class CountingPool(PagePool):
    """Counts the pages that were looked at."""

    num_looked_at = 0

    def num_idle(self, pages: Iterable[int]) -> int:
        looked_at = list(pages)
        self.num_looked_at += len(looked_at)
        return super().num_idle(looked_at)

    def touch(self, digests: Iterable[bytes]) -> None:
        touched = list(digests)
        self.num_looked_at += len(touched)
        super().touch(touched)


@pytest.mark.skipif(
    "TENSORWIRE_TEST_COMPILED" in os.environ, reason="compiled classes have no subclasses like this"
)
def test_what_prefixes_cost_grows_with_a_prompt_and_not_with_its_square() -> None:
    pool = CountingPool(1600, PAGE_TOKENS)
    subject = ContinuousScheduler(pool, max_running=2, step_tokens=16, max_waiting=2)
    subject.submit(sequence(1, prompt=3200, max_new_tokens=1, tenant="a"))
    while subject.num_waiting or subject.num_running:
        plan = subject.plan(0.0)
        assert plan is not None
        subject.commit(plan, answer(plan))
    assert subject.stats()["pages_cached"] == 800
    assert pool.num_looked_at <= 4 * 800, "while it was read"
    pool.num_looked_at = 0
    # 1200 pages for itself: of the 800 that it could load, 400 must go for the room.
    subject.submit(sequence(2, prompt=4800, max_new_tokens=1, tenant="a"))
    plan = run_one(subject)
    assert len(plan.loads[0].pages) == 400
    assert pool.num_looked_at <= 4 * 800, "when it was admitted"


# -- preemption ------------------------------------------------------------------------------------


def optimist(num_pages: int) -> ContinuousScheduler:
    """Make one that admits whoever has room for a prompt."""
    return ContinuousScheduler(
        PagePool(num_pages, PAGE_TOKENS),
        max_running=4,
        step_tokens=16,
        max_waiting=16,
        expected_share=0.0,
    )


def test_when_pages_are_short_the_last_in_the_queues_order_gives_its_own_back() -> None:
    subject = optimist(num_pages=4)
    for number, priority in [(1, -1), (2, 0), (3, 1)]:
        subject.submit(sequence(number, prompt=3, max_new_tokens=6, priority=priority))
    plans = [run_one(subject) for _ in range(3)]
    assert set(fed(plans[1])) == {1, 2, 3}
    # All three fill their page with the second token, and one page is free.
    assert (set(fed(plans[2])), plans[2].released) == ({2, 3}, (1,))
    assert subject.stats()["preemptions"] == 1


def test_what_was_preempted_finds_what_it_had_computed_or_counts_what_it_has_not() -> None:
    subject = optimist(num_pages=5)
    subject.submit(sequence(1, prompt=7, max_new_tokens=8))
    subject.submit(sequence(2, prompt=7, max_new_tokens=8))
    emitted: dict[int, list[int]] = {1: [], 2: []}
    for _, emissions in steps(subject):
        for one in emissions:
            emitted[one.sequence_id].append(one.index)
    assert emitted == {1: list(range(8)), 2: list(range(8))}, "an index missing or twice"
    stats = subject.stats()
    assert stats["preemptions"] >= 1
    assert stats["recomputed_tokens"] > 0
    assert stats["prefix_asked_tokens"] == 14, "what is read again is not asked again"


@pytest.mark.parametrize(("end", "learnt"), [("stop token", 3), ("stop string", 3), ("cancel", 2)])
def test_answers_that_end_early_let_more_sequences_in(end: str, learnt: int) -> None:
    subject = scheduler(num_pages=12, max_running=4)

    def largest_batch(first: int) -> int:
        for number in range(first, first + 3):
            subject.submit(sequence(number, prompt=3, max_new_tokens=21))
        largest = 0
        while (plan := subject.plan(0.0)) is not None:
            largest = max(largest, len(plan.rows))
            for one in each(
                subject.commit(plan, answer(plan, STOP if end == "stop token" else 50))
            ):
                if one.finish is None:
                    assert subject.cancel(one.sequence_id, is_whole=end == "stop string")
        return largest

    assert largest_batch(0) == 2
    for number in range(10, 60, 3):
        largest_batch(number)
    assert largest_batch(100) == learnt


@given(st.lists(st.tuples(st.integers(2, 12), st.integers(1, 5)), min_size=1, max_size=12))
@settings(deadline=None)
def test_equal_priorities_are_admitted_in_the_order_of_arrival(
    shapes: list[tuple[int, int]],
) -> None:
    subject = scheduler(num_pages=6, max_running=3, step_tokens=8)
    arrived = [
        sequence(number, prompt=prompt, max_new_tokens=new)
        for number, (prompt, new) in enumerate(shapes)
    ]
    for one in arrived:
        subject.submit(one)
    for _ in steps(subject):
        waiting = [one.state is SequenceState.WAITING for one in arrived]
        assert waiting == sorted(waiting), "one was overtaken"
    assert not any(waiting)


# -- reading ---------------------------------------------------------------------------------------


def test_the_higher_priority_is_read_first_though_it_was_admitted_last() -> None:
    subject = scheduler(step_tokens=8)
    subject.submit(sequence(1, prompt=40, priority=-1))
    run_one(subject)
    subject.submit(sequence(2, prompt=30, priority=1))
    assert [fed(run_one(subject)).keys() for _ in range(3)] == [{2}, {2}, {2}]


def test_a_short_prompt_does_not_wait_for_a_long_one_to_be_read() -> None:
    subject = scheduler(num_pages=200, step_tokens=16)
    subject.submit(sequence(1, prompt=400))
    run_one(subject)
    subject.submit(sequence(2, prompt=8))
    assert {number: len(ids) for number, ids in fed(run_one(subject)).items()} == {1: 8, 2: 8}
    assert {number: len(ids) for number, ids in fed(run_one(subject)).items()} == {1: 15, 2: 1}


def test_a_long_prompt_is_read_on_however_many_short_ones_come() -> None:
    subject = scheduler(num_pages=400, max_running=3, step_tokens=16, max_waiting=64)
    patient = sequence(0, prompt=160)
    subject.submit(patient)
    for number in range(1, 20):
        for newcomer in range(3):
            subject.submit(sequence(3 * number + newcomer, prompt=15, max_new_tokens=1))
        assert 8 <= len(fed(run_one(subject))[0]) < 16
        assert patient.num_cached >= 8 * number


def reporting(
    number: int, *, logprobs: int | None = None, prompt_logprobs: int | None = None
) -> Sequence:
    one = sequence(number, prompt=1000)
    one.sampling = replace(GREEDY, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    return one


def test_log_probabilities_of_prompts_are_asked_for_by_the_piece() -> None:
    subject = scheduler(num_pages=2000, step_tokens=2048)
    for number in (1, 2):
        subject.submit(reporting(number, prompt_logprobs=0))
    subject.submit(sequence(3, prompt=1000))
    subject.submit(reporting(4, logprobs=2))
    read: Counter[int] = Counter()
    for at, (plan, _) in enumerate(steps(subject)):
        counts = {row.sequence_id: len(row.token_ids) for row in plan.rows}
        if at == 0:
            assert counts[3] == 1000, "it reports nothing"
            assert counts[4] == 792, "nor does this one before its last token"
        assert sum(row.num_logits for row in plan.rows) <= 256 + 4
        read.update(counts)
    assert read == {1: 1003, 2: 1003, 3: 1003, 4: 1003}


def test_what_reporting_steps_take_says_nothing_of_others() -> None:
    subject = scheduler(num_pages=2000, step_tokens=512)
    subject.submit(sequence(1, prompt=3, max_new_tokens=1000))
    for _ in range(20):
        run_one(subject, takes=takes_s)
    subject.submit(reporting(2, prompt_logprobs=0))
    for _ in range(10):
        run_one(subject, takes=lambda plan: 50 * takes_s(plan))
    subject.cancel(2)
    subject.submit(sequence(3, prompt=1000))
    assert len(fed(run_one(subject))[3]) >= 20


# -- pace ------------------------------------------------------------------------------------------


def takes_s(plan: StepPlan, *, decode_s: float = 0.08, token_s: float = 0.002) -> float:
    """Return how long a plan would take a machine that pays for prompts by the token."""
    read = sum(len(row.token_ids) for row in plan.rows if len(row.token_ids) > 1)
    return decode_s * any(len(row.token_ids) == 1 for row in plan.rows) + token_s * read


@pytest.mark.parametrize("arrivals", [[8], [4, 4], [1] * 8], ids=["together", "in two", "singly"])
def test_beside_running_streams_a_prompt_takes_at_most_the_time_that_they_do(
    arrivals: list[int],
) -> None:
    subject = scheduler(num_pages=1280, max_running=16, step_tokens=512)
    numbers = iter(range(100))
    for together in arrivals:
        for _ in range(together):
            subject.submit(sequence(next(numbers), prompt=32, max_new_tokens=300))
        for _ in range(3):
            run_one(subject, takes=takes_s)
    for _ in range(200):
        run_one(subject, takes=takes_s)
    late = sequence(next(numbers), prompt=2000, max_new_tokens=4)
    subject.submit(late)
    took_s = []
    while late.num_new == 0:
        took_s.append(takes_s(run_one(subject, takes=takes_s)))
    assert max(took_s) <= 2.6 * 0.08, "running streams were held up"
    assert len(took_s) <= 100, "the prompt was read in crumbs"


def test_a_step_in_which_the_engine_moves_sequences_reads_no_prompts_beside_streams() -> None:
    subject = scheduler(step_tokens=16)
    subject.submit(sequence(1, prompt=2, max_new_tokens=90))
    run_one(subject)
    subject.submit(sequence(2, prompt=60))
    for moves, lengths in [(True, [1, 15]), (True, [1]), (False, [1]), (False, [1, 15])]:
        plan = subject.plan(0.0)
        assert plan is not None
        assert [len(row.token_ids) for row in plan.rows] == lengths
        subject.commit(plan, replace(answer(plan), moves_next=moves))
    subject.cancel(1)
    for num_tokens in (16, 14):  # there is nobody to spare
        plan = subject.plan(0.0)
        assert plan is not None
        assert [len(row.token_ids) for row in plan.rows] == [num_tokens]
        subject.commit(plan, replace(answer(plan), moves_next=True))


def test_prompts_are_not_slowed_down_for_prompts_of_one_token() -> None:
    subject = scheduler(max_running=32, step_tokens=512, max_waiting=32)
    subject.submit(sequence(1, prompt=200, max_new_tokens=8))
    run_one(subject, takes=takes_s)  # a token of a prompt takes its time
    while subject.num_running:
        run_one(subject, takes=lambda plan: 0.001)  # a step without takes next to none
    for number in range(2, 22):
        subject.submit(sequence(number, prompt=1 + number % 2, max_new_tokens=2))
    assert len(fed(run_one(subject))) == 20, "some waited, though nobody is continued"


def test_beside_a_stream_a_prompt_goes_through_some_layers_at_a_time_and_is_sampled_once() -> None:
    subject = ContinuousScheduler(
        PagePool(64, PAGE_TOKENS), max_running=4, step_tokens=20, max_waiting=16, num_layers=4
    )
    subject.submit(sequence(1, prompt=1, max_new_tokens=40))
    for _ in range(3):
        run_one(subject, takes=lambda _: 1.0)
    subject.submit(sequence(2, prompt=10, max_new_tokens=1))
    run_one(subject, takes=lambda _: 20.0)  # a token takes longer than a step without any
    subject.submit(sequence(3, prompt=16, max_new_tokens=2))
    seen: list[tuple[int, int, tuple[int, int] | None, bool]] = []
    for _ in range(5):
        plan = subject.plan(0.0)
        assert plan is not None
        assert plan.started == (() if seen else (3,))
        (row,) = [row for row in plan.rows if row.sequence_id == 3]
        seen.append((len(row.token_ids), row.start, row.layers, row.sample))
        emitted = each(subject.commit(plan, answer(plan), took_s=9.0))
        assert (3 in [one.sequence_id for one in emitted]) == seen[-1][-1]
        subject.check_invariants()
    assert seen == [
        (16, 0, (0, 1), False),
        (16, 0, (1, 2), False),
        (16, 0, (2, 3), False),
        (16, 0, (3, 4), True),
        (1, 16, None, True),
    ]


def test_what_the_engine_had_to_move_is_forgotten_with_a_step_that_broke() -> None:
    subject = scheduler(step_tokens=500, num_pages=500)
    subject.submit(sequence(1))
    plan = subject.plan(0.0)
    assert plan is not None
    subject.commit(plan, replace(answer(plan), moves_next=True))
    plan = subject.plan(0.0)
    assert plan is not None
    assert subject.fail(plan) == [1]
    # So what the next steps take counts: a prompt's token takes as long as a step without any.
    subject.submit(sequence(2, prompt=10, max_new_tokens=9))
    for took_s in (10.0, 1.0, 1.0):
        plan = subject.plan(0.0)
        assert plan is not None
        subject.commit(plan, answer(plan), took_s=took_s)
    subject.submit(sequence(3, prompt=300))
    assert len(fed(run_one(subject))[3]) == 4
