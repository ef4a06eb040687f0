from __future__ import annotations

import pytest
from tensorwire.errors import BadParams
from tensorwire.loadtest.outcomes import Outcome
from tensorwire.loadtest.slo import Bound, Slo, parse_slo
from tensorwire.loadtest.workloads import Ask


def outcome(times: list[float], status: str = "ok") -> Outcome:
    ask = Ask(index=0, task="generate", model="m")
    return Outcome(ask, 1.0, 0.0, 1.0, times[-1], times, [1] * len(times), status=status)


def test_an_objective_is_read() -> None:
    assert parse_slo("ttft_p99=500ms,itl_p99.9=0.05,errors=2%") == Slo(
        bounds=(
            Bound(metric="ttft", percent=99, most_s=0.5),
            Bound(metric="itl", percent=99.9, most_s=0.05),
        ),
        errors=0.02,
    )


@pytest.mark.parametrize("text", ["ttft=1s", "ttft_p0=1s", "ttft_p100=1s", "itl_p99=x", "errors=2"])
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(BadParams):
        parse_slo(text)


def test_a_request_is_good_if_it_keeps_every_bound() -> None:
    slo = parse_slo("ttft_p99=500ms,itl_p50=100ms,e2e_p99=2s")
    assert slo.is_good(outcome([1.4, 1.45, 1.5, 1.9]))
    assert not slo.is_good(outcome([1.6, 1.65, 1.7]))  # first token
    assert not slo.is_good(outcome([1.4, 1.6, 1.8, 1.9]))  # two of three gaps
    assert not slo.is_good(outcome([1.4, 3.1]))  # in all
    assert not slo.is_good(outcome([1.4], status="BUSY"))


def test_what_a_run_broke_is_said() -> None:
    slo = parse_slo("ttft_p99=500ms,errors=1%")
    (bound,) = slo.bounds
    assert slo.broken({bound: 0.4}, 0.005) == []
    assert slo.broken({bound: 0.6}, 0.02) == [
        "2.00% errors, at most 1.00%", "ttft_p99=500ms: was 600ms",
    ]  # fmt: skip
    assert slo.broken({bound: None}, 0) == ["ttft_p99=500ms: nothing was measured"]
