from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tensorwire.errors import BadParams
from tensorwire.loadtest.comparing import compare, differing_plans, read_result

if TYPE_CHECKING:
    from pathlib import Path


def result(p99_ms: float, interval: list[float] | None, ok: int = 10_000) -> dict[str, Any]:
    metric = {"percentiles_ms": {"p99": p99_ms}, "intervals_ms": {"p99": interval}}
    rates = dict.fromkeys(("requests_per_s", "goodput_per_s", "tokens_out_per_s"), ok / 10)
    load = {"rates": rates, "counts": {"ok_in_time": ok}, "metrics": {"e2e": metric}}
    plan = {"arrivals": "closed:8", "log": None, "kind": "tensorwire"}
    return {"format": 1, "groups": {"load": load}, "plan": plan}


def verdict(first: dict[str, Any], second: dict[str, Any], name: str) -> str:
    return next(row.verdict for row in compare(first, second) if row.name == name)


@pytest.mark.parametrize(
    ("second", "verdict_of_it"),
    [
        (result(104, [99, 109]), "noise"),
        (result(130, [124, 136]), "worse"),
        (result(70, [66, 74]), "better"),
        (result(130, [90, 180]), "noise"),
        (result(100, [95, 105]), "equal"),
        (result(101, None), "unknown"),
    ],
)
def test_a_difference_counts_if_it_is_larger_than_both_runs_own(
    second: dict[str, Any], verdict_of_it: str
) -> None:
    assert verdict(result(100, [95, 105]), second, "load e2e p99 ms") == verdict_of_it


def test_more_requests_are_better_and_a_few_more_are_noise() -> None:
    base = result(1, None)
    assert verdict(base, result(1, None, ok=10_100), "load requests_per_s") == "noise"
    assert verdict(base, result(1, None, ok=11_000), "load requests_per_s") == "better"
    assert verdict(base, result(1, None, ok=9_000), "load requests_per_s") == "worse"


@pytest.mark.parametrize(
    ("rates", "verdict_of_it"),
    [((100.0, 120.0), "better"), ((100.0, 90.0), "worse"), ((100.0, 104.0), "noise"),
     ((100.0, None), "worse"), ((None, None), "equal")],
)  # fmt: skip
def test_the_rates_that_two_sweeps_found_are_told_apart_as_far_as_the_search_went(
    rates: tuple[float | None, float | None], verdict_of_it: str
) -> None:
    first, second = (result(1, None) | {"sweep": {"highest_rate_per_s": rate}} for rate in rates)
    assert verdict(first, second, "highest rate per s") == verdict_of_it
    assert len(compare(first, result(1, None))) == len(compare(first, second)) - 1


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 2}'])
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(BadParams):
        read_result(str(path))


def test_what_was_not_the_same_load_is_said() -> None:
    first, second = result(1, None), result(1, None)
    second["plan"] = {"arrivals": "poisson:8", "log": "elsewhere", "kind": "openai"}
    assert differing_plans(first, second) == ["arrivals: closed:8 in A, poisson:8 in B"]
    assert differing_plans(first, first) == []
