"""Whom the load goes to: the seam between the driver and a protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tensorwire.loadtest.outcomes import Outcome
    from tensorwire.loadtest.verifying import Faults


class Target(Protocol):
    """A server, as the driver sees it."""

    async def connect(self) -> None:
        """Make the connections, so that the first requests do not pay for them."""

    async def perform(self, outcome: Outcome) -> None:
        """Do what `outcome.ask` says, and fill in the rest; whatever the server does is noted."""

    async def recheck(self) -> Sequence[tuple[str, Faults]]:
        """Check what can only be checked when the load is over; give group and faults of each."""

    async def close(self) -> None:
        """Give everything back."""

    def tally(self) -> Mapping[str, int]:
        """Return how often something was done again: `retries`, `resumes`."""
