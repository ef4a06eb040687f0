"""From bytes to pages, and never more of them than the bytes hold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from tensorwire_server.scheduling.work import ModelCard
from tensorwire_server.workers.kv_budget import KVBudgetTooSmall, find_kv_budget
from tensorwire_server.workers.oracle import OracleEngine
from tensorwire_server.workers.spec import WorkerSpec

SPEC = WorkerSpec(model="m", source="x", max_running=8)


@dataclass
class Geometry:
    page: int = 1000
    slack: int = 0
    free: int = 64_000_000

    def page_bytes(self, page_tokens: int) -> int:
        return self.page

    def slack_bytes(self, page_tokens: int) -> int:
        return self.slack

    def free_bytes(self) -> int:
        return self.free


class Engine:
    def __init__(self, geometry: Geometry, context_tokens: int = 1 << 20) -> None:
        self.kv_geometry = geometry
        self.card = ModelCard(
            tasks=frozenset({"generate"}), architecture="x", context_tokens=context_tokens
        )


def find(geometry: Geometry, kv_bytes: int | None = None, **fields: Any) -> Any:
    engine: Any = Engine(geometry)
    return find_kv_budget(engine, replace(SPEC, kv_bytes=kv_bytes, **fields))


@pytest.mark.parametrize("slack", [0, 500, 40_000])
@pytest.mark.parametrize("kv_bytes", [3_000, 50_000, 1_000_000])
def test_pages_and_what_lies_beside_them_fit_into_the_bytes(slack: int, kv_bytes: int) -> None:
    try:
        budget = find(Geometry(slack=slack), kv_bytes)
    except KVBudgetTooSmall:
        assert kv_bytes - slack < 1000
        return
    pages = budget.num_pages + budget.saved_on_leaving
    assert pages * 1000 + budget.max_running * slack <= kv_bytes
    assert budget.num_pages * 1000 >= 0.4 * kv_bytes - slack, "half of it is wasted"
    assert 1 <= budget.max_running <= 8


def test_half_of_what_is_free_is_taken_and_shared_among_workers() -> None:
    assert find(Geometry()).num_bytes == 32_000_000
    assert find(Geometry(), kv_share=0.25).num_bytes == 8_000_000


def test_no_more_pages_than_could_ever_be_used() -> None:
    engine: Any = Engine(Geometry(), context_tokens=100)
    assert find_kv_budget(engine, SPEC).num_pages == 2 * 8 * 7


def test_less_than_a_page_is_refused_in_words() -> None:
    with pytest.raises(KVBudgetTooSmall, match="999 bytes for keys and values do not hold one"):
        find(Geometry(), 999)


def test_an_engine_without_a_cache_has_pages_enough() -> None:
    budget = find_kv_budget(OracleEngine(), SPEC)
    assert (budget.num_bytes, budget.num_tokens) == (None, 2 * 8 * 4096)
