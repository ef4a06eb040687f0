"""Messages to frames, in plain msgpack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgpack

from tensorwire_protocol.errors import BadMeta, BadTensor
from tensorwire_protocol.frames import Flag, build_frame, build_segmented_frame, pack_header
from tensorwire_protocol.messages import (
    Ack,
    Auth,
    Cancel,
    Credit,
    Data,
    Drain,
    End,
    Event,
    EventBatch,
    Failure,
    Goaway,
    Heartbeat,
    Hello,
    Kind,
    Load,
    Message,
    Ping,
    Pong,
    Request,
    Result,
    Resume,
    Shm,
    Step,
    Submit,
    Welcome,
)
from tensorwire_protocol.tensors import TensorSink, pack_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tensorwire_protocol.limits import Limits

_PACKER_BYTES = 1024  # to begin with: the default of 256 KiB is a system call for each message


def _pack(meta: object, default: Callable[[object], object] | None = None) -> bytes:
    # Never a shared Packer: it must not be entered twice, and would be, by another thread or by a
    # finalizer that the garbage collector runs in the middle of `pack` and that sends a CANCEL.
    try:
        packed: bytes = msgpack.Packer(default=default, buf_size=_PACKER_BYTES).pack(meta)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadMeta(f"a value cannot be sent: {error}") from error
    return packed


def _pack_ids(ids: Iterable[int]) -> bytes:
    try:
        return pack_ids(ids)
    except (TypeError, OverflowError) as error:
        raise BadMeta(f"token ids must be integers of 32 bits: {error}") from error


def encode(message: Message, limits: Limits) -> list[bytes | memoryview]:
    """Return the frame of `message` as buffers to be sent in order.

    Large arrays are not copied: the buffers refer to the caller's memory until they are sent.

    Raises:
        BadTensor: an array's dtype has no name on the wire.
        BadMeta: a value that msgpack cannot carry.
    """
    return _ENCODERS[type(message)](message, limits)


def _plain_frame(message: Message, stream: int, meta: object, aux: int = 0) -> list[Any]:
    return [build_frame(message.KIND, stream, _pack(meta), aux=aux)]


def _tensor_frame(
    message: Message, stream: int, meta: object, limits: Limits, *, plain: object
) -> list[Any]:
    sink = TensorSink(limits.inline_bytes)
    packed = _pack(meta, sink.default)
    if sink.num_tensors:
        # An array outside the inputs or outputs (a numpy scalar among the timings) would be refused
        # by the peer, and there it may cost the connection.
        _pack(plain)
    if len(sink.segments) > limits.segments:
        raise BadTensor(f"{len(sink.segments)} arrays; a message carries {limits.segments}")
    if not sink.segments:
        return [build_frame(message.KIND, stream, packed)]
    return build_segmented_frame(message.KIND, stream, packed, sink.segments)


def _encode_request(m: Request, limits: Limits) -> list[Any]:
    meta = [m.op, m.key, m.model, m.inputs, m.params, m.deadline_ms, m.credit, m.priority, m.trace]
    return _tensor_frame(m, m.stream, meta, limits, plain=m.params)


def _encode_submit(m: Submit, limits: Limits) -> list[Any]:
    meta = [
        m.op, m.key, m.attempt, m.model, m.inputs, m.params, m.deadline_ms, m.priority,
        _pack_ids(m.so_far), m.tenant,
    ]  # fmt: skip
    return _tensor_frame(m, m.stream, meta, limits, plain=m.params)


def _encode_result(m: Result, limits: Limits) -> list[Any]:
    plain = [m.usage, m.timings, m.extra]
    return _tensor_frame(m, m.stream, [m.outputs, *plain], limits, plain=plain)


def _encode_data(m: Data, _: Limits) -> list[Any]:
    flags = Flag.END if m.last else 0
    size = len(m.payload)
    return [pack_header(size, Kind.DATA, flags, m.segment, m.stream, 0), m.payload]


def _encode_failure(m: Failure, _: Limits) -> list[Any]:
    meta = [m.message, m.retryable, m.executed.value, m.retry_after_ms, m.log_id, m.detail]
    return _plain_frame(m, m.stream, meta, aux=m.code)


def _encode_ack(m: Ack, _: Limits) -> list[Any]:
    packed = None if m.prompt_ids is None else _pack_ids(m.prompt_ids)
    return _plain_frame(m, m.stream, [m.prompt_tokens, packed])


def _encode_step(m: Step, _: Limits) -> list[Any]:
    meta = [m.streams, m.attempts, m.first_indexes, m.counts, m.tokens, m.texts, m.extra]
    return _plain_frame(m, 0, meta)


def _encode_batch(m: EventBatch, _: Limits) -> list[Any]:
    return _plain_frame(m, 0, [m.streams, m.first_indexes, m.counts, m.tokens, m.texts, m.extra])


def _encode_end(m: End, _: Limits) -> list[Any]:
    meta = [m.finish.value, m.count, m.checksum, m.usage, m.timings, m.extra]
    return _plain_frame(m, m.stream, meta)


_ENCODERS: dict[type, Callable[[Any, Limits], list[Any]]] = {
    Hello: lambda m, _: _plain_frame(
        m, 0, [m.version, list(m.features), m.limits, m.software, m.auth]
    ),
    Welcome: lambda m, _: _plain_frame(
        m, 0, [m.version, list(m.features), m.limits, m.software, m.session, m.auth]
    ),
    Auth: lambda m, _: _plain_frame(m, 0, [m.payload]),
    Ping: lambda m, _: _plain_frame(m, 0, m.payload),
    Pong: lambda m, _: _plain_frame(m, 0, m.payload),
    Goaway: lambda m, _: _plain_frame(
        m, 0, [m.last_stream, m.grace_ms, list(m.alternatives)], aux=m.code
    ),
    Credit: lambda m, _: _plain_frame(m, m.stream, m.amount),
    Request: _encode_request,
    Data: _encode_data,
    Cancel: lambda m, _: _plain_frame(m, m.stream, [m.reason]),
    Resume: lambda m, _: _plain_frame(m, m.stream, [m.key, m.next_index, m.next_char, m.credit]),
    Result: _encode_result,
    Event: lambda m, _: _plain_frame(m, m.stream, [m.index, m.tokens, m.text, m.extra]),
    EventBatch: _encode_batch,
    Failure: _encode_failure,
    Ack: _encode_ack,
    End: _encode_end,
    Submit: _encode_submit,
    Step: _encode_step,
    Heartbeat: lambda m, _: _plain_frame(m, 0, [m.state, m.steps, m.load, m.card, m.detail]),
    Drain: lambda m, _: _plain_frame(m, 0, [m.grace_ms]),
    Load: lambda m, _: _plain_frame(m, 0, [m.payload]),
    Shm: lambda m, _: _plain_frame(m, m.stream, [m.payload]),
}
