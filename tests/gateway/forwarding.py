"""What passes through a gateway unopened, made and opened for tests."""

from __future__ import annotations

from typing import Any

from protocol.samples import cut, wire
from tensorwire_protocol.codec import decode, encode
from tensorwire_protocol.codec.typed import PACKING
from tensorwire_protocol.limits import WORKER_LINK
from tensorwire_protocol.messages import (
    EncodedTerminal,
    End,
    Failure,
    PackedResult,
    Request,
    Result,
)


def packed_request(**fields: Any) -> Request:
    """Return a request as a gateway has it."""
    base: dict[str, Any] = {"stream": 1, "op": "infer", "key": bytes(16)}
    (frame,) = cut(wire(Request(**base | fields)))
    message = PACKING.decode(frame, WORKER_LINK)
    assert isinstance(message, Request)
    return message


def packed_result(**fields: Any) -> PackedResult:
    """Return a worker's result as a gateway has it."""
    (frame,) = cut(wire(Result(**fields)))
    message = PACKING.decode(frame, WORKER_LINK)
    assert isinstance(message, PackedResult)
    return message


def encoded(terminal: End | Result | Failure) -> EncodedTerminal:
    """Return a last frame as it is kept and sent."""
    return EncodedTerminal(
        kind=terminal.KIND, stream=terminal.stream, buffers=encode(terminal, WORKER_LINK)
    )


def read_terminal(message: EncodedTerminal | Failure) -> End | Result | Failure:
    """Return what a last frame says."""
    if isinstance(message, Failure):
        return message
    (frame,) = cut(b"".join(message.buffers))
    terminal = decode(frame, WORKER_LINK)
    assert isinstance(terminal, End | Result | Failure)
    return terminal
