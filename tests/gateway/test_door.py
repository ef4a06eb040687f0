"""How many may be connected: in all, of one source, and without having logged in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tensorwire_protocol.connection import Connection
from tensorwire_protocol.errors import Busy
from tensorwire_protocol.roles import Role, State
from tensorwire_server.config import ListenConfig
from tensorwire_server.gateway.door import Door, source_of

if TYPE_CHECKING:
    from tensorwire_protocol.errors import TensorwireError


class Guest:
    """A transport without a socket."""

    def __init__(self) -> None:
        self.connection = Connection(Role.SERVER)

    def fail(self, error: TensorwireError) -> None:
        self.connection.fail(error)

    def log_in(self) -> None:
        self.connection.feed(b"".join(Connection(Role.CLIENT).take_output()))

    @property
    def is_stranger(self) -> bool:
        return self.connection.state is not State.OPEN

    @property
    def refusal(self) -> str | None:
        error = self.connection.error
        assert error is None or isinstance(error, Busy)
        return None if error is None else error.message


def arrive(door: Door, source: str = "192.0.2.1", *, logs_in: bool = True) -> Guest:
    guest = Guest()
    door.enter(guest, source)
    if logs_in and not guest.connection.is_closed:
        guest.log_in()
    door.check_invariants()
    return guest


def leave(door: Door, guest: Guest) -> None:
    door.leave(guest)
    door.check_invariants()


def test_all_together_are_bounded_and_the_newest_is_refused() -> None:
    door = Door(ListenConfig(max_connections=3))
    guests = [arrive(door, str(i)) for i in range(4)]
    assert [guest.refusal is None for guest in guests] == [True, True, True, False]
    assert "3 connections, its limit" in (guests[3].refusal or "")
    leave(door, guests[3])
    leave(door, guests[0])
    assert arrive(door).refusal is None
    assert arrive(door).refusal is not None


def test_those_of_one_source_are_bounded_and_others_are_not_concerned() -> None:
    door = Door(ListenConfig(max_connections_per_source=2))
    mine = [arrive(door, "192.0.2.1") for _ in range(3)]
    assert [guest.refusal is None for guest in mine] == [True, True, False]
    assert arrive(door, "192.0.2.2").refusal is None
    leave(door, mine[2])
    leave(door, mine[0])
    assert arrive(door, "192.0.2.1").refusal is None


def test_a_unix_socket_is_no_source() -> None:
    door = Door(ListenConfig(max_connections_per_source=1))
    assert [arrive(door, "").refusal for _ in range(3)] == [None] * 3


def test_without_a_bound_one_source_may_have_all() -> None:
    door = Door(ListenConfig(max_connections=50))
    assert {arrive(door).refusal for _ in range(50)} == {None}


def test_of_those_that_have_not_logged_in_the_oldest_has_to_go() -> None:
    door = Door(ListenConfig(max_unauthenticated=3))
    strangers = [arrive(door, logs_in=False) for _ in range(5)]
    assert [guest.refusal is None for guest in strangers] == [False, False, True, True, True]
    assert "3 newer connections" in (strangers[0].refusal or "")
    assert door.num_refused == 2


def test_who_has_logged_in_does_not_have_to_go() -> None:
    door = Door(ListenConfig(max_unauthenticated=2))
    guests = [arrive(door) for _ in range(10)]
    strangers = [arrive(door, logs_in=False) for _ in range(3)]
    assert {guest.refusal for guest in guests} == {None}
    assert [guest.refusal is None for guest in strangers] == [False, True, True]


def test_who_has_left_is_not_counted_as_a_stranger() -> None:
    door = Door(ListenConfig(max_unauthenticated=2))
    for _ in range(5):
        leave(door, arrive(door, logs_in=False))
    first = arrive(door, logs_in=False)
    arrive(door, logs_in=False)
    assert first.refusal is None


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (("192.0.2.1", 5), "192.0.2.1"),
        (("::ffff:192.0.2.1", 5, 0, 0), "192.0.2.1"),
        (("2001:db8:1:2:3:4:5:6", 5, 0, 0), "2001:db8:1:2::/64"),
        (("2001:db8:1:2::1", 5, 0, 0), "2001:db8:1:2::/64"),
        (("fe80::1%eth0", 5, 0, 2), "fe80::/64"),
        ("", ""),
        (b"", ""),
        (None, ""),
    ],
)
def test_a_source_is_an_address_or_the_network_that_its_owner_has(
    name: object, source: str
) -> None:
    assert source_of(name) == source
