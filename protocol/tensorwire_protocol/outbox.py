"""What a connection has to say and the shell has not taken yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_JOIN_BYTES = 128 * 1024  # frames up to this size are joined into one write


class Outbox:
    """Buffers in the order in which they leave."""

    def __init__(self) -> None:
        self.num_bytes = 0  # waiting for `take`
        self._waiting: list[bytes | memoryview] = []
        self._held: list[bytes | memoryview] = []

    def add(self, buffers: Sequence[bytes | memoryview], size: int) -> None:
        """Queue buffers of `size` bytes in all."""
        self._waiting += buffers
        self.num_bytes += size

    def hold(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Keep buffers until `release`: it is too early for them."""
        self._held += buffers

    def release(self) -> None:
        """Queue what was held."""
        self.add(self._held, sum(map(len, self._held)))
        self._held = []

    def clear(self) -> None:
        """Forget what waits."""
        self._waiting, self.num_bytes = [], 0

    def take(self) -> list[bytes | memoryview]:
        """Return what is to be written, in order, small frames joined; nothing waits then."""
        waiting, self._waiting, self.num_bytes = self._waiting, [], 0
        return waiting if len(waiting) <= 1 else _joined(waiting)


def _joined(buffers: list[bytes | memoryview]) -> list[bytes | memoryview]:
    joined: list[bytes | memoryview] = []
    run: list[bytes | memoryview] = []
    for buffer in buffers:
        if len(buffer) <= _JOIN_BYTES:
            run.append(buffer)
            continue
        if run:
            joined.append(b"".join(run))
            run = []
        joined.append(buffer)
    if run:
        joined.append(b"".join(run))
    return joined
