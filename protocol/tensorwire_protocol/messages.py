"""The closed list of messages: one frozen class for each kind of frame.

`stream` is 0 for the connection itself. Token ids travel as lists of int, arrays as numpy.
Which side may send what is the table in `roles.py`. Fields stand in the order of the wire.

Plain classes, because the compiled form makes those native: there a request takes 25 ns to build
where a dataclass takes 170, and a field of it 1 ns to read instead of 25 (measured).
"""

from __future__ import annotations

from enum import Enum, IntEnum
from inspect import isgetsetdescriptor
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

from tensorwire_protocol.errors import Executed, TensorwireError, from_wire

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


EMPTY: Final[Mapping[str, Any]] = {}
# Where a frame has them (`frames.py`).
_KIND_AT, _STREAM_AT = 4, 8
_NOTHING = (b"\x80", b"\xc0")  # an empty map, nil


class Kind(IntEnum):
    """The second field of a frame header; 0x80 and above may be skipped when unknown."""

    HELLO = 0x01
    WELCOME = 0x02
    AUTH = 0x03
    PING = 0x04
    PONG = 0x05
    GOAWAY = 0x06
    CREDIT = 0x07
    REQ = 0x10
    DATA = 0x11
    CANCEL = 0x12
    RESUME = 0x13
    RES = 0x20
    EVT = 0x21
    EVB = 0x22
    ERR = 0x23
    ACK = 0x24
    END = 0x25
    SUBMIT = 0x60
    STEP = 0x61
    HEARTBEAT = 0x62
    DRAIN = 0x63
    LOAD = 0x64
    SHM = 0x65


