"""The bound on what all connections together hold of frames that are not complete."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tensorwire_protocol.connection import Connection
from tensorwire_protocol.errors import Busy
from tensorwire_protocol.frames import HEADER
from tensorwire_protocol.messages import Kind
from tensorwire_protocol.receive_memory import ReceiveMemory
from tensorwire_protocol.roles import Role

from .samples import request, wire
from .test_connection import last_words, output

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
