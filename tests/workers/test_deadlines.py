"""Deadlines of what is open: what is due, and when to look again."""

from __future__ import annotations

from math import inf

from hypothesis import given
from hypothesis import strategies as st
from tensorwire_server.workers.deadlines import Deadlines


class Open:
    """An open request."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline


def test_only_open_requests_come_due_the_earliest_first() -> None:
    streams = {1: Open(5.0), 2: Open(3.0), 3: Open(4.0), 4: Open(inf)}
    deadlines = Deadlines(streams)
    assert deadlines.note(5.0)
    assert deadlines.note(3.0)
    assert not deadlines.note(4.0)
    del streams[3]
    assert deadlines.next_due() == 3.0
    assert deadlines.take_due(2.9) == []
    assert deadlines.take_due(5.0) == [2, 1]
    assert deadlines.next_due() is None


def test_nothing_is_due_before_its_deadline_and_everything_at_it() -> None:
    deadlines = Deadlines({1: Open(5.0)})
    deadlines.note(5.0)
    assert deadlines.take_due(4.999999) == []
    assert deadlines.take_due(5.0) == [1]


def test_when_the_first_has_finished_the_next_time_is_that_of_another() -> None:
    streams = {1: Open(2.0), 2: Open(7.0)}
    deadlines = Deadlines(streams)
    deadlines.note(2.0)
    deadlines.note(7.0)
    del streams[1]
    assert deadlines.take_due(2.0) == []
    assert deadlines.next_due() == 7.0


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("open"), st.integers(1, 9)),
            st.tuples(st.just("close"), st.integers(0, 9)),
            st.tuples(st.just("pass"), st.integers(0, 4)),
        )
    )
)
def test_whatever_opens_and_closes_a_driver_of_next_due_misses_no_deadline(
    steps: list[tuple[str, int]],
) -> None:
    streams: dict[int, Open] = {}
    deadlines = Deadlines(streams)
    now, id = 0.0, 0
    for what, number in steps:
        if what == "open":
            id += 1
            streams[id] = Open(now + number)
            deadlines.note(now + number)
        elif what == "close" and streams:
            del streams[[*streams][number % len(streams)]]
        elif what == "pass":
            now += number
            due = deadlines.next_due()
            if due is not None and due <= now:
                late = [id for id, stream in streams.items() if stream.deadline <= now]
                taken = deadlines.take_due(now)
                assert {*taken} == {*late}
                for id_taken in taken:
                    del streams[id_taken]
        assert all(stream.deadline > now for stream in streams.values())
