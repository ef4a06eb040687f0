"""Which end of which link takes which kinds."""

from __future__ import annotations

import pytest
from tensorwire_protocol.messages import Kind
from tensorwire_protocol.roles import ACCEPTS, OPENERS, PEER, Role

BOTH = "AUTH PING PONG GOAWAY DATA ERR"
TABLE = {
    Role.CLIENT: f"{BOTH} WELCOME CREDIT RES EVT EVB ACK END",
    Role.SERVER: f"{BOTH} HELLO CREDIT REQ CANCEL RESUME",
    Role.DISPATCHER: f"{BOTH} WELCOME RES ACK END STEP HEARTBEAT SHM",
    Role.WORKER: f"{BOTH} HELLO SUBMIT CANCEL DRAIN LOAD SHM",
}


@pytest.mark.parametrize("role", Role)
def test_each_role_takes_exactly_its_kinds(role: Role) -> None:
    assert {Kind(kind).name for kind in ACCEPTS[role]} == set(TABLE[role].split())


@pytest.mark.parametrize("role", Role)
def test_a_link_has_one_opener_and_two_ends(role: Role) -> None:
    assert PEER[PEER[role]] is role
    assert (role in OPENERS) != (PEER[role] in OPENERS)


def test_every_kind_has_somebody_who_takes_it() -> None:
    assert set().union(*ACCEPTS.values()) == set(Kind)


def test_kinds_of_worker_links_are_refused_on_client_links() -> None:
    for role in (Role.CLIENT, Role.SERVER):
        assert not any(0x60 <= kind < 0x80 for kind in ACCEPTS[role])
