"""What is laid out and what is taken: measured on this process, by the system's own book."""

from __future__ import annotations

import mmap
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorwire_server.engine.kv_cache import KVGeometry, SlotCache
from tensorwire_server.engine.memory import ZeroedTensor
from tensorwire_server.scheduling.work import Load, Save, StepPlan

CPU = torch.device("cpu")
MIB = 1 << 20


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def test_what_is_cleared_is_zero_and_its_neighbours_are_not() -> None:
    for row in (1, 10, 1024, 1500, 4096):
        zeroed = ZeroedTensor((3, 4, row), torch.float32, CPU)
        zeroed.tensor.fill_(7)
        zeroed.clear((1, 2))
        expected = torch.full((3, 4, row), 7.0)
        expected[1, 2] = 0
        assert torch.equal(zeroed.tensor, expected)


def test_memory_is_taken_where_something_is_written_and_given_back_where_it_is_cleared() -> None:
    before = anonymous_bytes()
    zeroed = ZeroedTensor((256, MIB // 4), torch.float32, CPU)
    assert anonymous_bytes() - before < 8 * MIB
    zeroed.tensor[:64].fill_(1)
    assert 60 * MIB <= anonymous_bytes() - before < 72 * MIB
    assert float(zeroed.tensor[64:].sum()) == 0
    assert anonymous_bytes() - before < 72 * MIB, "reading took memory"
    for i in range(64):
        zeroed.clear((i,))
    assert anonymous_bytes() - before < 8 * MIB


def plan(**fields: object) -> StepPlan:
    return StepPlan(**{"rows": (), "released": (), **fields})  # type: ignore[arg-type]


def save(page: int, number: int, *, start: int = 0, tokens: int = 16) -> Save:
    return Save(page=page, sequence_id=number, start=start, end=start + tokens, page_tokens=PAGE)


GEOMETRY = KVGeometry(num_layers=4, num_heads=2, head_size=64, dtype=torch.float32, device=CPU)
PAGE = 16


def fill(cache: SlotCache, number: int, start: int, end: int) -> None:
    arena, slot = cache.place(number)
    values = torch.arange(start, end, dtype=torch.float32) + 1000 * number + 1
    cache.arenas[arena].kv_L2SHPD[:, :, slot, :, start:end] = values[None, None, None, :, None]


def content(cache: SlotCache, number: int, length: int) -> list[int]:
    arena, slot = cache.place(number)
    kv = cache.arenas[arena].kv_L2SHPD[:, :, slot, :, :length]
    assert (kv == kv[:1, :1, :1, :, :1]).all(), "heads, layers or halves differ"
    return [int(value) for value in kv[0, 0, 0, :, 0]]


def test_pages_go_to_the_store_and_into_another_sequence() -> None:
    cache = SlotCache(GEOMETRY, context_tokens=700)
    cache.reserve(1, 0, 40)
    fill(cache, 1, 0, 40)
    saves = [save(9 - i, 1, start=16 * i) for i in (0, 1)]
    # A page of an extent of its own, and a sequence that leaves with the plan.
    saves.append(save(5000, 1, start=16))
    load = Load(sequence_id=2, pages=(9, 8), token_ids=tuple(range(32)))
    cache.prepare(plan(saves=tuple(saves), released=(1,), loads=(load,)))
    assert content(cache, 2, 32) == [1001 + i for i in range(32)]
    cache.prepare(plan(saves=tuple(saves), loads=(load,)))  # told twice: the first is gone
    assert content(cache, 2, 32) == [1001 + i for i in range(32)]
    assert cache.stats()["kv_cached_pages"] == 3
    cache.prepare(plan(dropped=(9, 5000, 77), released=(2,)))
    assert cache.stats()["kv_cached_pages"] == 1
    with pytest.raises(AssertionError, match="never saved"):
        cache.store.page(9)
    cache.check_invariants()


def test_what_is_behind_the_last_whole_page_is_a_page_of_its_own() -> None:
    cache = SlotCache(GEOMETRY, context_tokens=700)
    cache.reserve(1, 0, 40)
    fill(cache, 1, 0, 40)
    before = anonymous_bytes()
    saves = (save(3, 1, start=32, tokens=5), save(1, 1), save(2, 1, start=16))
    load = Load(sequence_id=2, pages=(1, 2, 3), token_ids=tuple(range(37)))
    cache.prepare(plan(saves=saves, loads=(load,)))
    assert content(cache, 2, 37) == [1001 + i for i in range(37)]
    assert cache.length(2) == 37
    cache.check_invariants()  # what the first has behind that is not the second's
    # Counted as a whole one: a page that is saved under its number next may be that.
    assert cache.store.num_bytes == 3 * GEOMETRY.page_bytes(PAGE)
    assert anonymous_bytes() - before < MIB
    cache.prepare(plan(saves=(save(3, 1),)))
    assert cache.store.page(3).shape[3] == PAGE


@pytest.mark.parametrize("head_size", [64, 40])
def test_the_cache_takes_no_more_of_the_system_than_its_pages_say(head_size: int) -> None:
    """Whatever sequences and saved pages come, grow, move and go."""
    rng = random.Random(5)
    geometry = replace(GEOMETRY, head_size=head_size)
    cache = SlotCache(geometry, context_tokens=4000)
    page_bytes, slack = geometry.page_bytes(PAGE), geometry.slack_bytes(PAGE)
    assert page_bytes == PAGE * geometry.bytes_per_token
    assert (slack == 0) == (head_size == 64)
    lengths: dict[int, int] = {}
    saved: set[int] = set()
    before = anonymous_bytes()
    largest = 0
    for number in range(400):
        if lengths and (rng.random() < 0.4 or sum(lengths.values()) > 12_000):
            gone = rng.choice(list(lengths))
            page = rng.randrange(300)
            dropped = rng.randrange(300)
            cache.prepare(plan(dropped=(dropped,), saves=(save(page, gone),), released=(gone,)))
            saved.discard(dropped)
            saved.add(page)
            del lengths[gone]
        else:
            which = number if rng.random() < 0.5 or not lengths else rng.choice(list(lengths))
            start = lengths.get(which, 0)
            end = min(4000, start + PAGE * rng.randrange(1, 60))
            cache.reserve(which, start, end)
            fill(cache, which, start, end)
            lengths[which] = end
        pages = sum(-(-length // PAGE) for length in lengths.values()) + len(saved)
        allowed = pages * page_bytes + len(lengths) * slack
        assert pages * page_bytes <= cache.stats()["kv_bytes"] <= allowed
        largest = max(largest, pages * page_bytes)
        assert anonymous_bytes() - before <= allowed + 6 * MIB
    assert largest > 20 * MIB
    for which in lengths:
        cache.release(which)
    for page in saved:
        cache.store.drop(page)
    assert cache.stats()["kv_bytes"] == 0
    assert anonymous_bytes() - before <= 6 * MIB


def test_a_row_of_heads_that_is_no_whole_system_page_is_reckoned_with() -> None:
    small = KVGeometry(num_layers=2, num_heads=3, head_size=16, dtype=torch.float32, device=CPU)
    assert small.slack_bytes(PAGE) == 2 * 2 * 3 * mmap.PAGESIZE
    assert small.page_bytes(PAGE) == 12288  # exactly three system pages
    odd = KVGeometry(num_layers=1, num_heads=1, head_size=20, dtype=torch.float32, device=CPU)
    assert odd.page_bytes(PAGE) == 4096
