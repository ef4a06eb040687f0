from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorwire_protocol.errors import Busy
from tensorwire_server.config import AdmissionConfig
from tensorwire_server.gateway.admission import Admission


def admission(total: int = 3, per_model: int = 2) -> Admission:
    return Admission(AdmissionConfig(max_requests=total, max_requests_per_model=per_model))


def admit(subject: Admission, *models: str) -> None:
    for model in models:
        subject.admit(model)


def test_requests_up_to_the_bound_of_a_model_are_let_in_and_the_next_is_refused() -> None:
    subject = admission(total=10, per_model=2)
    admit(subject, "a", "a")
    with pytest.raises(Busy, match=r"model 'a' has 2 of 2 requests") as refused:
        subject.admit("a")
    assert refused.value.detail == {"live": 2, "limit": 2}
    assert refused.value.retryable
    assert refused.value.retry_after_ms == 100
    admit(subject, "b", "b")


def test_requests_up_to_the_bound_of_the_server_are_let_in_and_the_next_is_refused() -> None:
    subject = admission(total=3, per_model=3)
    admit(subject, "a", "b", "c")
    with pytest.raises(Busy, match=r"the server has 3 of 3 requests"):
        subject.admit("d")


def test_a_refusal_changes_no_count() -> None:
    subject = admission(total=3, per_model=1)
    admit(subject, "a")
    for _ in range(5):
        with pytest.raises(Busy):
            subject.admit("a")
    assert (subject.total, subject.counts()) == (1, {"a": 1})


def test_a_place_that_is_left_can_be_taken_again() -> None:
    subject = admission(total=1, per_model=1)
    for model in ("a", "b", "a"):
        subject.admit(model)
        subject.leave(model)
    assert (subject.total, subject.counts()) == (0, {})


def test_leaving_twice_is_a_bug_and_found_at_once() -> None:
    subject = admission()
    admit(subject, "a", "b")
    subject.leave("a")
    with pytest.raises(AssertionError, match="left twice"):
        subject.leave("a")
    assert subject.total == 1


@given(
    total=st.integers(1, 6),
    per_model=st.integers(1, 4),
    events=st.lists(st.tuples(st.booleans(), st.sampled_from("abc")), max_size=60),
)
def test_counts_are_those_of_a_simple_list_whatever_comes_and_goes(
    total: int, per_model: int, events: list[tuple[bool, str]]
) -> None:
    subject, live = admission(total, per_model), list[str]()
    for comes, model in events:
        if comes:
            fits = len(live) < total and live.count(model) < per_model
            if fits:
                subject.admit(model)
                live.append(model)
            else:
                with pytest.raises(Busy):
                    subject.admit(model)
        elif model in live:
            subject.leave(model)
            live.remove(model)
        subject.check_invariants()
        assert subject.total == len(live)
        assert subject.counts() == {model: live.count(model) for model in set(live)}
    for model in live:
        subject.leave(model)
    assert (subject.total, subject.counts()) == (0, {})
