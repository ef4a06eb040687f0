"""When a dead worker is started again."""

from __future__ import annotations

import pytest
from tensorwire_server.workers.backoff import RestartPolicy


def test_the_wait_doubles_from_death_to_death_up_to_ten_seconds() -> None:
    policy = RestartPolicy()
    waits = [policy.after_death(100.0 * i, lived_s=1.0) for i in range(9)]
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0])


def test_thirty_healthy_seconds_are_forgiven() -> None:
    policy = RestartPolicy()
    policy.after_death(0.0, lived_s=1.0)
    policy.after_death(100.0, lived_s=1.0)
    assert policy.after_death(200.0, lived_s=29.9) == pytest.approx(0.4)
    assert policy.after_death(300.0, lived_s=30.0) == pytest.approx(0.1)


def test_more_than_five_deaths_in_a_minute_open_the_breaker() -> None:
    policy = RestartPolicy()
    waits = [policy.after_death(float(i), lived_s=0.0) for i in range(6)]
    assert waits[-1] == 30.0
    assert policy.is_breaker_open
    assert policy.after_death(66.0, lived_s=0.0) == pytest.approx(6.4)
    assert not policy.is_breaker_open
