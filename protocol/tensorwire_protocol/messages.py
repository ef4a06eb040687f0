"""The closed list of messages: one frozen class for each kind of frame.

`stream` is 0 for the connection itself. Token ids travel as lists of int, arrays as numpy.
Which side may send what is the table in `roles.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, dataclass_transform

from tensorwire_protocol.errors import Executed, TensorwireError, from_wire

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


_T = TypeVar("_T")
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


@dataclass_transform(frozen_default=True, eq_default=False)
def message(cls: type[_T]) -> type[_T]:
    """Make a message class: frozen for the type checker, which is where messages are written.

    At run time it is an ordinary slotted dataclass: frozen ones set each field through
    `object.__setattr__`, measured at four times the price on the path of every request. There the
    fields are given in their order, which is the wire's: by name they cost three times as much.
    """
    return dataclass(slots=True, eq=False)(cls)


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


@message
class Hello:
    """First frame of the side that connects."""

    KIND: ClassVar[Kind] = Kind.HELLO
    version: int = 1
    features: tuple[str, ...] = ()
    limits: Mapping[str, Any] = field(default_factory=dict)
    software: str = ""
    auth: Any = None


@message
class Welcome:
    """First frame of the side that was connected to."""

    KIND: ClassVar[Kind] = Kind.WELCOME
    version: int = 1
    features: tuple[str, ...] = ()
    limits: Mapping[str, Any] = field(default_factory=dict)
    software: str = ""
    session: bytes = b""
    auth: Any = None


@message
class Auth:
    """A further step of the login; its machinery comes with the auth methods."""

    KIND: ClassVar[Kind] = Kind.AUTH
    payload: Mapping[str, Any] = field(default_factory=dict)


@message
class Ping:
    """Asks for a PONG with the same 8 bytes."""

    KIND: ClassVar[Kind] = Kind.PING
    payload: bytes = bytes(8)


@message
class Pong:
    """Answers a PING."""

    KIND: ClassVar[Kind] = Kind.PONG
    payload: bytes = bytes(8)


@message
class Goaway:
    """The sender takes no new stream; what is above `last_stream` was surely not executed."""

    KIND: ClassVar[Kind] = Kind.GOAWAY
    code: int = 0
    last_stream: int = 0
    grace_ms: int = 0
    alternatives: tuple[str, ...] = ()


@message
class Credit:
    """Allows `amount` more events (client to server) or upload bytes (server to client)."""

    KIND: ClassVar[Kind] = Kind.CREDIT
    stream: int
    amount: int


@message
class Request:
    """Asks for one operation."""

    KIND: ClassVar[Kind] = Kind.REQ
    stream: int
    op: str
    key: bytes  # 16 bytes, made by the client
    model: str | None = None
    inputs: Any = field(default_factory=dict)  # named values; `Packed` on a gateway
    params: Mapping[str, Any] = field(default_factory=dict)
    deadline_ms: int | None = None  # remaining at the moment of sending
    credit: int | None = None  # events; None: unlimited
    priority: int = 0
    trace: str | None = None


@message
class Data:
    """One part of a large body; to `Connection` it is bytes alone, and never comes out of it."""

    KIND: ClassVar[Kind] = Kind.DATA
    stream: int
    segment: int
    payload: bytes | memoryview
    last: bool = False


@message
class Cancel:
    """Stop this stream at once; answered by its terminal frame only."""

    KIND: ClassVar[Kind] = Kind.CANCEL
    stream: int
    reason: str = "cancelled"  # or "deadline"


@message
class Resume:
    """Go on with the request under `key` behind what has arrived; opens a stream as REQ does.

    Text has a position of its own: the text of a token may come later than the token, without any.
    """

    KIND: ClassVar[Kind] = Kind.RESUME
    stream: int
    key: bytes
    next_index: int  # tokens that have arrived
    next_char: int = 0  # characters (Unicode code points) of text that have arrived
    credit: int | None = None  # as in `Request`


@message
class Result:
    """The one answer of a unary operation; ends the stream."""

    KIND: ClassVar[Kind] = Kind.RES
    stream: int
    outputs: Mapping[str, Any] = field(default_factory=dict)
    usage: Mapping[str, float] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


@message
class PackedResult:
    """A RES on its way through a gateway; its maps are as they came."""

    KIND: ClassVar[Kind] = Kind.RES
    stream: int
    outputs: Packed
    usage: Any
    timings: Any
    extra: Any


@message
class EncodedTerminal:
    """A last frame that was encoded before it is sent, because it is also kept."""

    KIND: Kind
    stream: int
    buffers: list[bytes | memoryview]

    @classmethod
    def of(cls, frame: bytes, stream: int) -> EncodedTerminal:
        """Return a kept frame as the end of another stream."""
        again = bytearray(frame)
        again[_STREAM_AT : _STREAM_AT + 4] = stream.to_bytes(4, "little")
        return cls(KIND=Kind(frame[_KIND_AT]), stream=stream, buffers=[bytes(again)])


@message
class Event:
    """Tokens of one stream, the first of them at `index`."""

    KIND: ClassVar[Kind] = Kind.EVT
    stream: int
    index: int
    tokens: Sequence[int]
    text: str
    extra: Mapping[str, Any] | None = None


@message
class EventBatch:
    """The events of many streams as columns: what one engine step made for one peer."""

    KIND: ClassVar[Kind] = Kind.EVB
    streams: Sequence[int]
    first_indexes: Sequence[int]
    counts: Sequence[int] | None  # None: one token each
    tokens: Sequence[int]  # flat, in the order of `streams`
    texts: Sequence[str]  # one for each stream
    extra: Mapping[str, Any] | None = None


@message
class Failure:
    """Ends a stream that was refused or failed, or (stream 0) the connection."""

    KIND: ClassVar[Kind] = Kind.ERR
    stream: int
    code: int
    message: str
    retryable: bool = False
    executed: Executed = Executed.NO
    retry_after_ms: int | None = None
    log_id: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)

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


@message
class Ack:
    """The request is accepted; on a client link with the number of its prompt's tokens."""

    KIND: ClassVar[Kind] = Kind.ACK
    stream: int
    prompt_tokens: int | None = None
    prompt_ids: Sequence[int] | None = None  # worker link only: for the journal


