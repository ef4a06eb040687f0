"""Anonymous shared memory: no name, no file, passed on by descriptor alone.

Nobody has to say when a block is free: it comes back when the last array or buffer that refers to
it is gone, in whichever thread that happens.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
import weakref
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from tensorwire_server.memory.ranges import Ranges

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


def make_shared(num_bytes: int) -> int:
    """Return the descriptor of new shared memory; it costs nothing until it is touched."""
    fd = os.memfd_create("tensorwire", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, num_bytes)
    # Whoever could shrink the memory could kill everybody who reads it.
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def address_of(buffer: memoryview) -> int:
    """Return where a buffer begins in this process."""
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address


class Slab:
    """Memory that this process gives out in blocks.

    Args:
        fd: of `make_shared`; the slab closes it.

    Attributes:
        fd: for other processes, to read by and not to write.
        on_freed: called, in any thread, when a block has come back.
    """

    def __init__(self, fd: int) -> None:
        self.on_freed: Callable[[], None] = _nothing
        self._memory = mmap.mmap(fd, 0)
        with contextlib.suppress(OSError):  # only where the kernel knows and allows it
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        # Not the seal against writing: with it no page could be given back to the kernel.
        os.fchmod(fd, stat.S_IRUSR)
        self.fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        os.close(fd)
        self._ranges = Ranges(len(self._memory))
        self._blocks: weakref.WeakValueDictionary[int, NDArray[np.uint8]] = (
            weakref.WeakValueDictionary()
        )
        # Filled by finalizers, which may run anywhere, even in the middle of `allocate`.
        self._freed: deque[int] = deque()
        self._end = 0  # no byte behind it was touched since the last `trim`
        self._address = address_of(memoryview(self._memory))

    @property
    def size(self) -> int:
        """Bytes in all."""
        return self._ranges.size

    @property
    def num_used_bytes(self) -> int:
        """Bytes that are given out."""
        self._collect()
        return self._ranges.num_taken_bytes

    def allocate(self, num_bytes: int) -> memoryview | None:
        """Return memory that begins on a page; None: there is no room at present."""
        self._collect()
        start = self._ranges.take(num_bytes)
        if start is None:
            return None
        self._end = max(self._end, start + num_bytes)
        block = np.frombuffer(self._memory, np.uint8, num_bytes, start)
        self._blocks[start] = block
        weakref.finalize(block, self._on_dead, start).atexit = False
        return block.data

    def _on_dead(self, start: int) -> None:
        self._freed.append(start)
        self.on_freed()

    def _collect(self) -> None:
        while self._freed:
            self._ranges.give_back(self._freed.popleft())

    def locate(self, buffer: memoryview) -> int | None:
        """Return the offset at which a buffer lies here; None if it lies elsewhere."""
        offset = address_of(buffer) - self._address
        return offset if 0 <= offset <= self.size - len(buffer) else None

    def view(self, offset: int, num_bytes: int) -> memoryview | None:
        """Return a part of a block that is given out; None if there is no such block."""
        self._collect()
        start = self._ranges.holder(offset, num_bytes)
        block = None if start is None else self._blocks.get(start)
        if start is None or block is None:
            return None
        return block.data[offset - start : offset - start + num_bytes]

    def trim(self) -> None:
        """Give all pages back to the kernel, if nothing is in use."""
        if self._end and self.num_used_bytes == 0:
            self._memory.madvise(mmap.MADV_REMOVE)
            self._end = 0

    def check_invariants(self) -> None:
        """The books of the ranges are right, and each has its block."""
        self._collect()
        self._ranges.check_invariants()
        assert self._ranges.num_taken == len(self._blocks)

    def __del__(self) -> None:
        os.close(self.fd)


class Borrowed:
    """Memory of another process, to be read only."""

    def __init__(self, fd: int) -> None:
        self._memory = memoryview(mmap.mmap(fd, 0, prot=mmap.PROT_READ))
        self._address = address_of(self._memory)

    def locate(self, buffer: memoryview) -> int | None:
        """Return the offset at which a buffer lies here; None if it lies elsewhere."""
        offset = address_of(buffer) - self._address
        return offset if 0 <= offset <= len(self._memory) - len(buffer) else None

    def view(self, offset: int, num_bytes: int) -> memoryview | None:
        """Return a part of it; None if there is no such part."""
        if offset < 0 or offset + num_bytes > len(self._memory):
            return None
        return self._memory[offset : offset + num_bytes]


def _nothing() -> None:
    """Stand in for `on_freed`."""
