"""Which tokens of which prompts join a step, and through which layers they go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tensorwire_server.scheduling.chunks import Chunks
from tensorwire_server.scheduling.sequences import Sequence
from tensorwire_server.scheduling.work import Sampling

if TYPE_CHECKING:
    from collections.abc import Iterator

GREEDY: dict[str, Any] = {"temperature": 0.0, "top_k": None, "top_p": 1.0, "seed": 0}


def prompt(number: int, num_tokens: int, **sampling: Any) -> Sequence:
    sequence = Sequence(
        id=number,
        prompt_ids=tuple(range(num_tokens)),
        max_new_tokens=1,
        sampling=Sampling(**GREEDY | sampling),
    )
    sequence.order = (0.0, number)
    return sequence


def chunks(num_layers: int = 30, most_tokens: int = 1000) -> Chunks:
    return Chunks(num_layers=num_layers, most_tokens=most_tokens)


def steps(
    subject: Chunks, reading: list[Sequence], paced: int | None, budget: int = 1000
) -> Iterator[tuple[dict[int, int], tuple[int, int]]]:
    """Yield by id how many tokens of whom go where, and read them."""
    while reading := [one for one in reading if one.num_to_feed]:
        tokens, layers = subject.next(reading, budget, paced)
        yield {one.id: number for one, number in tokens.items()}, layers
        if layers[1] == subject._num_layers:
            for one, number in tokens.items():
                one.num_cached += number
        subject.note_done()


def test_where_nobody_waits_a_prompt_goes_through_all_layers_at_once() -> None:
    assert [*steps(chunks(), [prompt(1, 1500)], None)] == [
        ({1: 1000}, (0, 30)),
        ({1: 500}, (0, 30)),
    ]


def test_where_there_is_time_for_many_tokens_they_go_through_all_layers() -> None:
    assert [*steps(chunks(), [prompt(1, 200)], 100)] == [({1: 100}, (0, 30))] * 2


def test_where_there_is_time_for_few_more_go_through_some_layers() -> None:
    assert [*steps(chunks(), [prompt(1, 80)], 20)] == [
        ({1: 64}, (0, 8)),
        ({1: 64}, (8, 16)),
        ({1: 64}, (16, 23)),
        ({1: 64}, (23, 30)),
        ({1: 16}, (0, 30)),
    ]


def test_no_step_has_more_to_do_than_there_is_time_for() -> None:
    for paced in range(4, 64):
        for tokens, (first, last) in steps(chunks(), [prompt(1, 128)], paced):
            assert tokens[1] * (last - first) <= paced * 30


def test_chunks_under_way_go_on_as_time_allows() -> None:
    subject, reading = chunks(), [prompt(1, 64)]
    seen = []
    for paced in (20, 0, 9, 64):
        seen.append(subject.next(reading, 1000, paced)[1])
        subject.note_done()
    assert [seen[0], *seen[2:]] == [(0, 8), (8, 12), (12, 30)]
    assert subject.next([], 1000, None)[0] == {}


def test_chunks_under_way_are_finished_at_once_when_nobody_waits() -> None:
    subject, reading = chunks(), [prompt(1, 100)]
    subject.next(reading, 1000, 20)
    subject.note_done()
    assert subject.next(reading, 1000, None) == ({reading[0]: 64}, (8, 30))


def test_who_comes_later_waits_until_they_are_through() -> None:
    subject, first, second = chunks(), prompt(1, 64), prompt(2, 10)
    subject.next([first], 1000, 32)
    subject.note_done()
    assert subject.next([first, second], 1000, 32) == ({first: 64}, (15, 30))
    subject.note_done()
    first.num_cached = 64
    assert subject.next([second], 1000, 32) == ({second: 10}, (0, 30))


def test_what_was_not_done_is_told_again() -> None:
    subject, reading = chunks(), [prompt(1, 64)]
    subject.next(reading, 1000, 20)
    assert subject.next(reading, 1000, 20) == ({reading[0]: 64}, (0, 8))
    subject.note_done()
    subject.next(reading, 1000, 20)
    assert subject.next(reading, 1000, 0)[0] == {}
    subject.note_done()  # of a step without them
    assert subject.next(reading, 1000, 20) == ({reading[0]: 64}, (8, 16))


def test_who_leaves_is_not_waited_for() -> None:
    subject, first, second = chunks(), prompt(1, 32), prompt(2, 32)
    subject.next([first, second], 1000, 20)
    subject.note_done()
    subject.forget(first)
    assert subject.next([second], 1000, 20) == ({second: 32}, (8, 19))
    subject.forget(second)  # while the step runs
    subject.note_done()
    third = prompt(3, 10)
    assert subject.next([third], 1000, 20) == ({third: 10}, (0, 30))


def test_fewer_tokens_are_cut_where_one_layer_of_many_takes_too_long() -> None:
    assert subject_tokens(chunks(num_layers=6), 10) == 32
    assert subject_tokens(chunks(num_layers=6), 11) == 64


def subject_tokens(subject: Chunks, paced: int) -> int:
    return sum(subject.next([prompt(1, 500)], 1000, paced)[0].values())


@pytest.mark.parametrize("subject", [chunks(num_layers=1), chunks(most_tokens=0)])
def test_where_they_cannot_stop_no_more_are_cut_than_there_is_time_for(subject: Chunks) -> None:
    assert subject_tokens(subject, 20) == 20


def test_chunks_that_stay_leave_room_for_all_who_run() -> None:
    assert subject_tokens(chunks(most_tokens=40), 20) == 40


def test_prompts_that_are_reported_on_go_through_all_layers() -> None:
    for what in ("logprobs", "prompt_logprobs"):
        tokens, layers = chunks().next([prompt(1, 500, **{what: 1})], 1000, 20)
        assert (sum(tokens.values()), layers) == (20, (0, 30))
