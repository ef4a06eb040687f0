"""One tree of errors with stable numbers; text is for people, the number is the contract.

The high byte of a code is its class: 0x01 connection, 0x02 request, 0x03 access and capacity,
0x04 execution, 0x05 put (uploads).
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Any, ClassVar


class ErrorCode(IntEnum):
    """The stable numbers. A number is never given a second meaning."""

    CONNECTION_LOST = 0x0100
    BAD_PREFACE = 0x0101
    FRAME_TOO_LARGE = 0x0102
    UNKNOWN_KIND = 0x0103
    FRAMING = 0x0104
    FLOOD = 0x0105
    VERSION = 0x0106
    HANDSHAKE_TIMEOUT = 0x0107
    SLOW_CONSUMER = 0x0108
    SEQUENCE = 0x0109
    PEER_SILENT = 0x010A

    BAD_META = 0x0201
    BAD_TENSOR = 0x0202
    UNKNOWN_OP = 0x0203
    UNKNOWN_MODEL = 0x0204
    BAD_PARAMS = 0x0205
    TOO_LARGE = 0x0206
    UNSUPPORTED = 0x0207
    KEY_REUSED = 0x0208
    UNKNOWN_KEY = 0x0209

    BUSY = 0x0301
    DRAINING = 0x0302
    UNAUTHENTICATED = 0x0303
    FORBIDDEN = 0x0304
    QUOTA = 0x0305
    MODEL_LOADING = 0x0306

    WORKER_LOST = 0x0401
    OUT_OF_MEMORY = 0x0402
    MODEL_ERROR = 0x0403
    NUMERIC = 0x0404
    POISONED = 0x0405
    OUTPUT_TOO_LARGE = 0x0406
    INTERNAL = 0x0407
    DEADLINE = 0x0408
    CANCELLED = 0x0409

    HASH_MISMATCH = 0x0501
    MISSING_CHUNKS = 0x0502
    PATH_REFUSED = 0x0503
    STORAGE_FULL = 0x0504


class Executed(Enum):
    """Whether the work behind a failed request was done."""

    NO = "no"
    MAYBE = "maybe"
    YES = "yes"


class TensorwireError(Exception):
    """Base of everything that can go wrong with a connection or a request.

    Attributes:
        code: the stable number.
        retryable: the same call may succeed later, and repeating it is safe.
        executed: whether the work was done.
        retry_after_ms: how long to wait before a retry, where the sender knows.
        log_id: names the entry in the server's log, for errors whose details stay there.
        detail: facts by name, for programs.
    """

    code: ClassVar[ErrorCode] = ErrorCode.INTERNAL
    default_retryable: ClassVar[bool] = False
    default_executed: ClassVar[Executed] = Executed.NO

    def __init__(
        self,
        message: str,
        *,
        retryable: bool | None = None,
        executed: Executed | None = None,
        retry_after_ms: int | None = None,
        log_id: str | None = None,
        detail: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retryable = self.default_retryable if retryable is None else retryable
        self.executed = self.default_executed if executed is None else executed
        self.retry_after_ms = retry_after_ms
        self.log_id = log_id
        self.detail = detail or {}


class ConnectionFailed(TensorwireError):
    """Base of what ends a whole connection."""


class RequestRefused(TensorwireError):
    """Base of what is wrong with one request; the connection lives on."""


class Unavailable(TensorwireError):
    """Base of refusals by access or capacity; nothing was executed."""


class ExecutionFailed(TensorwireError):
    """Base of what goes wrong while a request runs."""

    default_executed = Executed.MAYBE


class ConnectionLost(ConnectionFailed):
    """The peer or the network ended the connection, or it could not be made."""

    code = ErrorCode.CONNECTION_LOST
    default_retryable = True
    default_executed = Executed.MAYBE


class BadPreface(ConnectionFailed):
    """The first bytes were not ours: something else speaks on this port."""

    code = ErrorCode.BAD_PREFACE


class FrameTooLarge(ConnectionFailed):
    """A header announced more than the limit; nothing was allocated."""

    code = ErrorCode.FRAME_TOO_LARGE


class UnknownKind(ConnectionFailed):
    """A frame of a kind below 0x80 that this side does not know, or not on this link."""

    code = ErrorCode.UNKNOWN_KIND


class BadFraming(ConnectionFailed):
    """A frame's own numbers contradict each other, or its meta cannot be read."""

    code = ErrorCode.FRAMING


class Flood(ConnectionFailed):
    """The peer sent more control or failing frames than its allowance."""

    code = ErrorCode.FLOOD
    default_retryable = True


class BadVersion(ConnectionFailed):
    """The peer speaks another major version."""

    code = ErrorCode.VERSION


class HandshakeTimeout(ConnectionFailed):
    """HELLO or WELCOME did not arrive in time."""

    code = ErrorCode.HANDSHAKE_TIMEOUT
    default_retryable = True


class SlowConsumer(ConnectionFailed):
    """The peer did not read what was sent to it."""

    code = ErrorCode.SLOW_CONSUMER
    default_retryable = True
    default_executed = Executed.MAYBE


