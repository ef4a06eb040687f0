"""How much of a prompt joins a step, from what steps have taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tensorwire_server.scheduling.pace import Pace

if TYPE_CHECKING:
    from collections.abc import Callable


def learnt(slowdown: float = 2.0, *, decode_s: float = 0.010, token_s: float = 0.0002) -> Pace:
    pace = Pace(slowdown)
    for _ in range(100):
        pace.note(8, 0, decode_s)
    for _ in range(100):
        tokens = pace.prompt_tokens(8, 1)
        pace.note(8, tokens, decode_s + tokens * token_s)
    return pace


@pytest.mark.parametrize(("slowdown", "tokens"), [(2.0, 50), (3.0, 100), (1.5, 25), (1.0, 4)])
def test_prompts_get_the_time_that_running_sequences_may_be_slowed_down_by(
    slowdown: float, tokens: int
) -> None:
    assert abs(learnt(slowdown).prompt_tokens(8, 1) - tokens) <= 2


@pytest.mark.parametrize(
    ("num_prompts", "times"), [(1, 1.0), (4, 1.0), (8, 2.0), (16, 4.0), (24, 6.0), (800, 6.0)]
)
def test_the_more_prompts_there_are_beside_streams_the_more_they_get(
    num_prompts: int, times: float
) -> None:
    pace = learnt()
    assert abs(pace.prompt_tokens(8, num_prompts) - times * pace.prompt_tokens(8, 1)) <= 6
    assert learnt(1.0).prompt_tokens(8, num_prompts) == 4


def test_a_slower_machine_reads_less_in_a_step() -> None:
    assert learnt(token_s=0.0004).prompt_tokens(8, 1) < learnt(token_s=0.0002).prompt_tokens(8, 1)


def test_one_step_that_was_held_up_changes_little() -> None:
    pace = learnt()
    before = pace.prompt_tokens(8, 1)
    pace.note(8, 0, 5.0)
    pace.note(8, before, 5.0)
    assert 0.6 * before <= pace.prompt_tokens(8, 1) <= 1.5 * before


def test_a_prompt_alone_is_a_first_guess_that_mixed_steps_correct() -> None:
    pace = Pace(2.0)
    pace.note(0, 100, 0.1)
    pace.note(8, 0, 0.010)
    assert pace.prompt_tokens(8, 1) == 10
    for _ in range(100):
        tokens = pace.prompt_tokens(8, 1)
        pace.note(8, tokens, 0.010 + tokens * 0.0002)
    assert pace.prompt_tokens(8, 1) >= 45


def test_a_step_of_unknown_time_teaches_nothing() -> None:
    pace = Pace(2.0)
    before = pace.prompt_tokens(8, 1)
    pace.note(8, 0, 0.0)
    pace.note(0, 8, 0.0)
    assert pace.prompt_tokens(8, 1) == before


def test_a_slowdown_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Pace(0.9)


def test_where_prompts_are_always_read_more_streams_are_not_taken_for_dearer_prompts() -> None:
    pace = Pace(2.0)
    pace.note(1, 0, 0.022)
    chunks = []
    for step in range(400):
        num_decodes = min(30, 1 + step // 5)
        chunks.append(pace.prompt_tokens(num_decodes, 1))
        took_s = 0.020 + 0.002 * num_decodes + 0.001 * chunks[-1]
        pace.note(num_decodes, chunks[-1], took_s)
    assert all(chunk == 0 or 60 <= chunk <= 90 for chunk in chunks[-100:])
    assert 2 <= chunks[-100:].count(0) <= 4


def test_pauses_that_measure_nothing_do_not_keep_prompts_back() -> None:
    pace = learnt()
    chunks = []
    for _ in range(200):
        chunks.append(pace.prompt_tokens(8, 1))
        if chunks[-1]:
            pace.note(8, chunks[-1], 0.010 + chunks[-1] * 0.0002)
    assert 2 <= chunks.count(0) <= 16
    assert (0, 0, 0) not in zip(chunks, chunks[1:], chunks[2:], strict=False)


def read_beside(pace: Pace, num_steps: int, decode_s: Callable[[int], float]) -> list[float]:
    """Let a prompt be read whose tokens get dearer; return what the steps took."""
    took = []
    for step in range(num_steps):
        tokens = pace.prompt_tokens(8, 1)
        took.append(decode_s(step) + tokens * (0.0002 + step * 1e-6))
        pace.note(8, tokens, took[-1])
    return took


def test_what_streams_grow_by_while_a_prompt_is_read_is_taken_from_the_prompt() -> None:
    took = read_beside(learnt(2.5), 300, lambda step: 0.010 * (1 + step / 600))
    assert max(took) <= 2.8 * 0.010
    assert sorted(took)[150] >= 2.2 * 0.010


def test_where_prompts_are_read_for_ever_the_bound_follows_the_streams() -> None:
    pace = learnt(2.5)
    read_beside(pace, 100, lambda _: 0.010)
    assert pace.prompt_tokens(8, 1) >= 20
    pace = learnt(2.5)
    for _ in range(4000):
        tokens = pace.prompt_tokens(8, 1)
        pace.note(8, tokens, 0.030 + tokens * 0.0002)
    assert abs(pace.prompt_tokens(8, 1) - 1.5 * 0.030 / 0.0002) <= 25


def test_where_streams_join_the_bound_is_theirs_at_once() -> None:
    pace = learnt(2.5)
    chunks = []
    for _ in range(120):
        chunks.append(pace.prompt_tokens(16, 1))
        pace.note(16, chunks[-1], 0.018 + chunks[-1] * 0.0002)
    assert abs(max(chunks[-5:]) - 1.5 * 0.018 / 0.0002) <= 25


def test_steps_that_are_dear_already_go_without_prompts_but_not_for_ever() -> None:
    pace = learnt()
    usual = pace.prompt_tokens(8, 1)
    assert [pace.prompt_tokens(8, 1, spares=True) for _ in range(18)] == [*[0] * 16, usual, usual]
    chunks = []
    for _ in range(100):
        chunks.append(pace.prompt_tokens(8, 1, spares=True))
        if chunks[-1]:
            pace.note(8, chunks[-1], 0.010 + chunks[-1] * 0.0002)
    assert 18 <= chunks.count(0) <= 26
