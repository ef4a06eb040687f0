"""The credit book's arithmetic."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tensorwire_protocol.credit import MOST, CreditBook


def test_each_event_takes_one_until_there_is_none() -> None:
    book = CreditBook()
    book.open(1, 2)
    assert [book.spend(1) for _ in range(3)] == [True, True, False]
    book.add(1, 1)
    assert [book.spend(1) for _ in range(2)] == [True, False]


def test_a_stream_that_is_not_counted_is_never_out_of_credit() -> None:
    book = CreditBook()
    book.open(1, None)
    book.add(1, 5)
    assert 1 not in book
    assert all(book.spend(1) for _ in range(100))


def test_no_credit_at_all_is_a_limit_too() -> None:
    book = CreditBook()
    book.open(1, 0)
    assert 1 in book
    assert not book.spend(1)


def test_a_stream_that_has_ended_is_forgotten() -> None:
    book = CreditBook()
    book.open(1, 0)
    book.close(1)
    book.close(1)
    assert len(book) == 0
    book.add(1, 3)
    assert 1 not in book


@given(first=st.integers(0, MOST), amounts=st.lists(st.integers(1, MOST), max_size=5))
def test_sums_stop_at_what_one_frame_can_say(first: int, amounts: list[int]) -> None:
    book = CreditBook()
    book.open(1, first)
    for amount in amounts:
        book.add(1, amount)
    assert book._left[1] == min(first + sum(amounts), MOST)
