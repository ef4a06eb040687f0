"""Who is given up when too much waits, and who does not read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorwire_protocol.limits import Limits
from tensorwire_server.gateway.bounds import ReadWatch, SharedBytes

LIMITS = Limits(send_high_water_bytes=100, send_stuck_s=10.0)


def test_the_largest_goes_first_and_only_as_many_as_must() -> None:
    shared: SharedBytes[str] = SharedBytes(100)
    shared.add("a", 30)
    shared.add("b", 50)
    shared.add("c", 20)
    assert shared.take_largest() is None
    shared.add("c", 15)
    assert shared.take_largest() == "b"
    assert shared.take_largest() is None
    assert shared.num_bytes == 65


def test_who_takes_something_holds_less() -> None:
    shared: SharedBytes[str] = SharedBytes(100)
    shared.add("a", 90)
    shared.add("a", -60)
    shared.add("b", 70)
    assert shared.take_largest() is None
    shared.forget("b")
    shared.forget("b")
    assert shared.num_bytes == 30


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 60)), max_size=30))
def test_the_bound_holds_whatever_comes(adds: list[tuple[str, int]]) -> None:
    shared: SharedBytes[str] = SharedBytes(100)
    for holder, num_bytes in adds:
        shared.add(holder, num_bytes)
        while shared.take_largest() is not None:
            shared.check_invariants()
        shared.check_invariants()
        assert shared.num_bytes <= 100


def is_stuck(*looks: tuple[float, int, int]) -> list[bool]:
    """Look at a client at times (s), with bytes that were ever written and that are unsent."""
    watch = ReadWatch()
    return [
        watch.is_stuck(LIMITS, written=written, unsent=unsent, now=now)
        for now, written, unsent in looks
    ]


def test_a_client_that_reads_nothing_is_stuck_after_ten_seconds() -> None:
    looks = [(0.0, 500, 101), (9.9, 500, 101), (10.0, 500, 101)]
    assert is_stuck(*looks) == [False, False, True]


@pytest.mark.parametrize("unsent", [99, 100])
def test_a_little_may_wait_for_ever(unsent: int) -> None:
    assert is_stuck((0.0, 500, unsent), (10.0, 500, unsent), (99.0, 500, unsent)) == [False] * 3


def test_a_client_that_reads_slowly_but_goes_on_is_not_stuck() -> None:
    # Always 200 bytes wait, but never the same ones for long.
    assert is_stuck(*[(i * 5.0, 200 + i * 120, 200) for i in range(20)]) == [False] * 20


def test_a_client_that_reads_a_byte_now_and_then_is_stuck() -> None:
    assert is_stuck(*[(i * 5.0, 500 + i, 200) for i in range(4)]) == [False, False, True, True]


def test_patience_begins_anew_when_what_waited_is_gone() -> None:
    looks = [(0.0, 500, 200), (9.0, 700, 150), (9.5, 700, 50), (10.0, 900, 200), (19.9, 900, 200)]
    assert is_stuck(*looks) == [False] * 5
