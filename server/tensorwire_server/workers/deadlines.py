"""When which request is out of time."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

_NEVER: Final = inf


class Expiring(Protocol):
    """What may have a deadline."""

    deadline: float  # monotonic s; infinite without one


class Deadlines:
    """Deadlines of open requests, which keep them themselves. Pure: `now` is an argument.

    Nearly all requests finish long before their time, so none costs more here than a comparison:
    all are looked through when the first that was noted would be due, a few thousand at most. By
    then it has finished, most likely, and the next time is that of another.
    """

    def __init__(self, streams: Mapping[int, Expiring]) -> None:
        self._streams = streams  # the open ones by id
        self._look_at = _NEVER  # not after any open deadline

    def note(self, deadline: float) -> bool:
        """Take note of an open request's deadline; says if `next_due` is earlier now."""
        if deadline >= self._look_at:
            return False
        self._look_at = deadline
        return True

    def take_due(self, now: float) -> list[int]:
        """Return the open requests whose time is over, the earliest first: close them."""
        if now < self._look_at:
            return []
        due: list[tuple[float, int]] = []
        self._look_at = _NEVER
        for id, stream in self._streams.items():
            deadline = stream.deadline
            if deadline <= now:
                due.append((deadline, id))
            elif deadline < self._look_at:
                self._look_at = deadline
        return [id for _, id in sorted(due)]

    def next_due(self) -> float | None:
        """Return when `take_due` has to be called, None if no open request has a deadline."""
        return None if self._look_at == _NEVER else self._look_at