class SequenceError(ConnectionFailed):
    """A message at the wrong time: reused stream, token index with a gap or a repeat, …"""

    code = ErrorCode.SEQUENCE
    default_executed = Executed.MAYBE


class PeerSilent(ConnectionFailed):
    """Nothing was heard for too long, not even a PONG."""

    code = ErrorCode.PEER_SILENT
    default_retryable = True
    default_executed = Executed.MAYBE


class BadMeta(RequestRefused):
    """The request's meta does not have the shape its operation demands."""

    code = ErrorCode.BAD_META


class BadTensor(RequestRefused):
    """A tensor's dtype, shape and bytes do not agree, or are not allowed."""

    code = ErrorCode.BAD_TENSOR


class UnknownOperation(RequestRefused):
    """No such operation, or this model does not offer it."""

    code = ErrorCode.UNKNOWN_OP


class UnknownModel(RequestRefused):
    """No such model on this server."""

    code = ErrorCode.UNKNOWN_MODEL


class BadParams(RequestRefused):
    """An option is unknown, of the wrong type, or out of its range."""

    code = ErrorCode.BAD_PARAMS


class TooLarge(RequestRefused):
    """The request is larger than the receiver accepts."""

    code = ErrorCode.TOO_LARGE


class Unsupported(RequestRefused):
    """A feature that was not negotiated or does not exist in this version."""

    code = ErrorCode.UNSUPPORTED


class KeyReused(RequestRefused):
    """A request key came again with another body."""

    code = ErrorCode.KEY_REUSED


class UnknownKey(RequestRefused):
    """No outcome is kept under this request key (any more)."""

    code = ErrorCode.UNKNOWN_KEY


class Busy(Unavailable):
    """A queue is at its bound; nothing was executed."""

    code = ErrorCode.BUSY
    default_retryable = True


class Draining(Unavailable):
    """The server is shutting down and takes nothing new."""

    code = ErrorCode.DRAINING
    default_retryable = True


class Unauthenticated(Unavailable):
    """The peer has not shown who it is."""

    code = ErrorCode.UNAUTHENTICATED


class Forbidden(Unavailable):
    """The peer is known and may not do this."""

    code = ErrorCode.FORBIDDEN


class QuotaExceeded(Unavailable):
    """The caller's share is used up."""

    code = ErrorCode.QUOTA
    default_retryable = True


class ModelLoading(Unavailable):
    """The model is not ready, and the caller chose not to wait."""

    code = ErrorCode.MODEL_LOADING
    default_retryable = True


class WorkerLost(ExecutionFailed):
    """The worker that ran the request died."""

    code = ErrorCode.WORKER_LOST
    default_retryable = True


class OutOfMemory(ExecutionFailed):
    """The model's device has no memory for this request."""

    code = ErrorCode.OUT_OF_MEMORY
    default_retryable = True


class ModelError(ExecutionFailed):
    """The model failed on this request, or could not be loaded."""

    code = ErrorCode.MODEL_ERROR


class NumericError(ExecutionFailed):
    """The model produced values that are not finite."""

    code = ErrorCode.NUMERIC


class Poisoned(ExecutionFailed):
    """This request has brought down workers and is barred."""

    code = ErrorCode.POISONED


class OutputTooLarge(ExecutionFailed):
    """The answer is larger than the receiver accepts."""

    code = ErrorCode.OUTPUT_TOO_LARGE


class InternalError(ExecutionFailed):
    """A fault of ours; the log has the details under `log_id`."""

    code = ErrorCode.INTERNAL


class DeadlineExceeded(ExecutionFailed):
    """The deadline passed before the end; what was made until then is in `partial`."""

    code = ErrorCode.DEADLINE
    partial: Any = None


class RequestCancelled(ExecutionFailed):
    """The request was cancelled; what was made until then is in `partial`."""

    code = ErrorCode.CANCELLED
    partial: Any = None


def _tree(base: type[TensorwireError]) -> list[type[TensorwireError]]:
    return [base] + [leaf for child in base.__subclasses__() for leaf in _tree(child)]


# InternalError comes after the root, whose code it shares, and so takes the number.
BY_CODE: dict[int, type[TensorwireError]] = {
    int(cls.code): cls for cls in _tree(TensorwireError) if "code" in vars(cls)
}

# A number of a later version keeps its class, and so its meaning for retries.
_BY_HIGH_BYTE: dict[int, type[TensorwireError]] = {
    1: ConnectionFailed,
    2: RequestRefused,
    3: Unavailable,
    4: ExecutionFailed,
}


def from_wire(
    code: int,
    message: str,
    *,
    retryable: bool,
    executed: Executed,
    retry_after_ms: int | None = None,
    log_id: str | None = None,
    detail: dict[str, Any] | None = None,
) -> TensorwireError:
    """Return the error that a peer sent, as the class its number names."""
    cls = BY_CODE.get(code) or _BY_HIGH_BYTE.get(code >> 8, TensorwireError)
    return cls(
        message,
        retryable=retryable,
        executed=executed,
        retry_after_ms=retry_after_ms,
        log_id=log_id,
        detail=detail,
    )
