"""Stop strings, found in text that arrives in pieces of any size."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class StopMatcher:
    """Holds back what could still become a stop string, and cuts at the first one that does.

    First is the one that is complete first, whatever the pieces; of those that end together, the
    longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._longest = max(map(len, stops))
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Return the text that is certain now, and whether a stop string ended it."""
        if not text:
            return "", False
        text = self._held + text
        ends = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        if ends:
            self._held = ""
            return text[: min(ends)[1]], True
        certain = len(text) - self._num_undecided(text)
        self._held = text[certain:]
        return text[:certain], False

    def flush(self) -> str:
        """Return what was held back: no more text is coming."""
        held, self._held = self._held, ""
        return held

    def _num_undecided(self, text: str) -> int:
        """Return the length of the longest end of `text` that begins a stop string."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first_chars:
                tail = text[start:]
                if any(stop.startswith(tail) for stop in self._stops):
                    return len(tail)
        return 0