@message
class End:
    """Ends an accepted stream."""

    KIND: ClassVar[Kind] = Kind.END
    stream: int
    finish: Finish
    count: int  # tokens in all
    checksum: int  # CRC-32 of the token ids as little-endian int32
    usage: Mapping[str, float] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


@message
class Submit:
    """Gateway to worker: execute a request, for the `attempt`-th time."""

    KIND: ClassVar[Kind] = Kind.SUBMIT
    stream: int
    op: str
    key: bytes
    attempt: int
    model: str | None = None
    inputs: Any = field(default_factory=dict)  # named values; `Packed` on a gateway
    params: Mapping[str, Any] = field(default_factory=dict)
    deadline_ms: int | None = None
    priority: int = 0
    so_far: Sequence[int] = ()  # tokens that earlier attempts emitted
    tenant: str = ""  # whose request it is; no cache is shared between two


@message
class Step:
    """Worker to gateway: what one engine step made, as columns."""

    KIND: ClassVar[Kind] = Kind.STEP
    streams: Sequence[int]
    attempts: Sequence[int]
    first_indexes: Sequence[int]
    counts: Sequence[int] | None
    tokens: Sequence[int]
    texts: Sequence[str]
    extra: Mapping[str, Any] | None = None


@message
class Heartbeat:
    """Worker to gateway: progress and load; also says when the model is ready."""

    KIND: ClassVar[Kind] = Kind.HEARTBEAT
    state: str  # "loading", "ready", "failed"
    steps: int = 0
    load: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] | None = None  # with "ready": what the model is
    detail: str | None = None  # progress while loading, the reason when failed


@message
class Drain:
    """Gateway to worker: take nothing new, finish what runs."""

    KIND: ClassVar[Kind] = Kind.DRAIN
    grace_ms: int = 0


@message
class Load:
    """Gateway to worker: load another model; reserved for the model life cycle."""

    KIND: ClassVar[Kind] = Kind.LOAD
    payload: Mapping[str, Any] = field(default_factory=dict)


@message
class Shm:
    """Shared memory between gateway and worker.

    On a stream: where the segments of its next message lie. On stream 0: loans that are returned.
    """

    KIND: ClassVar[Kind] = Kind.SHM
    stream: int = 0
    payload: Mapping[str, Any] = field(default_factory=dict)


# One class for each kind of frame.
WireMessage = (
    Hello | Welcome | Auth | Ping | Pong | Goaway | Credit
    | Request | Data | Cancel | Resume
    | Result | Event | EventBatch | Failure | Ack | End
    | Submit | Step | Heartbeat | Drain | Load | Shm
)  # fmt: skip
Message = WireMessage | PackedResult | EncodedTerminal

TERMINAL = (Result, Failure, End, PackedResult, EncodedTerminal)
