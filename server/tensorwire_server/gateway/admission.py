"""How much may be queued or running; the rest is refused at once. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorwire_protocol.errors import Busy

if TYPE_CHECKING:
    from tensorwire_server.config import AdmissionConfig

RETRY_AFTER_MS = 100


class Admission:
    """Counts live requests; each that `admit` lets in must `leave` exactly once."""

    def __init__(self, config: AdmissionConfig) -> None:
        self._max_requests = config.max_requests
        self._max_requests_per_model = config.max_requests_per_model
        self._live: dict[str, int] = {}
        self._total = 0

    @property
    def total(self) -> int:
        """Requests that were let in and have not left."""
        return self._total

    def admit(self, model: str) -> None:
        """Let one request of `model` in.

        Raises:
            Busy: a bound is reached; nothing changed.
        """
        live = self._live.get(model, 0)
        if self._total >= self._max_requests:
            raise _busy("the server", self._total, self._max_requests)
        if live >= self._max_requests_per_model:
            raise _busy(f"model {model!r}", live, self._max_requests_per_model)
        self._live[model] = live + 1
        self._total += 1

    def leave(self, model: str) -> None:
        """Take one request of `model` out."""
        live = self._live.get(model, 0)
        assert live > 0, f"a request of {model!r} left twice"
        self._live[model] = live - 1
        self._total -= 1

    def check_invariants(self) -> None:
        """No count is below zero, and the total is their sum."""
        assert min(self._live.values(), default=0) >= 0
        assert self._total == sum(self._live.values())

    def counts(self) -> dict[str, int]:
        """Return the live requests of each model that has any."""
        return {model: count for model, count in self._live.items() if count}


def _busy(whose: str, live: int, limit: int) -> Busy:
    return Busy(
        f"{whose} has {live} of {limit} requests; try again",
        retry_after_ms=RETRY_AFTER_MS,
        detail={"live": live, "limit": limit},
    )