class Finish(Enum):
    """Why an accepted stream ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"


class Packed:
    """Inputs or outputs on their way through a gateway: nobody has opened them yet.

    Args:
        meta: the msgpack map as it came, in memory of its own.
        segments: what its arrays refer to.
    """

    __slots__ = ("meta", "segments")

    def __init__(self, meta: Any, segments: list[memoryview]) -> None:
        self.meta = meta
        self.segments = segments

    @property
    def is_empty(self) -> bool:
        """Say if there is nothing in it."""
        return bytes(self.meta) in _NOTHING


class Hello:
    """First frame of the side that connects."""

    KIND: ClassVar[Kind] = Kind.HELLO

    def __init__(
        self,
        version: int = 1,
        features: tuple[str, ...] = (),
        limits: Mapping[str, Any] = EMPTY,
        software: str = "",
        auth: Any = None,
    ) -> None:
        self.version: Final = version
        self.features: Final = features
        self.limits: Final = limits
        self.software: Final = software
        self.auth: Final = auth


class Welcome:
    """First frame of the side that was connected to."""

    KIND: ClassVar[Kind] = Kind.WELCOME

    def __init__(
        self,
        version: int = 1,
        features: tuple[str, ...] = (),
        limits: Mapping[str, Any] = EMPTY,
        software: str = "",
        session: bytes = b"",
        auth: Any = None,
    ) -> None:
        self.version: Final = version
        self.features: Final = features
        self.limits: Final = limits
        self.software: Final = software
        self.session: Final = session
        self.auth: Final = auth


class Auth:
    """A further step of the login; its machinery comes with the auth methods."""

    KIND: ClassVar[Kind] = Kind.AUTH

    def __init__(self, payload: Mapping[str, Any] = EMPTY) -> None:
        self.payload: Final = payload


class Ping:
    """Asks for a PONG with the same 8 bytes."""

    KIND: ClassVar[Kind] = Kind.PING

    def __init__(self, payload: bytes = bytes(8)) -> None:
        self.payload: Final = payload


class Pong:
    """Answers a PING."""

    KIND: ClassVar[Kind] = Kind.PONG

    def __init__(self, payload: bytes = bytes(8)) -> None:
        self.payload: Final = payload


class Goaway:
    """The sender takes no new stream; what is above `last_stream` was surely not executed."""

    KIND: ClassVar[Kind] = Kind.GOAWAY

    def __init__(
        self,
        code: int = 0,
        last_stream: int = 0,
        grace_ms: int = 0,
        alternatives: tuple[str, ...] = (),
    ) -> None:
        self.code: Final = code
        self.last_stream: Final = last_stream
        self.grace_ms: Final = grace_ms
        self.alternatives: Final = alternatives


class Credit:
    """Allows `amount` more events (client to server) or upload bytes (server to client)."""

    KIND: ClassVar[Kind] = Kind.CREDIT

    def __init__(self, stream: int, amount: int) -> None:
        self.stream: Final = stream
        self.amount: Final = amount


class Request:
    """Asks for one operation."""

    KIND: ClassVar[Kind] = Kind.REQ

    def __init__(
        self,
        stream: int,
        op: str,
        key: bytes,  # 16 bytes, made by the client
        model: str | None = None,
        inputs: Any = EMPTY,  # named values; `Packed` on a gateway
        params: Mapping[str, Any] = EMPTY,
        deadline_ms: int | None = None,  # remaining at the moment of sending
        credit: int | None = None,  # events; None: unlimited
        priority: int = 0,
        trace: str | None = None,
    ) -> None:
        self.stream: Final = stream
        self.op: Final = op
        self.key: Final = key
        self.model: Final = model
        self.inputs: Final = inputs
        self.params: Final = params
        self.deadline_ms: Final = deadline_ms
        self.credit: Final = credit
        self.priority: Final = priority
        self.trace: Final = trace


class Data:
    """One part of a large body; to `Connection` it is bytes alone, and never comes out of it."""

    KIND: ClassVar[Kind] = Kind.DATA

    def __init__(
        self,
        stream: int,
        segment: int,
        payload: bytes | memoryview,
        last: bool = False,
    ) -> None:
        self.stream: Final = stream
        self.segment: Final = segment
        self.payload: Final = payload
        self.last: Final = last


class Cancel:
    """Stop this stream at once; answered by its terminal frame only."""

    KIND: ClassVar[Kind] = Kind.CANCEL

    def __init__(
        self,
        stream: int,
        reason: str = "cancelled",  # or "deadline"
    ) -> None:
        self.stream: Final = stream
        self.reason: Final = reason


class Resume:
    """Go on with the request under `key` behind what has arrived; opens a stream as REQ does.

    Text has a position of its own: the text of a token may come later than the token, without any.
    """

    KIND: ClassVar[Kind] = Kind.RESUME

    def __init__(
        self,
        stream: int,
        key: bytes,
        next_index: int,  # tokens that have arrived
        next_char: int = 0,  # characters (Unicode code points) of text that have arrived
        credit: int | None = None,  # as in `Request`
    ) -> None:
        self.stream: Final = stream
        self.key: Final = key
        self.next_index: Final = next_index
        self.next_char: Final = next_char
        self.credit: Final = credit


class Result:
    """The one answer of a unary operation; ends the stream."""

    KIND: ClassVar[Kind] = Kind.RES

    def __init__(
        self,
        stream: int,
        outputs: Mapping[str, Any] = EMPTY,
        usage: Mapping[str, float] = EMPTY,
        timings: Mapping[str, float] = EMPTY,
        extra: Mapping[str, Any] = EMPTY,
    ) -> None:
        self.stream: Final = stream
        self.outputs: Final = outputs
        self.usage: Final = usage
        self.timings: Final = timings
        self.extra: Final = extra


class PackedResult:
    """A RES on its way through a gateway; its maps are as they came."""

    KIND: ClassVar[Kind] = Kind.RES

    def __init__(
        self,
        stream: int,
        outputs: Packed,
        usage: Any,
        timings: Any,
        extra: Any,
    ) -> None:
        self.stream: Final = stream
        self.outputs: Final = outputs
        self.usage: Final = usage
        self.timings: Final = timings
        self.extra: Final = extra


class EncodedTerminal:
    """A last frame that was encoded before it is sent, because it is also kept."""

    def __init__(self, kind: Kind, stream: int, buffers: list[bytes | memoryview]) -> None:
        self.KIND: Final = kind
        self.stream: Final = stream
        self.buffers: Final = buffers

    @property
    def num_bytes(self) -> int:
        """How long the frame is."""
        buffers = self.buffers
        return len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))

    def joined(self) -> bytes:
        """Return the frame in one piece."""
        buffers = self.buffers
        first = buffers[0]
        return first if len(buffers) == 1 and isinstance(first, bytes) else b"".join(buffers)

    @classmethod
    def of(cls, frame: bytes, stream: int) -> EncodedTerminal:
        """Return a kept frame as the end of another stream."""
        again = bytearray(frame)
        again[_STREAM_AT : _STREAM_AT + 4] = stream.to_bytes(4, "little")
        return cls(Kind(frame[_KIND_AT]), stream, [bytes(again)])


class Event:
    """Tokens of one stream, the first of them at `index`."""

    KIND: ClassVar[Kind] = Kind.EVT

    def __init__(
        self,
        stream: int,
        index: int,
        tokens: Sequence[int],
        text: str,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.stream: Final = stream
        self.index: Final = index
        self.tokens: Final = tokens
        self.text: Final = text
        self.extra: Final = extra


class EventBatch:
    """The events of many streams as columns: what one engine step made for one peer."""

    KIND: ClassVar[Kind] = Kind.EVB

    def __init__(
        self,
        streams: Sequence[int],
        first_indexes: Sequence[int],
        counts: Sequence[int] | None,  # None: one token each
        tokens: Sequence[int],  # flat, in the order of `streams`
        texts: Sequence[str],  # one for each stream
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.streams: Final = streams
        self.first_indexes: Final = first_indexes
        self.counts: Final = counts
        self.tokens: Final = tokens
        self.texts: Final = texts
        self.extra: Final = extra


class Failure:
    """Ends a stream that was refused or failed, or (stream 0) the connection."""

    KIND: ClassVar[Kind] = Kind.ERR

    def __init__(
        self,
        stream: int,
        code: int,
        message: str,
        retryable: bool = False,
        executed: Executed = Executed.NO,
        retry_after_ms: int | None = None,
        log_id: str | None = None,
        detail: Mapping[str, Any] = EMPTY,
    ) -> None:
        self.stream: Final = stream
        self.code: Final = code
        self.message: Final = message
        self.retryable: Final = retryable
        self.executed: Final = executed
        self.retry_after_ms: Final = retry_after_ms
        self.log_id: Final = log_id
        self.detail: Final = detail

    @classmethod
    def of(cls, stream: int, error: TensorwireError) -> Failure:
        """Return the frame that tells the peer of `error`."""
        return cls(
            stream=stream,
            code=int(error.code),
            message=error.message,
            retryable=error.retryable,
            executed=error.executed,
            retry_after_ms=error.retry_after_ms,
            log_id=error.log_id,
            detail=error.detail,
        )

    def to_error(self) -> TensorwireError:
        """Return the exception that this frame stands for."""
        return from_wire(
            self.code,
            self.message,
            retryable=self.retryable,
            executed=self.executed,
            retry_after_ms=self.retry_after_ms,
            log_id=self.log_id,
            detail=dict(self.detail),
        )


class Ack:
    """The request is accepted; on a client link with the number of its prompt's tokens."""

    KIND: ClassVar[Kind] = Kind.ACK

    def __init__(
        self,
        stream: int,
        prompt_tokens: int | None = None,
        prompt_ids: Sequence[int] | None = None,  # worker link only: for the journal
    ) -> None:
        self.stream: Final = stream
        self.prompt_tokens: Final = prompt_tokens
        self.prompt_ids: Final = prompt_ids


