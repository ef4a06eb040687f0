"""Memory for large messages that is used again."""

from __future__ import annotations

import threading

import numpy as np
from tensorwire_protocol.pool import PooledMemory

MIB = 1024 * 1024


def address(segment: memoryview) -> int:
    found: int = np.frombuffer(segment, np.uint8).ctypes.data
    return found


def take(pool: PooledMemory, *lengths: int) -> list[memoryview]:
    return pool.reserve(lengths, lambda: None).segments


def test_memory_is_used_again_when_the_last_array_is_gone() -> None:
    pool = PooledMemory(4 * MIB)
    (segment,) = take(pool, MIB)
    where = address(segment)
    array = np.frombuffer(segment, np.float32)[5:]
    del segment
    assert address(take(pool, MIB)[0]) != where
    del array
    (again,) = take(pool, MIB - 5)  # pages are what counts
    assert (address(again), len(again)) == (where, MIB - 5)


def test_segments_are_aligned_even_if_they_are_empty() -> None:
    segments = take(PooledMemory(MIB), 10, 0, 5000)
    assert [len(segment) for segment in segments] == [10, 0, 5000]
    assert [address(segment) % 64 for segment in segments if len(segment)] == [0, 0]


def test_no_more_is_kept_than_allowed() -> None:
    pool = PooledMemory(2 * MIB)
    segments = take(pool, MIB, MIB, MIB)
    assert pool.num_idle_bytes == 0
    segments.clear()
    assert pool.num_idle_bytes == 2 * MIB


def test_memory_comes_back_from_any_thread() -> None:
    pool = PooledMemory(2 * MIB)
    segments = take(pool, MIB)
    thread = threading.Thread(target=segments.clear)
    thread.start()
    thread.join()
    assert pool.num_idle_bytes == MIB
