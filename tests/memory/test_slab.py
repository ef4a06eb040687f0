"""Shared memory in blocks that come back by themselves."""

from __future__ import annotations

import gc
import mmap
import os
import threading

import numpy as np
import pytest
from tensorwire_server.memory.slab import Borrowed, Slab, make_shared

MIB = 1024 * 1024


def slab(num_bytes: int = MIB) -> Slab:
    return Slab(make_shared(num_bytes))


def test_a_block_comes_back_when_the_last_array_is_gone() -> None:
    memory = slab()
    block = memory.allocate(MIB)
    assert block is not None
    array = np.frombuffer(block[100:200], np.uint8).reshape(2, 50)[1:]
    del block
    assert memory.allocate(1) is None
    memory.check_invariants()
    del array
    assert memory.num_used_bytes == 0
    assert memory.allocate(MIB) is not None
    memory.check_invariants()


def test_a_block_may_end_in_another_thread() -> None:
    memory = slab()
    told: list[str] = []
    memory.on_freed = lambda: told.append(threading.current_thread().name)
    blocks = [memory.allocate(10)]
    thread = threading.Thread(target=blocks.clear, name="other")
    thread.start()
    thread.join()
    assert told == ["other"]
    assert memory.num_used_bytes == 0


def test_a_buffer_is_located_only_where_it_lies() -> None:
    memory, other = slab(), slab()
    first, second = memory.allocate(10), memory.allocate(10)
    elsewhere = other.allocate(10)
    assert first is not None
    assert second is not None
    assert elsewhere is not None
    assert memory.locate(second[3:5]) == 4096 + 3
    assert memory.locate(elsewhere) is None
    assert memory.locate(memoryview(bytes(10))) is None


def test_a_view_is_of_a_block_that_is_given_out() -> None:
    memory = slab()
    block = memory.allocate(100)
    assert block is not None
    block[5:8] = b"abc"
    view = memory.view(5, 3)
    del block
    assert view is not None
    assert bytes(view) == b"abc"
    assert memory.num_used_bytes == 4096
    assert memory.view(5, 5000) is None
    assert memory.view(8192, 3) is None


def test_nobody_can_shrink_shared_memory() -> None:
    fd = make_shared(MIB)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 4096)
    os.close(fd)


def test_another_process_reads_and_cannot_write_or_shrink() -> None:
    memory = slab()
    block = memory.allocate(4)
    assert block is not None
    block[:] = b"seen"
    borrowed = Borrowed(memory.fd)
    view = borrowed.view(0, 4)
    assert view is not None
    assert (bytes(view), view.readonly) == (b"seen", True)
    with pytest.raises(PermissionError):
        mmap.mmap(memory.fd, 0)
    with pytest.raises(OSError, match="Invalid argument"):
        os.ftruncate(memory.fd, 4096)
    assert borrowed.view(MIB - 3, 4) is None
    assert borrowed.view(-1, 4) is None


def test_idle_memory_goes_back_to_the_kernel() -> None:
    memory = slab(4 * MIB)
    block = memory.allocate(4 * MIB)
    assert block is not None
    np.frombuffer(block, np.uint8)[:] = 1
    memory.trim()
    assert os.fstat(memory.fd).st_blocks * 512 == 4 * MIB
    del block
    memory.trim()
    assert os.fstat(memory.fd).st_blocks == 0


def test_a_slab_that_is_gone_leaves_no_descriptor() -> None:
    gc.collect()  # what other tests have left
    before = len(os.listdir("/proc/self/fd"))
    memory = slab()
    block = memory.allocate(10)
    del memory
    del block
    assert len(os.listdir("/proc/self/fd")) == before
