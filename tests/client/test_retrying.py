from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorwire import (
    BadParams,
    Busy,
    ConnectionLost,
    Draining,
    Executed,
    Flood,
    HandshakeTimeout,
    ModelLoading,
    SlowConsumer,
    TensorwireError,
    UnknownKey,
    WorkerLost,
)
from tensorwire.retrying import Again, Attempts, Connecting, Reached, Retry, RetryBudget
from tensorwire_protocol.connection import Connection
from tensorwire_protocol.errors import DeadlineExceeded, PeerSilent, SequenceError
from tensorwire_protocol.roles import Role


def after(attempts: Attempts, error: TensorwireError, **given: Any) -> Retry | None:
    facts: dict[str, Any] = {
        "arrived": 0,
        "can_resume": True,
        "reached": Reached.RESUME,
        "params": {},
        "now": 100.0,
        "deadline": None,
        "chance": 0.5,
    }
    return attempts.after(error, **facts | given)


def how(error: TensorwireError, **given: Any) -> Again | None:
    retry = after(Attempts(3, RetryBudget()), error, **given)
    return retry.how if retry is not None else None


@pytest.mark.parametrize(
    ("error", "nothing_arrived", "something_arrived"),
    [
        (ConnectionLost("x"), Again.REQUEST, Again.RESUME),
        (PeerSilent("x"), Again.REQUEST, Again.RESUME),
        (Busy("x"), Again.REQUEST, None),
        (Draining("x"), Again.REQUEST, None),
        (ModelLoading("x"), Again.REQUEST, None),
        (WorkerLost("x"), Again.REQUEST, None),
        (UnknownKey("x"), Again.REQUEST, None),
        (UnknownKey("x", executed=Executed.YES), Again.ANEW, None),
        (BadParams("x"), None, None),
        (DeadlineExceeded("x"), None, None),
        (SequenceError("x"), None, None),
    ],
)
def test_what_is_tried_again_and_how(
    error: TensorwireError, nothing_arrived: Again | None, something_arrived: Again | None
) -> None:
    assert how(error) is nothing_arrived
    assert how(error, arrived=1) is something_arrived
    assert how(error, arrived=1, can_resume=False) is None


def test_who_does_not_want_to_wait_for_a_model_does_not() -> None:
    assert how(ModelLoading("x"), params={"wait": False}) is None
    assert how(Busy("x"), params={"wait": False}) is Again.REQUEST


def test_a_call_is_tried_three_times_in_a_row() -> None:
    attempts = Attempts(3, RetryBudget())
    assert after(attempts, Busy("1"))
    assert after(attempts, Busy("2"))
    assert after(attempts, Busy("3")) is None
    assert str(attempts.error) == "3"


def test_a_stream_that_gets_on_may_lose_more_connections_than_that() -> None:
    attempts = Attempts(3, RetryBudget())
    for arrived in range(1, 9):
        assert after(attempts, ConnectionLost("x"), arrived=arrived)
    assert after(attempts, ConnectionLost("x"), arrived=8)
    assert after(attempts, ConnectionLost("x"), arrived=8) is None


def test_one_attempt_is_no_retry() -> None:
    assert after(Attempts(1, RetryBudget()), Busy("x")) is None


@given(st.floats(0, 1), st.integers(0, 10_000))
def test_waits_are_random_longer_each_time_and_never_shorter_than_asked(
    chance: float, asked_ms: int
) -> None:
    attempts = Attempts(9, RetryBudget())
    for number in range(8):
        retry = after(attempts, Busy("x", retry_after_ms=asked_ms), chance=chance)
        assert retry is not None
        assert retry.wait_s == max(chance * min(0.05 * 2**number, 5.0), asked_ms / 1000)


def test_no_wait_goes_beyond_the_deadline() -> None:
    busy = Busy("x", retry_after_ms=1000)
    assert after(Attempts(3, RetryBudget()), busy, now=100.0, deadline=101.5)
    attempts = Attempts(3, RetryBudget())
    assert after(attempts, busy, now=100.0, deadline=101.0) is None
    assert attempts.error is busy


def test_the_error_that_says_most_of_what_was_executed_is_the_one_raised() -> None:
    attempts = Attempts(3, RetryBudget())
    after(attempts, ConnectionLost("cut"))
    after(attempts, ConnectionLost("refused", executed=Executed.NO))
    assert str(attempts.error) == "cut"
    after(attempts, ConnectionLost("cut again"))
    assert str(attempts.error) == "cut again"


def test_when_most_calls_fail_a_tenth_of_them_is_tried_again() -> None:
    budget = RetryBudget()
    retries = sum(after(Attempts(3, budget), Busy("x")) is not None for _ in range(1000))
    assert 100 <= retries <= 110
    while budget.take(100.0):
        pass
    assert not budget.take(100.5 - 0.6)
    assert budget.take(101.1)  # one a second is always allowed


