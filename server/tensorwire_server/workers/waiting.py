"""Texts that wait for a thread: no more than a bound, and none of a stream that has ended.

A thread pool keeps what it was given until its turn comes, cancelled or not. So it gets a `Job`,
whose text goes with the stream. All but `run` is for the loop's thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from tensorwire_protocol.errors import Busy

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

# Half a minute of tokenizing, and four times what one client's `embed` has in flight at most.
MAX_WAITING_CHARS = 64 * 1024 * 1024


class Ended(Exception):
    """The stream is gone; nobody is told."""


class WaitingTexts:
    """How much waits; one text goes alone, whatever its size."""

    def __init__(self, max_chars: int = MAX_WAITING_CHARS) -> None:
        self.num_chars = 0
        self._max_chars = max_chars

    def add(self, num_chars: int, encode: Callable[[], T], then: Callable[[T], None]) -> Job[T]:
        """Return the job that a thread is to run.

        Raises:
            Busy: with the numbers; nothing changed.
        """
        if self.num_chars and self.num_chars + num_chars > self._max_chars:
            raise Busy(
                f"{self.num_chars} characters wait to be tokenized, {num_chars} more would be above"
                f" the limit of {self._max_chars}; try again later"
            )
        self.num_chars += num_chars
        return Job(self, num_chars, encode, then)


class Job(Generic[T]):
    """One text on its way through a thread."""

    def __init__(
        self,
        waiting: WaitingTexts,
        num_chars: int,
        encode: Callable[[], T],
        then: Callable[[T], None],
    ) -> None:
        self._waiting = waiting
        self._num_chars = num_chars
        self._work: tuple[Callable[[], T], Callable[[T], None]] | None = (encode, then)

    def run(self) -> T:
        """Do it, on any thread.

        Raises:
            Ended: it was dropped before.
        """
        work = self._work
        if work is None:
            raise Ended
        return work[0]()

    def finish(self) -> Callable[[T], None] | None:
        """Return what is to be called with its result; None if it was dropped."""
        work = self._work
        self.drop()
        return None if work is None else work[1]

    def drop(self) -> None:
        """Forget the text, and give its room back."""
        if self._work is not None:
            self._work = None
            self._waiting.num_chars -= self._num_chars
