"""What the asyncio side knows of whatever computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping


class Compute(Protocol):
    """`GenerateLoop`, `ArrayLoop` or `InlineArrays`: an engine and what drives it."""

    num_steps: int
    is_inline: bool  # it runs within `post`

    @property
    def engine(self) -> Any:
        """The `GenerateEngine` or `ArrayEngine`."""

    def post(self, commands: list[Any]) -> None:
        """Take what one turn of the asyncio loop gathered: what joins, and `Leave`."""

    def outcome_taken(self) -> None:
        """Hear that one outcome was dealt with."""

    def load(self) -> Mapping[str, float]:
        """Return what waits and runs."""

    def run(self) -> None:
        """Work until the process ends, on a thread of its own."""
