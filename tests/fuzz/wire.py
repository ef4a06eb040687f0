"""Two connections joined by bytes in memory, which arrive in whatever pieces a test likes."""

from __future__ import annotations

import gc
import sys
from enum import Enum
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorwire_protocol.connection import Connection
    from tensorwire_protocol.messages import Message


class Wire:
    """Carries what both ends say; what is not delivered is lost with it."""

    def __init__(self, opener: Connection, answerer: Connection) -> None:
        self.opener, self.answerer = opener, answerer
        self._to_answerer, self._to_opener = bytearray(), bytearray()

    def deliver(self, num_bytes: int, now: float, *, up: bool) -> list[Message]:
        """Let up to `num_bytes` arrive at one end; return what it makes of them."""
        self._collect()
        there, end = (self._to_answerer, self.answerer) if up else (self._to_opener, self.opener)
        piece = bytes(there[:num_bytes])
        del there[:num_bytes]
        return end.feed(piece, now)

    def is_quiet(self) -> bool:
        """Say if nothing is on its way."""
        self._collect()
        return not self._to_answerer and not self._to_opener

    def _collect(self) -> None:
        for end, there in ((self.opener, self._to_answerer), (self.answerer, self._to_opener)):
            announced, has_bulk = end.pending_bytes, end.has_bulk
            said = b"".join(end.take_output())
            assert len(said) == announced or (has_bulk and len(said) > announced)
            assert end.pending_bytes == 0
            there += said


_SHARED = (type, ModuleType, FunctionType, Enum)


def held_bytes(root: object, *shared: object) -> int:
    """Return the memory that hangs on `root` alone, in bytes; `shared` is left out."""
    seen = {id(thing) for thing in shared}
    waiting: list[Any] = [root]
    total = 0
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, _SHARED):
            continue
        seen.add(id(thing))
        total += sys.getsizeof(thing)
        waiting += gc.get_referents(thing)
    return total
