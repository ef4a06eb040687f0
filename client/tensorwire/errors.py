"""Every error a call can raise: the protocol's tree, and the one error that is the client's own."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, ClassVar

from tensorwire_protocol.errors import (
    BadFraming,
    BadMeta,
    BadParams,
    BadPreface,
    BadTensor,
    BadVersion,
    Busy,
    ConnectionFailed,
    ConnectionLost,
    DeadlineExceeded,
    Draining,
    ErrorCode,
    Executed,
    ExecutionFailed,
    Flood,
    Forbidden,
    FrameTooLarge,
    HandshakeTimeout,
    InternalError,
    KeyReused,
    ModelError,
    ModelLoading,
    NumericError,
    OutOfMemory,
    OutputTooLarge,
    PeerSilent,
    Poisoned,
    QuotaExceeded,
    RequestCancelled,
    RequestRefused,
    SequenceError,
    SlowConsumer,
    TensorwireError,
    TooLarge,
    Unauthenticated,
    Unavailable,
    UnknownKey,
    UnknownKind,
    UnknownModel,
    UnknownOperation,
    Unsupported,
    WorkerLost,
)

if TYPE_CHECKING:
    from tensorwire.results import Generation

__all__ = [
    "BadFraming",
    "BadMeta",
    "BadParams",
    "BadPreface",
    "BadTensor",
    "BadVersion",
    "Busy",
    "ClientUnusable",
    "ConnectionFailed",
    "ConnectionLost",
    "DeadlineExceeded",
    "Draining",
    "ErrorCode",
    "Executed",
    "ExecutionFailed",
    "Flood",
    "Forbidden",
    "FrameTooLarge",
    "HandshakeTimeout",
    "InternalError",
    "KeyReused",
    "ModelError",
    "ModelLoading",
    "NumericError",
    "OutOfMemory",
    "OutputTooLarge",
    "PeerSilent",
    "Poisoned",
    "QuotaExceeded",
    "RequestCancelled",
    "RequestRefused",
    "SequenceError",
    "SlowConsumer",
    "TensorwireError",
    "TooLarge",
    "Unauthenticated",
    "Unavailable",
    "UnknownKey",
    "UnknownKind",
    "UnknownModel",
    "UnknownOperation",
    "Unsupported",
    "WorkerLost",
    "for_call",
]


class ClientUnusable(RequestRefused, RuntimeError):
    """The client or stream cannot be used here: closed, after a fork, on another event loop."""

    code: ClassVar[ErrorCode] = ErrorCode.UNSUPPORTED


def for_call(error: TensorwireError, partial: Generation | None = None) -> TensorwireError:
    """Return `error` as an exception of one call's own, with what that call got until then.

    One lost connection fails many calls, on many threads: each gets a copy, because a raise
    writes into the exception.
    """
    mine = copy.copy(error)
    mine.__cause__ = error.__cause__
    mine.__traceback__ = None
    mine.detail = dict(error.detail)
    if partial is not None:
        mine.detail["partial"] = partial
        if isinstance(mine, DeadlineExceeded | RequestCancelled):
            mine.partial = partial
    return mine
