"""What all connections of a server hold of messages that are not complete, in one bounded sum.

That is unfinished frames, and what comes of a body while there is no place for it: places have a
bound of their own.

Each connection has bounds of its own, but thousands of peers that each send most of a large frame
would still add up. When the sum is above its bound, whoever holds most has to give it up: that is
the one who makes the difference, and small requests of others go on.
"""

from __future__ import annotations

from typing import Protocol

from tensorwire_protocol.errors import Busy


class Holder(Protocol):
    """Something that holds receive memory, and can be told to let it go."""

    def evict(self, error: Busy) -> None:
        """Free the memory, which is not counted any more."""


class ReceiveMemory:
    """The sum, and who holds how much of it. Pure.

    Args:
        limit_bytes: the bound on the sum.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held: dict[Holder, int] = {}
        self.num_bytes = 0

    def hold(self, holder: Holder, num_bytes: int) -> None:
        """Say how much `holder` holds from now on; to be called before it is allocated.

        Raises:
            Busy: the sum is at its bound and this is who holds most; it holds as much as before.
        """
        before = self._held.get(holder, 0)
        while self.num_bytes - before + num_bytes > self._limit_bytes:
            greediest = max(self._held, key=self._held.__getitem__, default=holder)
            if num_bytes >= self._held.get(greediest, 0):
                raise _busy(num_bytes)
            freed = self._held.pop(greediest)
            self.num_bytes -= freed
            greediest.evict(_busy(freed))
        self.num_bytes += num_bytes - before
        if num_bytes:
            self._held[holder] = num_bytes
        else:
            self._held.pop(holder, None)

    def check_invariants(self) -> None:
        """The sum is that of all holders, and within its bound."""
        assert self.num_bytes == sum(self._held.values()) <= self._limit_bytes
        assert all(self._held.values())


class Holding:
    """What one holder holds, of two kinds.

    Both raise as `ReceiveMemory.hold` does.
    """

    __slots__ = ("_bodies_bytes", "_frame_bytes", "_holder", "_memory")

    def __init__(self, memory: ReceiveMemory, holder: Holder) -> None:
        self._memory, self._holder = memory, holder
        self._frame_bytes = self._bodies_bytes = 0

    def hold_frame(self, num_bytes: int) -> None:
        """Say how much its unfinished frame takes from now on."""
        self._memory.hold(self._holder, num_bytes + self._bodies_bytes)
        self._frame_bytes = num_bytes

    def hold_bodies(self, num_bytes: int) -> None:
        """Say how much its bodies take from now on, in memory that nothing else bounds."""
        self._memory.hold(self._holder, self._frame_bytes + num_bytes)
        self._bodies_bytes = num_bytes


def _busy(num_bytes: int) -> Busy:
    return Busy(
        "the server's memory for what it receives is full, and this connection holds most of it"
        f" ({num_bytes} bytes); try again",
        retry_after_ms=1000,
    )