class End:
    """Ends an accepted stream."""

    KIND: ClassVar[Kind] = Kind.END

    def __init__(
        self,
        stream: int,
        finish: Finish,
        count: int,  # tokens in all
        checksum: int,  # CRC-32 of the token ids as little-endian int32
        usage: Mapping[str, float] = EMPTY,
        timings: Mapping[str, float] = EMPTY,
        extra: Mapping[str, Any] = EMPTY,
    ) -> None:
        self.stream: Final = stream
        self.finish: Final = finish
        self.count: Final = count
        self.checksum: Final = checksum
        self.usage: Final = usage
        self.timings: Final = timings
        self.extra: Final = extra


class Submit:
    """Gateway to worker: execute a request, for the `attempt`-th time."""

    KIND: ClassVar[Kind] = Kind.SUBMIT

    def __init__(
        self,
        stream: int,
        op: str,
        key: bytes,
        attempt: int,
        model: str | None = None,
        inputs: Any = EMPTY,  # named values; `Packed` on a gateway
        params: Mapping[str, Any] = EMPTY,
        deadline_ms: int | None = None,
        priority: int = 0,
        so_far: Sequence[int] = (),  # tokens that earlier attempts emitted
        tenant: str = "",  # whose request it is; no cache is shared between two
    ) -> None:
        self.stream: Final = stream
        self.op: Final = op
        self.key: Final = key
        self.attempt: Final = attempt
        self.model: Final = model
        self.inputs: Final = inputs
        self.params: Final = params
        self.deadline_ms: Final = deadline_ms
        self.priority: Final = priority
        self.so_far: Final = so_far
        self.tenant: Final = tenant


