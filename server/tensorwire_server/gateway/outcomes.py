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

from collections import deque
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import msgspec

if TYPE_CHECKING:
    from tensorwire_protocol.messages import Packed, Request

    from tensorwire_server.config import OutcomesConfig

L = TypeVar("L")
Name = bytes  # of a request: see `name_of`

MAX_RESULT_BYTES: Final = 64 * 1024  # of a larger result only the fact is kept
_RECORD_BYTES: Final = 320  # measured: what a record takes beside its own bytes
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder().decode


def name_of(principal: str, key: bytes) -> Name:
    """Return what a principal's request is known by; keys are all equally long."""
    return key + principal.encode() if principal else key


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

    def packed(self, expires_at: float) -> bytes:
        """Return a record of it."""
        made = _encode(
            (expires_at, self.asked, self.prompt_tokens, self.tokens, self.text, self.terminal)
        )
        # The encoder's own bytes keep all of the buffer that it grew: up to half as much again.
        return bytes(memoryview(made))


class Outcomes(Generic[L]):
    """One name has at most one live request or one outcome, never both.

    An outcome is kept as one string of bytes. Nobody looks at most of them again, and what was not
    looked at for long is no longer in the processor's caches: each object that a record had cost as
    much at its end as a hundred instructions, and the garbage collector went through them all
    (measured: a hundred thousand records of objects made each request a third dearer).
    """

    def __init__(self, config: OutcomesConfig) -> None:
        self._seconds = config.seconds
        self._most_keys = config.keys
        self._most_bytes = config.bytes
        self._known: dict[Name, L | bytes] = {}  # bytes: the record of an outcome
        self._order: deque[Name] = deque()  # of the kept, the oldest first: all live equally long
        self._num_bytes = 0

    @property
    def num_live(self) -> int:
        """Live requests that can be found by name."""
        return len(self._known) - len(self._order)

    @property
    def num_kept(self) -> int:
        """Outcomes in memory."""
        return len(self._order)

    @property
    def num_bytes(self) -> int:
        """About what the outcomes take in memory."""
        return self._num_bytes

    def find(self, name: Name, now: float) -> L | Outcome | None:
        """Return what is known under a name."""
        known = self._known.get(name)
        if not isinstance(known, bytes):
            return known
        expires_at, *fields = _decode(known)
        if expires_at <= now:
            self.expire(now)
            return None
        return Outcome(*fields)

    def begin(self, name: Name, live: L) -> None:
        """Take in a request whose name is unknown."""
        self._known[name] = live

    def forget(self, name: Name, live: L) -> None:
        """Let a live request go; its name may be used again at once."""
        if self._known.get(name) is live:
            del self._known[name]

    def holds(self, name: Name, live: L) -> bool:
        """Say if this very request is the one that is found under the name."""
        return self._known.get(name) is live

    def keep(self, name: Name, live: L, outcome: Outcome, now: float) -> None:
        """Put a request's outcome in its place, as long as the bounds allow."""
        if self._known.get(name) is not live:  # it was forgotten before its end
            return
        record = outcome.packed(now + self._seconds)
        self._known[name] = record
        self._order.append(name)
        self._num_bytes += _RECORD_BYTES + len(record)
        while len(self._order) > self._most_keys or self._num_bytes > self._most_bytes:
            self._drop_oldest()

    def expire(self, now: float) -> None:
        """Drop the outcomes whose time is over."""
        while self._order and _expiry(self._known[self._order[0]]) <= now:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        record = self._known.pop(self._order.popleft())
        assert isinstance(record, bytes)
        self._num_bytes -= _RECORD_BYTES + len(record)

    def check_invariants(self) -> None:
        """The order is that of the kept, the bounds hold."""
        records = {name: known for name, known in self._known.items() if isinstance(known, bytes)}
        assert len(self._order) == len(records)
        assert {*self._order} == records.keys()
        assert self._num_bytes == sum(_RECORD_BYTES + len(record) for record in records.values())
        assert len(records) <= self._most_keys
        assert self._num_bytes <= self._most_bytes
        ages = [_expiry(records[name]) for name in self._order]
        assert ages == sorted(ages)


def _expiry(record: object) -> float:
    assert isinstance(record, bytes)
    expires_at: float = _decode(record)[0]
    return expires_at


# -- what was asked, in a few bytes ----------------------------------------------------------------

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
