from __future__ import annotations

import gc
import weakref

import pytest
from tensorwire_protocol.errors import Busy
from tensorwire_server.workers.waiting import Ended, Job, WaitingTexts


class Text:
    """Stands for what a request holds; unlike a str, it can be watched."""

    def encode(self) -> list[int]:
        return [1, 2, 3]


def add(waiting: WaitingTexts, num_chars: int, text: Text | None = None) -> Job[list[int]]:
    text = text or Text()
    return waiting.add(num_chars, text.encode, lambda _: None)


def test_more_than_the_bound_does_not_wait() -> None:
    waiting = WaitingTexts(100)
    jobs = [add(waiting, 60), add(waiting, 40)]
    with pytest.raises(Busy, match="100 characters wait to be tokenized, 1 more would be above"):
        add(waiting, 1)
    assert waiting.num_chars == 100
    jobs[0].drop()
    add(waiting, 60)


def test_one_text_above_the_bound_goes_alone() -> None:
    waiting = WaitingTexts(100)
    add(waiting, 1000)
    with pytest.raises(Busy):
        add(waiting, 1)


def test_a_dropped_text_is_not_kept_for_its_turn() -> None:
    waiting, text = WaitingTexts(), Text()
    job = add(waiting, 60, text)
    alive = weakref.ref(text)
    del text
    gc.collect()
    assert alive() is not None
    job.drop()
    gc.collect()
    assert alive() is None
    with pytest.raises(Ended):
        job.run()
    assert job.finish() is None


def test_room_comes_back_once_whatever_ends_first() -> None:
    waiting = WaitingTexts()
    other, job = add(waiting, 5), add(waiting, 60)
    assert job.run() == [1, 2, 3]
    assert job.finish() is not None
    job.drop()
    assert job.finish() is None
    assert waiting.num_chars == 5
    other.drop()
    assert waiting.num_chars == 0
