"""One body that arrives: where its bytes land, and which frame is due."""

from __future__ import annotations

import pytest
from tensorwire_protocol.bodies import WINDOW_BYTES, FreshMemory, IncomingBody, early_places
from tensorwire_protocol.errors import Flood, SequenceError


def incoming(*lengths: int, allowed: int | None = None) -> IncomingBody:
    body = IncomingBody(7, lengths, 0.0, allowed=allowed)
    body.place([memoryview(bytearray(length)) for length in lengths])
    return body


def pour(body: IncomingBody, segment: int, data: bytes, *, is_last: bool = False) -> None:
    body.announce(segment, len(data), is_last=is_last)
    while data:
        room = body.room(len(data))
        part = data[: len(data) if room is None else len(room)]
        if room is not None:
            room[:] = part
        body.took(len(part))
        data = data[len(part) :]


def test_bytes_land_in_their_segments() -> None:
    body = IncomingBody(7, (3, 0, 2), 0.0, allowed=None)
    places = [memoryview(bytearray(length)) for length in (3, 0, 2)]
    body.place(places)
    pour(body, 0, b"ab")
    pour(body, 0, b"c")
    pour(body, 2, b"de", is_last=True)
    assert [bytes(place) for place in places] == [b"abc", b"", b"de"]


@pytest.mark.parametrize(
    ("segment", "num_bytes", "is_last"),
    [
        (1, 1, False),  # another segment than is due
        (0, 4, False),  # more than the segment has
        (0, 0, False),  # nothing, and not the end
        (0, 3, True),  # the end, with bytes missing
        (2, 1, False),  # a segment that does not exist
    ],
)
def test_a_frame_that_is_not_due_is_refused(segment: int, num_bytes: int, is_last: bool) -> None:
    with pytest.raises(SequenceError):
        incoming(3, 2).announce(segment, num_bytes, is_last=is_last)


def test_the_last_bytes_must_say_that_they_are() -> None:
    with pytest.raises(SequenceError, match="0 bytes missing"):
        incoming(3).announce(0, 3, is_last=False)


def test_a_body_without_bytes_ends_in_its_last_segment() -> None:
    incoming(0, 0).announce(1, 0, is_last=True)


@pytest.mark.parametrize(("num_bytes", "fits"), [(3, True), (4, True), (5, False)])
def test_no_more_may_come_than_is_allowed(num_bytes: int, fits: bool) -> None:
    body = incoming(100, allowed=2)
    body.allow(2)
    if fits:
        body.announce(0, num_bytes, is_last=False)
    else:
        with pytest.raises(Flood, match="4 bytes of credit"):
            body.announce(0, num_bytes, is_last=False)


def test_what_came_before_there_was_memory_is_kept() -> None:
    lengths = (4, WINDOW_BYTES + 10)
    body = IncomingBody(7, lengths, 0.0, allowed=WINDOW_BYTES)
    early = early_places(lengths)
    assert sum(map(len, early)) == WINDOW_BYTES
    body.place(early)
    pour(body, 0, b"abcd")
    pour(body, 1, b"ef")
    places = [memoryview(bytearray(length)) for length in lengths]
    body.place(places)
    pour(body, 1, b"gh")
    assert bytes(places[0]) == b"abcd"
    assert bytes(places[1][:4]) == b"efgh"


def test_a_discarded_body_holds_no_memory_and_takes_anything() -> None:
    body = incoming(3)
    body.discard()
    assert body.room(3) is None
    pour(body, 9, bytes(50))
    pour(body, 0, b"", is_last=True)


def test_fresh_memory_is_aligned() -> None:
    segments = FreshMemory().reserve((10, 0, 100), lambda: None).segments
    assert segments is not None
    assert [len(segment) for segment in segments] == [10, 0, 100]
