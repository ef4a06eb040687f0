from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tensorwire_server.models.lifecycle import ModelState, model_state

LOADING, READY, FAILED = ModelState


@given(st.lists(st.sampled_from(ModelState), max_size=5))
def test_a_model_is_ready_with_one_replica_and_failed_only_with_all(
    states: list[ModelState],
) -> None:
    if READY in states:
        expected = READY
    elif states and all(state is FAILED for state in states):
        expected = FAILED
    else:
        expected = LOADING
    assert model_state(states) is expected
