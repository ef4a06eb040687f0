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
from dataclasses import fields
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec
import numpy as np
from tensorwire_protocol.errors import Executed
from tensorwire_protocol.messages import End, Failure, Finish, Result
from tensorwire_protocol.tensors import RawTensor, describe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensorwire_protocol.messages import Request

    from tensorwire_server.config import OutcomesConfig

L = TypeVar("L")
Name = tuple[str, bytes]  # principal and request key

MAX_RESULT_BYTES = 64 * 1024  # of a larger result only the fact is kept
_RECORD_BYTES = 512  # measured: what a record without tokens, text and terminal takes


class Outcome:
    """How a request ended, and everything a client may still ask of it.

    Args:
        asked: a hash of what was asked.
        terminal: its last frame; None: a result that is too large to be kept.
    """

    __slots__ = ("asked", "prompt_tokens", "terminal", "text", "tokens")

    def __init__(
        self,
        asked: bytes,
        prompt_tokens: int | None,
        tokens: Sequence[int],
        text: str,
        terminal: End | Result | Failure | None,
    ) -> None:
        self.asked = asked
        self.prompt_tokens = prompt_tokens
        self.tokens = tokens
        self.text = text
        self.terminal = terminal


# Expiry, size, hash, prompt tokens, token ids, text, terminal. A plain tuple of plain values: the
# garbage collector does not look into those, while a hundred thousand objects with arrays and dicts
# made each request a third dearer (measured), and took four times the memory.
_Record = tuple[float, int, bytes, int | None, bytes, str, bytes | None]


def _record(outcome: Outcome, expires_at: float) -> _Record:
    terminal: bytes | None = None
    if outcome.terminal is not None and not _is_surely_large(outcome.terminal):
        terminal = _pack(outcome.terminal)
        if len(terminal) > MAX_RESULT_BYTES:
            terminal = None
    tokens = array("i", outcome.tokens).tobytes() if outcome.tokens else b""
    text = outcome.text
    size = _RECORD_BYTES + len(tokens) + (sys.getsizeof(text) if text else 0)
    size += len(terminal) if terminal is not None else 0
    return expires_at, size, outcome.asked, outcome.prompt_tokens, tokens, text, terminal


def _is_surely_large(terminal: End | Result | Failure) -> bool:
    return type(terminal) is Result and any(
        type(value) is np.ndarray and value.nbytes > MAX_RESULT_BYTES
        for value in terminal.outputs.values()
    )


def _outcome(record: _Record) -> Outcome:
    _, _, asked, prompt_tokens, packed, text, terminal = record
    tokens = array("i")
    tokens.frombytes(packed)
    return Outcome(
        asked, prompt_tokens, tokens, text, _unpack(terminal) if terminal is not None else None
    )


def _pack(terminal: End | Result | Failure) -> bytes:
    kind = type(terminal).__name__
    values = [getattr(terminal, name) for name in _FIELDS[kind]]
    if type(terminal) is Result:
        # msgspec takes a RawTensor, which is a dataclass, for a map, and does not ask `_to_ext`.
        values[0] = {
            name: _ext(_RAW, value.dtype, value.bits) if type(value) is RawTensor else value
            for name, value in terminal.outputs.items()
        }
    return _encode_plain((kind, values))


def _unpack(packed: bytes) -> End | Result | Failure:
    kind, values = _decode_plain(packed)
    named = dict(zip(_FIELDS[kind], values, strict=True))
    if kind == "Result":
        return Result(stream=0, **named)
    if kind == "End":
        return End(stream=0, finish=Finish(named.pop("finish")), **named)
    return Failure(stream=0, executed=Executed(named.pop("executed")), **named)


_FIELDS = {
    cls.__name__: tuple(f.name for f in fields(cls) if f.name != "stream")
    for cls in (Result, End, Failure)
}


def _to_ext(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"no answer carries a {type(value).__name__}")
    if value.dtype.kind in "fiub":
        return _ext(_ARRAY, "", value)
    name, plain = describe(value)
    return _ext(_RAW, name, plain.view(f"u{plain.dtype.itemsize}"))


def _ext(code: int, name: str, array: np.ndarray[Any, Any]) -> msgspec.msgpack.Ext:
    packed = _encode_plain((name, array.dtype.str, array.shape, array.tobytes()))
    return msgspec.msgpack.Ext(code, packed)


def _from_ext(code: int, data: memoryview) -> Any:
    name, dtype, shape, raw = _decode_plain(bytes(data))
    values = np.frombuffer(raw, dtype=dtype).reshape(shape)
    return values if code == _ARRAY else RawTensor(name, values)


_ARRAY, _RAW = 1, 2
_encode_plain = msgspec.msgpack.Encoder(enc_hook=_to_ext).encode
_decode_plain = msgspec.msgpack.Decoder(ext_hook=_from_ext).decode


class Outcomes(Generic[L]):
    """One name has at most one live request or one outcome, never both."""

    def __init__(self, config: OutcomesConfig) -> None:
        self._config = config
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
        return _outcome(record)

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
        record = self._kept[name] = _record(outcome, now + config.seconds)
        self._order.append(name)
        self._num_bytes += record[1]
        while len(self._kept) > config.keys or self._num_bytes > config.bytes:
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
        assert len(self._kept) <= self._config.keys
        assert self._num_bytes <= self._config.bytes
        ages = [self._kept[name][0] for name in self._order]
        assert ages == sorted(ages)


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
