"""The table of bounds, and what a peer may announce."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
from tensorwire_protocol.limits import CLIENT_LINK, WORKER_LINK, Limits


def test_the_table_on_the_wire_has_every_limit() -> None:
    assert set(CLIENT_LINK.to_wire()) == {f.name for f in fields(Limits)}


def test_a_table_announced_in_full_is_the_table() -> None:
    assert CLIENT_LINK.announced(WORKER_LINK.to_wire()) == WORKER_LINK


def test_only_what_differs_needs_to_be_announced() -> None:
    mine = Limits(streams=7, handshake_s=1.5)
    assert mine.differing_from(Limits()) == {"streams": 7, "handshake_s": 1.5}
    assert Limits().announced(mine.differing_from(Limits())) == mine


@pytest.mark.parametrize(
    "wire",
    [{"streams": value} for value in (None, "9", True, -1, 1.5, math.inf, math.nan, [1], b"1")]
    + [{"handshake_s": value} for value in (-0.5, math.inf, math.nan, True)]
    + [{"unknown": 1}, {}],
    ids=repr,
)
def test_what_is_not_a_limit_is_skipped(wire: dict[str, Any]) -> None:
    assert CLIENT_LINK.announced(wire) == CLIENT_LINK


def test_seconds_may_be_whole_numbers() -> None:
    assert CLIENT_LINK.announced({"handshake_s": 3}).handshake_s == 3


def test_a_worker_link_carries_at_least_what_a_client_link_does() -> None:
    for name, value in CLIENT_LINK.to_wire().items():
        assert WORKER_LINK.to_wire()[name] >= value, name
