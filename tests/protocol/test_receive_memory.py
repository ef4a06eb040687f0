"""The bound on what all connections together hold of frames that are not complete."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tensorwire_protocol.connection import Connection
from tensorwire_protocol.errors import Busy
from tensorwire_protocol.frames import HEADER
from tensorwire_protocol.messages import Cancel, Kind
from tensorwire_protocol.receive_memory import ReceiveMemory
from tensorwire_protocol.roles import Role

from .samples import cut, request, wire
from .test_connection import last_words, output
from .test_transfers import BODY, MIB, FakeMemory, head_of, late

if TYPE_CHECKING:
    from collections.abc import Iterator

KIB = 1024


class Peer:
    """Somebody who holds memory."""

    def __init__(self, memory: ReceiveMemory) -> None:
        self.memory = memory
        self.evicted: list[str] = []

    def hold(self, num_bytes: int) -> None:
        self.memory.hold(self, num_bytes)

    def evict(self, error: Busy) -> None:
        self.evicted.append(error.message)


@pytest.fixture
def memory() -> Iterator[ReceiveMemory]:
    made = ReceiveMemory(100)
    yield made
    made.check_invariants()


@pytest.mark.parametrize(("more", "fits"), [(39, True), (40, True), (41, False)])
def test_all_together_hold_up_to_the_bound(memory: ReceiveMemory, more: int, fits: bool) -> None:
    one, other = Peer(memory), Peer(memory)
    one.hold(60)
    other.hold(more)
    assert (one.evicted == []) == fits
    assert memory.num_bytes == (60 + more if fits else more)


def test_who_holds_most_gives_it_up_for_the_others(memory: ReceiveMemory) -> None:
    small, big, new = Peer(memory), Peer(memory), Peer(memory)
    small.hold(30)
    big.hold(70)
    new.hold(20)
    assert (small.evicted, new.evicted) == ([], [])
    (reason,) = big.evicted
    assert "70 bytes" in reason


def test_who_would_hold_most_is_refused_and_keeps_what_it_had(memory: ReceiveMemory) -> None:
    small, big = Peer(memory), Peer(memory)
    small.hold(40)
    big.hold(50)
    with pytest.raises(Busy, match="61 bytes"):
        big.hold(61)
    assert memory.num_bytes == 90
    assert small.evicted == []


def test_more_than_the_bound_is_refused_to_the_only_one(memory: ReceiveMemory) -> None:
    with pytest.raises(Busy):
        Peer(memory).hold(101)


def test_what_is_given_back_can_be_held_again(memory: ReceiveMemory) -> None:
    peer = Peer(memory)
    for _ in range(3):
        peer.hold(100)
        peer.hold(0)
    assert memory.num_bytes == 0


# -- connections ----------------------------------------------------------------------------------


def greeted(memory: ReceiveMemory) -> Connection:
    server = Connection(Role.SERVER, memory=memory)
    server.feed(output(Connection(Role.CLIENT)))
    output(server)
    return server


def half_a_frame(num_bytes: int) -> bytes:
    return HEADER.pack(1024 * KIB, Kind.REQ, 0, 0, 1, 1024 * KIB) + bytes(num_bytes - 16)


def test_a_connection_holds_no_more_than_five_times_what_has_come() -> None:
    memory = ReceiveMemory(1024 * KIB)
    server = greeted(memory)
    server.feed(half_a_frame(200 * KIB))
    assert 200 * KIB <= memory.num_bytes <= 1000 * KIB


def test_the_greediest_connection_is_closed_and_the_others_go_on() -> None:
    memory = ReceiveMemory(600 * KIB)
    greedy, modest = greeted(memory), greeted(memory)
    greedy.feed(half_a_frame(300 * KIB))
    modest.feed(half_a_frame(100 * KIB))
    assert greedy.is_closed
    assert isinstance(last_words(greedy), Busy)
    assert not modest.is_closed
    memory.check_invariants()
    modest.close()
    assert memory.num_bytes == 0


def test_a_connection_that_asks_for_too_much_is_closed_with_a_sentence() -> None:
    memory = ReceiveMemory(100 * KIB)
    server = greeted(memory)
    server.feed(half_a_frame(200 * KIB))
    assert isinstance(server.error, Busy)
    assert isinstance(last_words(server), Busy)
    assert memory.num_bytes == 0


def test_a_frame_that_is_complete_is_not_counted_any_more() -> None:
    memory = ReceiveMemory(100 * KIB)
    server = greeted(memory)
    whole = wire(request(1))
    server.feed(whole[:20])
    assert memory.num_bytes > 0
    assert len(server.feed(whole[20:])) == 1
    assert memory.num_bytes == 0


# -- bodies ---------------------------------------------------------------------------------------


def with_bodies(memory: ReceiveMemory, places: FakeMemory | None) -> Connection:
    server = Connection(Role.SERVER, memory=memory, features=BODY, bodies=places)
    server.feed(output(Connection(Role.CLIENT, features=BODY)))
    output(server)
    return server


def refusals(server: Connection) -> list[tuple[int, int]]:
    """Return streams that ended with ERR, and its number."""
    return [(frame.stream, frame.aux) for frame in cut(output(server)) if frame.kind == Kind.ERR]


@pytest.mark.parametrize(("spare", "fits"), [(-1, False), (0, True), (1, True)])
@pytest.mark.parametrize(
    ("announced", "taken"),
    [(300, 300), (MIB - 1, MIB - 1), (MIB, MIB), (200 * MIB, MIB)],
    ids=["small", "less than a window", "a window", "large"],
)
def test_bodies_for_which_there_is_no_place_are_counted_before_they_come(
    announced: int, taken: int, spare: int, fits: bool
) -> None:
    memory, places = ReceiveMemory(2 * taken + spare), FakeMemory()
    one, other = with_bodies(memory, places), with_bodies(memory, places)
    one.feed(head_of(request(1), announced))
    assert memory.num_bytes == taken
    other.feed(head_of(request(1), announced))
    assert refusals(other) == ([] if fits else [(1, Busy.code)])
    assert not one.is_closed
    assert not other.is_closed  # small requests go on
    assert memory.num_bytes == (2 * taken if fits else taken)
    memory.check_invariants()


def test_who_announces_most_gives_way_to_who_asks_for_little() -> None:
    memory = ReceiveMemory(10 * MIB)
    greedy, modest = with_bodies(memory, FakeMemory()), with_bodies(memory, FakeMemory())
    for stream in range(1, 11):
        greedy.feed(head_of(request(stream), 200 * MIB))
    assert memory.num_bytes == 10 * MIB
    modest.feed(head_of(request(1), 2 * MIB))
    assert isinstance(last_words(greedy), Busy)
    assert (memory.num_bytes, refusals(modest)) == (MIB, [])
    memory.check_invariants()


def test_who_gives_way_with_a_body_and_half_a_frame_takes_nobody_with_it() -> None:
    memory = ReceiveMemory(10 * MIB)
    greedy, other, last = (with_bodies(memory, FakeMemory()) for _ in range(3))
    for stream in range(1, 7):
        greedy.feed(head_of(request(stream), 200 * MIB))
    greedy.feed(HEADER.pack(MIB, Kind.REQ, 0, 0, 7, MIB) + bytes(1000))
    other.feed(b"".join(head_of(request(stream), 2 * MIB) for stream in range(1, 4)))
    last.feed(head_of(request(1), 2 * MIB))
    assert greedy.is_closed
    assert not other.is_closed
    assert not last.is_closed
    assert memory.num_bytes == 4 * MIB
    memory.check_invariants()


@pytest.mark.parametrize("how", ["place", "cancel", "close", "last byte", "too late"])
def test_a_body_is_counted_until_it_has_a_place_or_is_gone(how: str) -> None:
    memory, places = ReceiveMemory(10 * MIB), FakeMemory()
    server = with_bodies(memory, places)
    num_bytes = 300 if how == "last byte" else 2 * MIB
    server.feed(head_of(request(1), num_bytes))
    assert memory.num_bytes == min(num_bytes, MIB)
    match how:
        case "place":
            places.waiting[0].come()
        case "cancel":
            server.feed(wire(Cancel(stream=1)))
        case "close":
            server.close()
        case "last byte":
            assert len(server.feed(late(300, last=True))) == 1
        case _:
            server.on_timer(31.0)
    assert memory.num_bytes == 0


def test_a_body_and_an_unfinished_frame_are_counted_together() -> None:
    memory = ReceiveMemory(10 * MIB)
    server = with_bodies(memory, FakeMemory())
    server.feed(head_of(request(1), 2 * MIB))
    server.feed(wire(request(2))[:20])
    frame_bytes = memory.num_bytes - MIB
    assert frame_bytes > 0
    server.feed(wire(request(2))[20:])
    assert memory.num_bytes == MIB


def test_where_nothing_else_bounds_bodies_all_of_each_is_counted() -> None:
    memory = ReceiveMemory(3 * MIB)
    server = with_bodies(memory, None)
    server.feed(head_of(request(1), 2 * MIB) + head_of(request(2), MIB + 1))
    assert memory.num_bytes == 2 * MIB
    assert refusals(server) == [(2, Busy.code)]
