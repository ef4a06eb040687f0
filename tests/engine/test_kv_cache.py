from __future__ import annotations

import resource
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorwire_server.engine.kv_cache import KVGeometry, SlotCache
from tensorwire_server.engine.memory import SYSTEM_PAGE_BYTES
from tensorwire_server.scheduling.work import StepPlan

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def one_more_token(cache: SlotCache, lengths: dict[int, int], *, holes: bool = False) -> list[int]:
    """Have each sequence grow by a token, as in a step; return who has moved to a larger slot.

    Args:
        holes: who moves may leave one, into which another moves.
    """
    before = {number: cache.place(number) for number in lengths}
    cache.prepare(StepPlan(rows=(), released=()))
    for number, length in lengths.items():
        cache.reserve(number, length, length + 1)
        fill(cache, number, length, length + 1)
        lengths[number] += 1
    moved = [number for number in lengths if cache.place(number)[0] != before[number][0]]
    others = [number for number in lengths if cache.place(number) != before[number]]
    assert holes or others == moved
    return moved


@pytest.mark.parametrize("apart", [0, 1, 5])
def test_sequences_that_outgrow_their_slots_together_move_one_in_a_step(apart: int) -> None:
    cache = SlotCache(GEOMETRY, context_tokens=512)
    lengths = {number: 100 + number * apart for number in range(6)}
    for number, length in lengths.items():
        cache.reserve(number, 0, length)
        fill(cache, number, 0, length)
    moved = []
    for _ in range(170):
        is_told = cache.will_move
        changed = one_more_token(cache, lengths, holes=apart > 0)
        assert len(changed) == is_told
        moved += changed
        for number in changed:
            assert content(cache, number, lengths[number]) == [
                1000 * number + i + 1 for i in range(lengths[number])
            ]
    assert sorted(moved) == sorted([*lengths] * 2)
    cache.check_invariants()


def test_nobody_moves_long_before_it_must() -> None:
    cache = SlotCache(GEOMETRY, context_tokens=512)
    lengths = {2: 30, 1: 110}
    for number, length in lengths.items():
        cache.reserve(number, 0, length)
    for _ in range(17):
        assert one_more_token(cache, lengths) == []
    assert one_more_token(cache, lengths) == [1]


@pytest.mark.parametrize(("prompt", "positions"), [(96, 128), (97, 256), (128, 256), (512, 512)])
def test_a_prompt_is_read_into_a_slot_with_room_for_an_answer(prompt: int, positions: int) -> None:
    cache = SlotCache(GEOMETRY, context_tokens=512)
    cache.prepare(StepPlan(rows=(), released=(), reading=((1, prompt),)))
    arena, _ = cache.place(1)
    assert cache.arenas[arena].num_positions == positions


def test_on_a_device_where_slots_take_memory_at_once_a_prompt_begins_in_the_smallest() -> None:
    cache = SlotCache(replace(GEOMETRY, device=torch.device("meta")), context_tokens=512)
    cache.prepare(StepPlan(rows=(), released=(), reading=((1, 128),)))
    arena, _ = cache.place(1)
    assert cache.arenas[arena].num_positions == 128


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """Let this process have so many bytes of addresses more, as `ulimit -v` does."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * SYSTEM_PAGE_BYTES + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_where_addresses_are_short_no_more_slots_are_laid_out_than_needed() -> None:
    cache = SlotCache(replace(GEOMETRY, head_size=512), context_tokens=8192)
    slot_bytes = 8192 * 2 * 2 * 2 * 512 * 4
    with room_for(2 * slot_bytes):
        cache.reserve(1, 0, 5000)
    fill(cache, 1, 0, 3)
    assert content(cache, 1, 3) == [1001, 1002, 1003]
    with room_for(slot_bytes // 2), pytest.raises(MemoryError, match=f"{2 * slot_bytes} bytes"):
        cache.reserve(2, 0, 5000)


@pytest.mark.parametrize(("head_size", "at_once"), [(16, 64), (2048, 8)])
def test_many_slots_are_laid_out_at_once_if_there_are_addresses(
    head_size: int, at_once: int
) -> None:
    """Else each sequence that joins would have all the others copied."""
    cache = SlotCache(replace(GEOMETRY, head_size=head_size), context_tokens=8192)
    cache.reserve(0, 0, 5000)
    first = cache.arenas[-1].kv_L2SHPD.data_ptr()
    for number in range(1, at_once):
        cache.reserve(number, 0, 5000)
        assert cache.arenas[-1].kv_L2SHPD.data_ptr() == first
    cache.reserve(at_once, 0, 5000)
    assert cache.arenas[-1].kv_L2SHPD.data_ptr() != first


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