class Step:
    """Worker to gateway: what one engine step made, as columns."""

    KIND: ClassVar[Kind] = Kind.STEP

    def __init__(
        self,
        streams: Sequence[int],
        attempts: Sequence[int],
        first_indexes: Sequence[int],
        counts: Sequence[int] | None,
        tokens: Sequence[int],
        texts: Sequence[str],
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.streams: Final = streams
        self.attempts: Final = attempts
        self.first_indexes: Final = first_indexes
        self.counts: Final = counts
        self.tokens: Final = tokens
        self.texts: Final = texts
        self.extra: Final = extra


class Heartbeat:
    """Worker to gateway: progress and load; also says when the model is ready."""

    KIND: ClassVar[Kind] = Kind.HEARTBEAT

    def __init__(
        self,
        state: str,  # "loading", "ready", "failed"
        steps: int = 0,
        load: Mapping[str, Any] = EMPTY,
        card: Mapping[str, Any] | None = None,  # with "ready": what the model is
        detail: str | None = None,  # progress while loading, the reason when failed
    ) -> None:
        self.state: Final = state
        self.steps: Final = steps
        self.load: Final = load
        self.card: Final = card
        self.detail: Final = detail


class Drain:
    """Gateway to worker: take nothing new, finish what runs."""

    KIND: ClassVar[Kind] = Kind.DRAIN

    def __init__(self, grace_ms: int = 0) -> None:
        self.grace_ms: Final = grace_ms


class Load:
    """Gateway to worker: load another model; reserved for the model life cycle."""

    KIND: ClassVar[Kind] = Kind.LOAD

    def __init__(self, payload: Mapping[str, Any] = EMPTY) -> None:
        self.payload: Final = payload


class Shm:
    """Shared memory between gateway and worker.

    On a stream: where the segments of its next message lie. On stream 0: loans that are returned.
    """

    KIND: ClassVar[Kind] = Kind.SHM

    def __init__(self, stream: int = 0, payload: Mapping[str, Any] = EMPTY) -> None:
        self.stream: Final = stream
        self.payload: Final = payload


# One class for each kind of frame.
WireMessage = (
    Hello | Welcome | Auth | Ping | Pong | Goaway | Credit
    | Request | Data | Cancel | Resume
    | Result | Event | EventBatch | Failure | Ack | End
    | Submit | Step | Heartbeat | Drain | Load | Shm
)  # fmt: skip
Message = WireMessage | PackedResult | EncodedTerminal

TERMINAL = (Result, Failure, End, PackedResult, EncodedTerminal)


# -- messages as data ------------------------------------------------------------------------------

_M = TypeVar("_M", bound=WireMessage)


def field_names(message: Message) -> tuple[str, ...]:
    """Return the names of its fields, in the order of the wire."""
    if hasattr(message, "__dict__"):
        return tuple(vars(message))
    # Of the compiled form, whose fields are descriptors of the class.
    return tuple(name for name, value in vars(type(message)).items() if isgetsetdescriptor(value))


def changed(message: _M, **changes: Any) -> _M:
    """Return the same message with other values in some fields."""
    values = {name: getattr(message, name) for name in field_names(message)}
    return type(message)(**(values | changes))
