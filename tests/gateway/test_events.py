"""Events into frames: what fits leaves as it came, the rest is merged and cut."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorwire_protocol.limits import CLIENT_LINK, Limits
from tensorwire_protocol.messages import Event, EventBatch
from tensorwire_server.gateway.events import Columns, Delta, FrameRoom, frames_of

from .house import events_of

ROOM = FrameRoom(tokens=10, chars=20)


def columns(*events: tuple[int, int, list[int], str]) -> Columns:
    made = Columns()
    for event in events:
        made.add(*event)
    return made


def test_one_event_is_no_batch() -> None:
    (frame,) = frames_of(columns((3, 7, [1, 2], "ab")), ROOM)
    assert isinstance(frame, Event)
    assert (frame.stream, frame.index, frame.tokens, frame.text) == (3, 7, [1, 2], "ab")


def test_events_of_one_token_each_need_no_counts() -> None:
    (frame,) = frames_of(columns((1, 0, [5], "a"), (2, 0, [6], "")), ROOM)
    assert isinstance(frame, EventBatch)
    assert frame.counts is None
    (frame,) = frames_of(columns((1, 0, [5], "a"), (2, 0, [], "b")), ROOM)
    assert isinstance(frame, EventBatch)
    assert frame.counts == [1, 0]


def test_a_stream_that_came_twice_leaves_as_one_event() -> None:
    (frame,) = frames_of(columns((1, 0, [5], "a"), (2, 3, [6], "b"), (1, 1, [7, 8], "c")), ROOM)
    assert [(e.stream, e.index, e.tokens, e.text) for e in events_of([frame])] == [
        (1, 0, [5, 7, 8], "ac"),
        (2, 3, [6], "b"),
    ]


def test_a_delta_gives_what_fits_from_its_front() -> None:
    delta = Delta(4)
    assert not delta
    assert delta.add([1] * 12, "é" * 5) == delta.num_bytes == 12 * 8 + 10
    delta.add([], "x" * 18)
    assert delta.take(ROOM) == (4, [1] * 9, "é" * 5 + "x" * 15)
    assert delta
    assert delta.take(ROOM) == (13, [1] * 3, "xxx")
    assert not delta


@pytest.mark.parametrize("limits", [Limits(container_items=0), Limits(server_meta_bytes=10)])
def test_a_client_that_takes_nothing_still_gets_one_token_at_a_time(limits: Limits) -> None:
    assert FrameRoom.of(limits).tokens == 1
    frames = list(frames_of(columns((1, 0, [5, 6], "")), FrameRoom(tokens=1, chars=1)))
    assert [list(frame.tokens) for frame in frames] == [[5], [6]]


def test_the_room_in_a_frame_is_far_below_what_clients_accept() -> None:
    assert FrameRoom.of(CLIENT_LINK) == FrameRoom(tokens=2048, chars=10_922)


_EVENTS = st.lists(
    st.tuples(st.integers(1, 4), st.integers(0, 25), st.text(max_size=30)), min_size=1, max_size=12
)


@given(_EVENTS)
def test_nothing_is_lost_doubled_or_moved_whatever_is_merged_and_cut(
    shapes: list[tuple[int, int, str]],
) -> None:
    made = Columns()
    tokens: dict[int, list[int]] = {}
    texts: dict[int, str] = {}
    for stream, count, text in shapes:
        known = tokens.setdefault(stream, [])
        new = list(range(len(known), len(known) + count))
        made.add(stream, len(known), new, text)
        known += new
        texts[stream] = texts.get(stream, "") + text
    frames = list(frames_of(made, ROOM))
    for frame in frames:
        events = events_of([frame])
        assert all(len(list(group)) == 1 for _, group in groupby(sorted(e.stream for e in events)))
        assert len(events) == 1 or len(events) + len(frame.tokens) <= ROOM.tokens
        assert sum(len(e.text) for e in events) <= ROOM.chars
    for stream, expected in tokens.items():
        events = [e for e in events_of(frames) if e.stream == stream]
        assert [t for e in events for t in e.tokens] == expected
        assert "".join(e.text for e in events) == texts[stream]
        at = 0
        for event in events:
            assert event.index == at
            at += len(event.tokens)
