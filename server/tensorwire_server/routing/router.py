"""Which replica a request goes to. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence


class Candidate(Protocol):
    """What the choice depends on."""

    @property
    def is_ready(self) -> bool: ...

    @property
    def num_in_flight(self) -> int: ...


R = TypeVar("R", bound=Candidate)


def pick(replicas: Sequence[R], turn: int) -> R | None:
    """Return the ready replica with the least in flight; ties go round with `turn`.

    A fixed order of ties would send every burst to the same replica.
    """
    ready = [replica for replica in replicas if replica.is_ready]
    if not ready:
        return None
    start = turn % len(ready)
    return min(ready[start:] + ready[:start], key=lambda replica: replica.num_in_flight)
