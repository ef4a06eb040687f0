"""Three queues: what leaves first, in which pieces, and what waits for the peer."""

from __future__ import annotations

import pytest
from tensorwire_protocol.frames import DATA_BYTES, Flag
from tensorwire_protocol.outbox import Outbox, OutgoingBody, data_header

END = int(Flag.END)


def body(stream: int, *sizes: int, allowed: int | None = None) -> OutgoingBody:
    return OutgoingBody(stream, [memoryview(bytes(size)) for size in sizes], allowed=allowed)


def frames(outbox: Outbox, budget: int | None = None) -> list[tuple[int, int, int, int]]:
    """Return stream, segment, size and flags of the DATA frames that leave."""
    data = b"".join(outbox.take(budget))
    found = []
    while data:
        size, flags = int.from_bytes(data[:4], "little"), data[5]
        segment, stream = int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:12], "little")
        assert data[:16] == data_header(stream, segment, size, flags)
        found.append((stream, segment, size, flags))
        data = data[16 + size :]
    return found


def test_urgent_frames_leave_first_and_bodies_last() -> None:
    outbox = Outbox()
    outbox.add_body(body(1, 3))
    outbox.add([b"small"], 5)
    outbox.add_urgent([b"urgent"])
    assert outbox.num_bytes == 11
    assert b"".join(outbox.take()) == b"urgentsmall" + data_header(1, 0, 3, END) + bytes(3)
    assert (outbox.num_bytes, outbox.has_bulk, outbox.take()) == (0, False, [])


def test_nothing_overtakes_the_greeting() -> None:
    outbox = Outbox()
    outbox.add([b"welcome "], 8)
    outbox.hold([b"held"], body(1, 3))
    assert not outbox.has_bulk
    outbox.release()
    outbox.add_urgent([b"urgent "])
    sent = b"welcome urgent held" + data_header(1, 0, 3, END) + bytes(3)
    assert outbox.take() == [sent]


def test_a_body_leaves_segment_by_segment_in_frames_of_a_mebibyte() -> None:
    outbox = Outbox()
    outbox.add_body(body(1, DATA_BYTES + 1, 0, 5))
    assert frames(outbox) == [(1, 0, DATA_BYTES, 0), (1, 0, 1, 0), (1, 2, 5, END)]


def test_a_body_without_bytes_is_one_empty_frame() -> None:
    outbox = Outbox()
    outbox.add_body(body(1, 0, 0))
    assert frames(outbox) == [(1, 1, 0, END)]


def test_bodies_take_turns() -> None:
    outbox = Outbox()
    outbox.add_body(body(1, 2 * DATA_BYTES))
    outbox.add_body(body(2, 2 * DATA_BYTES))
    assert [(stream, flags) for stream, _, _, flags in frames(outbox)] == [
        (1, 0), (2, 0), (1, END), (2, END),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("budget", "num"), [(0, 0), (-5, 0), (1, 1), (DATA_BYTES, 1), (DATA_BYTES + 1, 2), (None, 3)]
)
def test_bulk_stops_when_the_budget_is_spent(budget: int | None, num: int) -> None:
    outbox = Outbox()
    outbox.add_body(body(1, 3 * DATA_BYTES))
    outbox.add([], 0)
    assert len(frames(outbox, budget)) == num
    assert outbox.num_bulk_frames == num


def test_a_body_stops_for_want_of_credit_and_goes_on_with_it() -> None:
    outbox = Outbox()
    outbox.add_body(body(1, 10, 10, allowed=12))
    outbox.add_body(body(2, 1))
    assert frames(outbox) == [(1, 0, 10, 0), (2, 0, 1, END), (1, 1, 2, 0)]
    assert not outbox.has_bulk
    outbox.allow(2, 100)  # which has left: ignored
    outbox.allow(1, 3)
    assert outbox.has_bulk
    outbox.allow(1, 1)
    assert frames(outbox) == [(1, 1, 4, 0)]
    outbox.allow(1, 100)
    assert frames(outbox) == [(1, 1, 4, END)]


@pytest.mark.parametrize("allowed", [None, 4])
def test_a_dropped_body_leaves_no_further_frame(allowed: int | None) -> None:
    outbox = Outbox()
    outbox.add_body(body(1, 4, 10, allowed=allowed))
    frames(outbox, 1)
    dropped = outbox.drop_body(1)
    assert dropped is not None
    assert dropped.left_bytes == 10
    assert outbox.drop_body(1) is None
    outbox.allow(1, 100)
    assert frames(outbox) == []


def test_small_frames_are_joined_and_large_ones_go_by_reference() -> None:
    outbox = Outbox()
    large = memoryview(bytes(128 * 1024 + 1))
    outbox.add([b"a", b"b"], 2)
    outbox.add([b"c", large], 1 + len(large))
    joined, by_reference = outbox.take()
    assert joined == b"abc"
    assert by_reference is large
