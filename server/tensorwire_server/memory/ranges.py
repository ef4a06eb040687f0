"""Which parts of a stretch of memory are taken. Pure."""

from __future__ import annotations

PAGE_BYTES = 4096  # what is given out is whole pages, so that idle ones can go back to the kernel


class Ranges:
    """First fit, lowest address first: what was used last is used again, and its pages are there.

    Args:
        size: of the whole, in bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size // PAGE_BYTES * PAGE_BYTES
        self.num_taken_bytes = 0
        self._free: list[tuple[int, int]] = [(0, self.size)]  # start and size, in order
        self._taken: dict[int, int] = {}

    @property
    def num_taken(self) -> int:
        """How many ranges are taken."""
        return len(self._taken)

    def take(self, num_bytes: int) -> int | None:
        """Return the start of a range of at least so many bytes; None: there is no such room."""
        wanted = max(1, -(-num_bytes // PAGE_BYTES)) * PAGE_BYTES
        for i, (start, size) in enumerate(self._free):
            if size >= wanted:
                self._free[i : i + 1] = [(start + wanted, size - wanted)] if size > wanted else []
                self._taken[start] = wanted
                self.num_taken_bytes += wanted
                return start
        return None

    def give_back(self, start: int) -> None:
        """Let go of the range that begins at `start`."""
        size = self._taken.pop(start)
        self.num_taken_bytes -= size
        at = next((i for i, (other, _) in enumerate(self._free) if other > start), len(self._free))
        self._free.insert(at, (start, size))
        self._join(at)
        if at:
            self._join(at - 1)

    def _join(self, at: int) -> None:
        """Make one of a free range and the next, if they touch."""
        if at + 1 < len(self._free):
            (start, size), (next_start, next_size) = self._free[at : at + 2]
            if start + size == next_start:
                self._free[at : at + 2] = [(start, size + next_size)]

    def holder(self, offset: int, num_bytes: int) -> int | None:
        """Return the start of the taken range that holds all of these bytes."""
        for start, size in self._taken.items():
            if start <= offset and offset + num_bytes <= start + size:
                return start
        return None

    def check_invariants(self) -> None:
        """Every byte is free or taken, once; no two free ranges touch."""
        at = 0
        was_free = False
        for start, size, is_free in sorted(
            [(*free, True) for free in self._free]
            + [(*taken, False) for taken in self._taken.items()]
        ):
            assert start == at
            assert size > 0
            assert not (was_free and is_free)
            at, was_free = start + size, is_free
        assert at == self.size
        assert self.num_taken_bytes == sum(self._taken.values())
