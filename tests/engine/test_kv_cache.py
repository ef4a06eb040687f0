from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorwire_server.engine.kv_cache import KVGeometry, SlotCache

GEOMETRY = KVGeometry(
    num_layers=2, num_heads=2, head_size=3, dtype=torch.float32, device=torch.device("cpu")
)

NOTHING = {"kv_sequences": 0, "kv_tokens": 0, "kv_cached_pages": 0, "kv_bytes": 0}


def fill(cache: SlotCache, number: int, start: int, end: int) -> None:
    """Write what a forward pass would: here the sequence's number and the position."""
    arena, slot = cache.place(number)
    for position in range(start, end):
        cache.arenas[arena].kv_L2SHPD[:, :, slot, :, position] = 1000 * number + position + 1


def content(cache: SlotCache, number: int, length: int) -> list[int]:
    arena, slot = cache.place(number)
    kv = cache.arenas[arena].kv_L2SHPD[:, :, slot, :, :length]
    assert (kv == kv[:1, :1, :1, :, :1]).all(), "heads, layers or halves differ"
    return [int(value) for value in kv[0, 0, 0, :, 0]]


def test_size_classes_double_up_to_the_context() -> None:
    cache = SlotCache(GEOMETRY, context_tokens=700)
    assert [arena.num_positions for arena in cache.arenas] == [128, 256, 512, 700]
    assert [a.num_positions for a in SlotCache(GEOMETRY, context_tokens=50).arenas] == [50]


def test_nothing_is_allocated_before_it_is_needed() -> None:
    cache = SlotCache(GEOMETRY, context_tokens=1 << 20)
    assert cache.stats()["kv_bytes"] == 0
    cache.reserve(1, 0, 10)
    assert cache.stats() == {
        "kv_sequences": 1,
        "kv_tokens": 10,
        "kv_cached_pages": 0,
        "kv_bytes": 2 * 2 * 2 * 4096,  # a system page for each head's row
    }


def test_a_gap_is_our_own_bug() -> None:
    cache = SlotCache(GEOMETRY, context_tokens=700)
    cache.reserve(1, 0, 10)
    with pytest.raises(AssertionError, match="gap"):
        cache.reserve(1, 11, 12)


def test_more_than_the_context_is_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="context"):
        SlotCache(GEOMETRY, context_tokens=50).reserve(1, 0, 51)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 7), st.booleans(), st.integers(1, 150)), min_size=1, max_size=25
    )
)
def test_every_sequence_keeps_its_own_whatever_comes_and_goes(
    actions: list[tuple[int, bool, int]],
) -> None:
    cache = SlotCache(GEOMETRY, context_tokens=400)
    lengths: dict[int, int] = {}
    for number, leaves, grows in actions:
        if leaves:
            cache.release(number)
            lengths.pop(number, None)
        else:
            start = lengths.get(number, 0)
            end = min(start + grows, 400)
            cache.reserve(number, start, end)
            fill(cache, number, start, end)
            lengths[number] = end
        for other, length in lengths.items():
            assert content(cache, other, length) == [1000 * other + i + 1 for i in range(length)]
        cache.check_invariants()
    for number in list(lengths):
        cache.release(number)
    assert cache.stats() == NOTHING
