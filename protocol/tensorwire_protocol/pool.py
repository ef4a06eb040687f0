"""Memory for large messages that is used again: new pages cost as much as copying into them."""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from typing import TYPE_CHECKING

import numpy as np

from tensorwire_protocol.bodies import Placed
from tensorwire_protocol.tensors import aligned_buffer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_PAGE_BYTES = 4096


class PooledMemory:
    """Memory for each segment, which comes back when the last array that refers to it is gone.

    It takes no lock: that may happen in any thread, and in the middle of anything.

    Args:
        keep_bytes: of memory that nobody uses, at most.
    """

    def __init__(self, keep_bytes: int) -> None:
        self._keep_bytes = keep_bytes
        self._idle: defaultdict[int, deque[memoryview]] = defaultdict(deque)  # by size

    @property
    def num_idle_bytes(self) -> int:
        """Bytes that nobody uses."""
        return sum(size * len(blocks) for size, blocks in [*self._idle.items()])

    def reserve(self, lengths: Sequence[int], on_ready: Callable[[], None]) -> Placed:
        """Return memory at once."""
        return Placed([self._take(length) for length in lengths])

    def _take(self, num_bytes: int) -> memoryview:
        size = -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES
        try:
            block = self._idle[size].pop()
        except IndexError:
            block = aligned_buffer(size)
        user = np.frombuffer(block, np.uint8, num_bytes)
        weakref.finalize(user, self._give_back, block).atexit = False
        return user.data

    def _give_back(self, block: memoryview) -> None:
        if self.num_idle_bytes + len(block) <= self._keep_bytes:
            self._idle[len(block)].append(block)
