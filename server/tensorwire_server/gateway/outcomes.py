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
from array import array
from collections import deque
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec
import numpy as np
from tensorwire_protocol.messages import Result
from tensorwire_protocol.tensors import RawTensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensorwire_protocol.messages import End, Failure, Request

    from tensorwire_server.config import OutcomesConfig

L = TypeVar("L")
Name = tuple[str, bytes]  # principal and request key

MAX_RESULT_BYTES = 64 * 1024  # of arrays; of a larger result only the fact is kept
_RECORD_BYTES = 1536  # measured: what an outcome without tokens, text and arrays takes


class Outcome:
    """How a request ended, and everything a client may still ask of it.

    Args:
        asked: a hash of what was asked.
        terminal: its last frame; a result that is too large is not kept.
    """

    __slots__ = ("asked", "expires_at", "prompt_tokens", "size_bytes", "terminal", "text", "tokens")

    def __init__(
        self,
        asked: bytes,
        prompt_tokens: int | None,
        tokens: Sequence[int],
        text: str,
        terminal: End | Result | Failure,
    ) -> None:
        self.asked = asked
        self.prompt_tokens = prompt_tokens
        self.tokens = array("i", tokens) if tokens else ()
        self.text = text
        self.terminal: End | Result | Failure | None = terminal
        self.expires_at = 0.0
        size = _RECORD_BYTES
        if tokens or text:
            size += 4 * len(tokens) + sys.getsizeof(text)
        if type(terminal) is Result:
            num_bytes = 0
            for value in terminal.outputs.values():
                num_bytes += value.nbytes if type(value) is np.ndarray else _size(value)
            if num_bytes > MAX_RESULT_BYTES:
                self.terminal = None
            else:
                size += num_bytes
        self.size_bytes = size  # about what it takes in memory


class Outcomes(Generic[L]):
    """One name has at most one live request or one outcome, never both."""

    def __init__(self, config: OutcomesConfig) -> None:
        self._config = config
        self._live: dict[Name, L] = {}
        self._kept: dict[Name, Outcome] = {}
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
        outcome = self._kept.get(name)
        if outcome is not None and outcome.expires_at <= now:
            self.expire(now)
            return None
        return outcome

    def begin(self, name: Name, live: L) -> None:
        """Take in a request whose name is unknown."""
        assert name not in self._live, "a name is given to one request at a time"
        assert name not in self._kept
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
        config = self._config
        outcome.expires_at = now + config.seconds
        self._kept[name] = outcome
        self._order.append(name)
        self._num_bytes += outcome.size_bytes
        while len(self._kept) > config.keys or self._num_bytes > config.bytes:
            self._drop_oldest()

    def expire(self, now: float) -> None:
        """Drop the outcomes whose time is over."""
        while self._order and self._kept[self._order[0]].expires_at <= now:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        self._num_bytes -= self._kept.pop(self._order.popleft()).size_bytes

    def check_invariants(self) -> None:
        """The order is that of the kept, the bounds hold, nothing is both live and kept."""
        assert list(self._kept) == list(self._order)
        assert not self._live.keys() & self._kept.keys()
        assert self._num_bytes == sum(outcome.size_bytes for outcome in self._kept.values())
        assert len(self._kept) <= self._config.keys
        assert self._num_bytes <= self._config.bytes
        ages = [self._kept[name].expires_at for name in self._order]
        assert ages == sorted(ages)


def _size(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, RawTensor):
        return value.bits.nbytes
    if isinstance(value, list):
        return sum(map(_size, value)) + 8 * len(value)
    return sys.getsizeof(value)


# -- what was asked, in a few bytes ----------------------------------------------------------------

# A whole megabyte would take a millisecond, as long as all the rest of its way. Of large arrays
# these many bytes are looked at, spread evenly: what is caught are programs that use a key twice.
_LOOKED_AT_BYTES = 64 * 1024
_PIECES = 64


def fingerprint(request: Request) -> bytes:
    """Return a hash of what was asked: not of how urgently, nor on which stream."""
    asked = (request.op, request.model, request.inputs, request.params)
    return blake2b(_encode(asked), digest_size=16).digest()


def _plain(value: Any) -> Any:
    if isinstance(value, RawTensor):
        return value.dtype, value.bits.shape, _spread(_bytes_of(value.bits))
    if isinstance(value, np.ndarray):
        dtype = value.dtype  # its number, too: what numpy does not know itself is all "V2"
        if value.nbytes <= _LOOKED_AT_BYTES:
            return dtype.str, dtype.num, value.shape, value.tobytes()
        return dtype.str, dtype.num, value.shape, _spread(_bytes_of(value))
    raise TypeError(f"no request carries a {type(value).__name__}")


def _bytes_of(array: np.ndarray[Any, Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _spread(data: memoryview) -> bytes | memoryview:
    if len(data) <= _LOOKED_AT_BYTES:
        return data
    piece = _LOOKED_AT_BYTES // _PIECES
    last = len(data) - piece
    return b"".join(data[last * i // (_PIECES - 1) :][:piece] for i in range(_PIECES))


_encode = msgspec.msgpack.Encoder(enc_hook=_plain).encode
