"""Which parts of a stretch of memory are taken."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tensorwire_server.memory.ranges import PAGE_BYTES, Ranges


def test_ranges_are_whole_pages_and_the_lowest_is_taken_first() -> None:
    ranges = Ranges(4 * PAGE_BYTES + 5)
    assert ranges.size == 4 * PAGE_BYTES
    assert [ranges.take(n) for n in (1, PAGE_BYTES, PAGE_BYTES + 1)] == [
        0, PAGE_BYTES, 2 * PAGE_BYTES,
    ]  # fmt: skip
    assert ranges.take(1) is None
    ranges.give_back(PAGE_BYTES)
    assert ranges.take(2 * PAGE_BYTES) is None
    assert ranges.take(0) == PAGE_BYTES
    ranges.check_invariants()


def test_neighbours_that_are_free_become_one() -> None:
    ranges = Ranges(3 * PAGE_BYTES)
    starts = [ranges.take(PAGE_BYTES) for _ in range(3)]
    for i in (0, 2, 1):
        start = starts[i]
        assert start is not None
        ranges.give_back(start)
        ranges.check_invariants()
    assert ranges.take(3 * PAGE_BYTES) == 0


def test_a_holder_holds_all_of_the_bytes() -> None:
    ranges = Ranges(4 * PAGE_BYTES)
    ranges.take(2 * PAGE_BYTES)
    assert ranges.holder(0, 2 * PAGE_BYTES) == 0
    assert ranges.holder(PAGE_BYTES, 7) == 0
    assert ranges.holder(0, 2 * PAGE_BYTES + 1) is None
    assert ranges.holder(3 * PAGE_BYTES, 1) is None
    assert ranges.holder(-1, 1) is None


@settings(deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_order_of_taking_and_giving_back_keeps_the_books(chance: Any) -> None:
    ranges = Ranges(32 * PAGE_BYTES)
    taken: list[int] = []
    for _ in range(40):
        if taken and chance.random() < 0.5:
            ranges.give_back(taken.pop(chance.randrange(len(taken))))
        else:
            start = ranges.take(chance.randrange(6 * PAGE_BYTES))
            taken += [] if start is None else [start]
        ranges.check_invariants()
    for start in taken:
        ranges.give_back(start)
    ranges.check_invariants()
    assert ranges.take(32 * PAGE_BYTES) == 0
