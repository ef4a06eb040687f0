"""Request keys: the live requests and the kept outcomes by who asked, and under which key. Pure.

        begin                     keep
    ──────────▶  live request  ──────────▶  outcome, for so many seconds, keys and bytes
                      │ forget                   │ bounds
                      ▼                          ▼
                   unknown  ◀──────────────── unknown

Forgotten are failures that a retry may cure (under the same key it must not meet the old one
again), and requests that were stopped because nobody came back for them.
"""

from __future__ import annotations

import sys
from collections import deque
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import msgspec

if TYPE_CHECKING:
    from tensorwire_protocol.messages import Packed, Request

    from tensorwire_server.config import OutcomesConfig

L = TypeVar("L")
Name = tuple[str, bytes]  # principal and request key

MAX_RESULT_BYTES: Final = 64 * 1024  # of a larger result only the fact is kept
_RECORD_BYTES: Final = 512  # measured: what a record without tokens, text and terminal takes


class Outcome:
    """How a request ended, and everything a client may still ask of it."""

    def __init__(
        self,
        asked: bytes,  # the fingerprint of what was asked
        prompt_tokens: int | None,
        tokens: bytes,  # as `pack_ids` has them
        text: str,
        terminal: bytes | None,  # the last frame; None: a result that is too large to be kept
    ) -> None:
        self.asked: Final = asked
        self.prompt_tokens: Final = prompt_tokens
        self.tokens: Final = tokens
        self.text: Final = text
        self.terminal: Final = terminal

    @property
    def num_bytes(self) -> int:
        """About what it takes in memory."""
        text = sys.getsizeof(self.text) if self.text else 0
        terminal = 0 if self.terminal is None else len(self.terminal)
        return _RECORD_BYTES + len(self.asked) + len(self.tokens) + text + terminal


# Expiry, size, and the fields of the outcome. A plain tuple of plain values: the garbage collector
# stops looking into those, while a hundred thousand objects made each request a third dearer
# (measured). Not typed field by field: compiled code would check each of them at every look.
_Record = tuple[Any, ...]


class Outcomes(Generic[L]):
    """One name has at most one live request or one outcome, never both."""

    def __init__(self, config: OutcomesConfig) -> None:
        self._seconds = config.seconds
        self._most_keys = config.keys
        self._most_bytes = config.bytes
        self._live: dict[Name, L] = {}
        self._kept: dict[Name, _Record] = {}
        self._order: deque[Name] = deque()  # of the kept, the oldest first: all live equally long
        self._num_bytes = 0

    @property
    def num_live(self) -> int:
        """Live requests that can be found by name."""
        return len(self._live)

    @property
    def num_kept(self) -> int:
        """Outcomes in memory."""
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        """About what the outcomes take in memory."""
        return self._num_bytes

    def find(self, name: Name, now: float) -> L | Outcome | None:
        """Return what is known under a name."""
        live = self._live.get(name)
        if live is not None:
            return live
        record = self._kept.get(name)
        if record is None:
            return None
        if record[0] <= now:
            self.expire(now)
            return None
        return Outcome(*record[2:])

    def begin(self, name: Name, live: L) -> None:
        """Take in a request whose name is unknown."""
        self._live[name] = live

    def forget(self, name: Name, live: L) -> None:
        """Let a live request go; its name may be used again at once."""
        if self._live.get(name) is live:
            del self._live[name]

    def holds(self, name: Name, live: L) -> bool:
        """Say if this very request is the one that is found under the name."""
        return self._live.get(name) is live

    def keep(self, name: Name, live: L, outcome: Outcome, now: float) -> None:
        """Put a request's outcome in its place, as long as the bounds allow."""
        if self._live.get(name) is not live:  # it was forgotten before its end
            return
        del self._live[name]
        size = outcome.num_bytes
        self._kept[name] = (
            now + self._seconds,
            size,
            outcome.asked,
            outcome.prompt_tokens,
            outcome.tokens,
            outcome.text,
            outcome.terminal,
        )
        self._order.append(name)
        self._num_bytes += size
        while len(self._kept) > self._most_keys or self._num_bytes > self._most_bytes:
            self._drop_oldest()

    def expire(self, now: float) -> None:
        """Drop the outcomes whose time is over."""
        while self._order and self._kept[self._order[0]][0] <= now:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        self._num_bytes -= self._kept.pop(self._order.popleft())[1]

    def check_invariants(self) -> None:
        """The order is that of the kept, the bounds hold, nothing is both live and kept."""
        assert list(self._kept) == list(self._order)
        assert not self._live.keys() & self._kept.keys()
        assert self._num_bytes == sum(record[1] for record in self._kept.values())
        assert len(self._kept) <= self._most_keys
        assert self._num_bytes <= self._most_bytes
        ages = [self._kept[name][0] for name in self._order]
        assert ages == sorted(ages)


# -- what was asked, in a few bytes ----------------------------------------------------------------

_encode: Final = msgspec.msgpack.Encoder().encode
# A whole megabyte would take a millisecond, as long as all the rest of its way. Of large arrays
# these many bytes are looked at, spread evenly: what is caught are programs that use a key twice.
_LOOKED_AT_BYTES: Final = 64 * 1024
_PIECES: Final = 64
_SHORT_BYTES: Final = 256  # are kept as they are: a hash would cost more


def fingerprint(request: Request) -> bytes:
    """Return what was asked, or a hash of it: not how urgently, nor on which stream."""
    inputs: Packed = request.inputs
    asked = _encode((request.op, request.model, inputs.meta, request.params))
    if len(asked) <= _SHORT_BYTES and not inputs.segments:
        return asked
    digest = blake2b(asked, digest_size=16)
    for segment in inputs.segments:
        digest.update(_spread(segment))
    return digest.digest()


def _spread(data: memoryview) -> bytes | memoryview:
    if len(data) <= _LOOKED_AT_BYTES:
        return data
    piece = _LOOKED_AT_BYTES // _PIECES
    last = len(data) - piece
    return b"".join(data[last * i // (_PIECES - 1) :][:piece] for i in range(_PIECES))
