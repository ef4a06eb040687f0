from __future__ import annotations

import pytest
from tensorwire.errors import BadParams
from tensorwire.loadtest.sweep import RateSearch, parse_sweep


def found(search: RateSearch, most_per_s: float) -> list[float]:
    """Return the rates that are tried on a server that can do so many."""
    tried = []
    while (rate := search.next_rate()) is not None:
        tried.append(rate)
        search.tell(rate, is_met=rate <= most_per_s)
    return tried


@pytest.mark.parametrize("most", [10.0, 37.0, 100.0, 399.0])
def test_the_highest_rate_is_found_to_five_percent(most: float) -> None:
    search = parse_sweep("10-400")
    tried = found(search, most)
    assert search.best_per_s is not None
    assert most / 1.05 <= search.best_per_s <= most
    assert len(tried) <= 12


def test_a_server_that_can_do_everything_is_tried_at_the_end_and_no_further() -> None:
    search = parse_sweep("10-50")
    assert found(search, 1e9) == [10, 20, 40, 50]
    assert search.best_per_s == 50


def test_a_server_that_can_do_nothing_is_tried_once() -> None:
    search = parse_sweep("10-50")
    assert found(search, 0) == [10]
    assert search.best_per_s is None


@pytest.mark.parametrize("text", ["", "5", "9-3", "0-3", "a-b"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(BadParams):
        parse_sweep(text)
