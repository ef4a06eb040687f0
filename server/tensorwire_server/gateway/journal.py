"""What the gateway keeps of each live request, so that another worker or reader could go on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tensorwire_protocol.tensors import ids_checksum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensorwire_protocol.messages import Request


_TOKEN_BYTES = 40  # of memory: an int, and its place in a list
# Until there are any: most requests have none. Nobody changes these.
_NO_TOKENS: Final[list[int]] = []
_NO_TEXTS: Final[list[str]] = []


def kept_bytes(tokens: Sequence[int], text: str) -> int:
    """Return about what tokens and their text take in memory."""
    return _TOKEN_BYTES * len(tokens) + len(text)


class Entry:
    """One request: what was asked, what was made of it, and who makes it now."""

    __slots__ = ("attempt", "prompt_ids", "request", "texts", "tokens")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.attempt = 0  # the number of the current attempt; 0: none yet
        self.prompt_ids: Sequence[int] = ()
        self.tokens: list[int] = _NO_TOKENS
        self.texts: list[str] = _NO_TEXTS  # in pieces; not in step with the tokens

    @property
    def text(self) -> str:
        """All text that has come."""
        if len(self.texts) > 1:
            self.texts = ["".join(self.texts)]
        return self.texts[0] if self.texts else ""

    @property
    def has_begun(self) -> bool:
        """Say if tokens or text have come."""
        return bool(self.tokens or self.texts)

    @property
    def num_bytes(self) -> int:
        """About what its tokens and their text take in memory."""
        return kept_bytes(self.tokens, self.text)

    def next_attempt(self) -> int:
        """Begin another attempt and return its number."""
        self.attempt += 1
        return self.attempt

    def append(self, first_index: int, tokens: Sequence[int], text: str = "") -> bool:
        """Take tokens if they follow what is here; say False of a gap or a repeat."""
        if first_index != len(self.tokens):
            return False
        if self.tokens:
            self.tokens += tokens
        else:
            self.tokens = [*tokens]
        if text and self.texts:
            self.texts.append(text)
        elif text:
            self.texts = [text]
        return True

    def agrees(self, count: int, checksum: int) -> bool:
        """Say if an END with these numbers ends exactly what is here."""
        return count == len(self.tokens) and checksum == ids_checksum(self.tokens)


class Journal:
    """The entries of all live requests."""

    def __init__(self) -> None:
        self._entries: set[Entry] = set()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_tokens(self) -> int:
        """Tokens kept in all, prompts included."""
        return sum(len(e.prompt_ids) + len(e.tokens) for e in self._entries)

    def open(self, request: Request) -> Entry:
        """Begin to keep a request."""
        entry = Entry(request)
        self._entries.add(entry)
        return entry

    def close(self, entry: Entry) -> None:
        """Forget a request that has ended."""
        self._entries.discard(entry)