def empty_budget() -> RetryBudget:
    budget = RetryBudget()
    while budget.take(100.0):
        pass
    return budget


@pytest.mark.parametrize("arrived", [0, 1])
@pytest.mark.parametrize("error", [ConnectionLost("x"), PeerSilent("x"), SlowConsumer("x")])
def test_what_a_cut_connection_carried_goes_on_without_a_budget(
    error: TensorwireError, arrived: int
) -> None:
    attempts = Attempts(3, empty_budget())
    assert after(attempts, error, arrived=arrived)
    assert after(attempts, error, arrived=arrived)
    assert after(attempts, error, arrived=arrived) is None  # but not without end


@pytest.mark.parametrize(
    "error",
    [
        Busy("x"),
        WorkerLost("x"),
        UnknownKey("x"),
        Flood("x"),
        ConnectionLost("lost behind a farewell that named an earlier call", executed=Executed.NO),
    ],
)
def test_what_a_server_has_to_do_again_takes_from_the_budget(error: TensorwireError) -> None:
    assert after(Attempts(3, RetryBudget()), error)
    assert after(Attempts(3, empty_budget()), error) is None


def test_a_server_that_keeps_no_calls_has_to_do_them_again() -> None:
    lost = {"can_resume": False, "reached": Reached.GREETING}
    assert after(Attempts(3, empty_budget()), ConnectionLost("x"), **lost) is None


@pytest.mark.parametrize(
    "error",
    [
        ConnectionLost("cut"),
        HandshakeTimeout("x"),
        Busy("at the door"),
        ConnectionLost("no connection could be made", executed=Executed.NO),
    ],
)
def test_what_was_never_greeted_is_for_the_next_connection_to_pay(error: TensorwireError) -> None:
    attempts = Attempts(3, empty_budget())
    assert after(attempts, error, reached=Reached.NOTHING)
    assert after(attempts, error, reached=Reached.NOTHING)
    assert after(attempts, error, reached=Reached.NOTHING) is None  # but not without end


GREETED = Connection(Role.CLIENT)
GREETED.was_greeted = True
CARRIED = Connection(Role.CLIENT)  # a call
CARRIED.was_greeted = True
CARRIED.streams.open(1)
UNGREETED = Connection(Role.CLIENT)


def retrying(budget: RetryBudget) -> Attempts:
    """Return the attempts of a call that has failed once."""
    attempts = Attempts(3, budget)
    after(attempts, ConnectionLost("the first"), reached=Reached.NOTHING)
    return attempts


def test_a_connection_after_one_that_was_never_greeted_costs_a_retry_one() -> None:
    budget, connecting = RetryBudget(), Connecting()
    for _ in range(11):  # the first replaces none
        connecting.begin(retrying(budget), 100.0)
        connecting.note_made(UNGREETED)
    with pytest.raises(ConnectionLost, match="the first"):
        connecting.begin(retrying(budget), 100.0)
    connecting.begin(retrying(budget), 101.1)  # one a second is always allowed


def test_a_connection_that_could_not_be_made_is_one_that_was_never_greeted() -> None:
    budget, connecting = empty_budget(), Connecting()
    connecting.begin(retrying(budget), 100.0)
    with pytest.raises(ConnectionLost):
        connecting.begin(retrying(budget), 100.0)


def test_a_connection_after_one_that_carried_a_call_costs_nothing() -> None:
    budget, connecting = empty_budget(), Connecting()
    for _ in range(3):
        connecting.begin(retrying(budget), 100.0)
        connecting.note_made(CARRIED)


def test_a_connection_that_ended_behind_its_greeting_is_paid_for_all_the_same() -> None:
    budget, connecting = empty_budget(), Connecting()
    connecting.begin(retrying(budget), 100.0)
    connecting.note_made(GREETED)
    with pytest.raises(ConnectionLost):
        connecting.begin(retrying(budget), 100.0)


def test_a_call_that_cannot_pay_for_a_connection_looks_again_under_the_key_it_has() -> None:
    attempts = Attempts(9, empty_budget())
    after(attempts, UnknownKey("x", executed=Executed.YES))
    with pytest.raises(UnknownKey) as refused:
        attempts.pay_for_connection(100.0)
    retry = after(attempts, refused.value, reached=Reached.NOTHING)
    assert retry is not None
    assert retry.how is Again.REQUEST


def test_a_first_attempt_may_have_a_connection_whatever_the_budget() -> None:
    budget, connecting = empty_budget(), Connecting()
    for _ in range(3):
        connecting.begin(Attempts(3, budget), 100.0)
        connecting.note_made(UNGREETED)


def test_a_rest_fills_the_budget_to_its_bound_and_no_further() -> None:
    budget = RetryBudget()
    budget.take(0.0)
    assert sum(budget.take(1e6) for _ in range(100)) == 10
