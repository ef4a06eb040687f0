from __future__ import annotations

from typing import Any

import pytest
from tensorwire_server.models.lifecycle import ModelState
from tensorwire_server.routing.pool import ModelPool
from tensorwire_server.routing.replica import Replica

LOADING, READY, FAILED = ModelState


def replica(state: ModelState, detail: str = "", **card: Any) -> Replica:
    made = Replica("m/0", on_change=lambda _: None)
    made.state, made.detail, made.card = state, detail, card
    return made


def pool(*replicas: Replica) -> ModelPool:
    made = ModelPool("m")
    made.replicas += replicas
    return made


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([], LOADING),
        ([LOADING], LOADING),
        ([READY], READY),
        ([FAILED], FAILED),
        ([FAILED, FAILED], FAILED),
        ([FAILED, LOADING], LOADING),
        ([FAILED, READY], READY),
        ([LOADING, READY, FAILED], READY),
    ],
)
def test_one_ready_replica_is_enough_and_only_all_failed_ones_fail_a_model(
    states: list[ModelState], expected: ModelState
) -> None:
    assert pool(*map(replica, states)).state is expected


def test_the_detail_is_of_a_replica_in_the_model_s_own_state() -> None:
    subject = pool(
        replica(FAILED, "broken"), replica(LOADING), replica(LOADING, "half"), replica(LOADING, "1")
    )
    assert subject.detail == "half"
    assert pool(replica(FAILED, "broken"), replica(READY)).detail == ""
    assert pool(replica(FAILED, "broken")).detail == "broken"


def test_the_card_is_that_of_the_first_replica_that_has_one() -> None:
    assert pool(replica(LOADING), replica(READY, tasks=["embed"])).card == {"tasks": ["embed"]}
    assert pool().card == {}


def test_a_replica_that_is_called_ready_but_has_no_connection_is_not_picked() -> None:
    subject = pool(replica(READY))
    assert subject.pick() is None
    assert subject.describe()["ready_replicas"] == 0


def test_a_model_is_described_without_what_only_the_engine_needs() -> None:
    subject = pool(replica(LOADING, "half"), replica(FAILED, eos_ids=[1], context_tokens=64))
    assert subject.describe() == {
        "name": "m",
        "state": "loading",
        "detail": "half",
        "replicas": 2,
        "ready_replicas": 0,
        "context_tokens": 64,
    }
