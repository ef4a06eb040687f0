"""The echo gives back what it gets."""

from __future__ import annotations

import numpy as np
import pytest
from tensorwire_server.workers.echo import EchoEngine, echo_embedding


def test_named_values_come_back_and_ids_become_a_vector() -> None:
    item = {"x": np.arange(3), "text": "hello"}
    answer, vector = EchoEngine().run([item, [1, 2]])
    assert answer is item
    assert vector.dtype == np.float32
    assert vector.shape == (8,)
    assert np.array_equal(vector, echo_embedding([1, 2]))
    assert not np.array_equal(vector, echo_embedding([2, 1]))


def test_only_an_echo_without_service_time_answers_on_the_spot() -> None:
    assert EchoEngine("echo:").inline
    assert not EchoEngine("echo:service_ms=1").inline


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(ValueError, match="no option 'delay'; it has service_ms"):
        EchoEngine("echo:delay=1")
