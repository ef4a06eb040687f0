"""Messages to frames and back through msgspec: the plain codec's bytes, several times faster.

Used where msgspec is installed; a server requires it. Here are the hot messages in their ordinary
shape. Everything else (rare messages, nested or many values, fields of a later version, and all
that is wrong) is left to the plain codec, so that both accept and refuse the same. msgspec lets the
last of two equal keys win; so what was read is written again, and must give the very same bytes.

A gateway passes inputs and outputs on unopened (`PACKING`): it reads what it decides by, and who
opens the values, checks them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
from msgspec.msgpack import Ext
from msgspec.structs import astuple

from tensorwire_protocol.codec.checks import plain_map
from tensorwire_protocol.codec.choice import Codec
from tensorwire_protocol.codec.decode import FINISH, columns, decode, unpacked_ids
from tensorwire_protocol.codec.encode import encode
from tensorwire_protocol.codec.metas import (
    ITEMS,
    NAME_BYTES,
    NAME_CHARS,
    read_end,
    read_event,
    read_event_batch,
    read_map,
    read_other_packed_request,
    read_other_packed_result,
    read_packed_request,
    read_packed_result,
    read_request,
    read_result,
    read_step,
    read_submit,
    write,
)
from tensorwire_protocol.codec.unpack import unpack
from tensorwire_protocol.errors import BadMeta, BadTensor
from tensorwire_protocol.frames import build_segmented_frame, pack_header
from tensorwire_protocol.limits import WORKER_LINK
from tensorwire_protocol.messages import (
    EMPTY,
    EncodedTerminal,
    End,
    Event,
    EventBatch,
    Kind,
    Packed,
    PackedResult,
    Request,
    Result,
    Step,
    Submit,
)
from tensorwire_protocol.tensors import EXT_TENSOR, TensorSource, describe, pack_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tensorwire_protocol.frames import Frame
    from tensorwire_protocol.limits import Limits
    from tensorwire_protocol.messages import Message

_FIXMAP: Final = 0x80
_FIXMAP_MASK: Final = 0xF0
_FIXMAP_ITEMS: Final = 15
_FIXMAPS: Final = [bytes((_FIXMAP | num_items,)) for num_items in range(_FIXMAP_ITEMS + 1)]

_Fields = tuple[Any, ...]  # which compiled code takes apart faster than what it knows nothing of

# Names of this module, which compiled code need not look up.
_raw: Final = msgspec.Raw
_EMPTY_MAP: Final = msgspec.Raw(_FIXMAPS[0])
_ext: Final = Ext
_read_result: Final = read_result
_read_packed_request: Final = read_packed_request
_read_other_packed_request: Final = read_other_packed_request
_read_packed_result: Final = read_packed_result
_read_other_packed_result: Final = read_other_packed_result
_read_submit: Final = read_submit
_write: Final = write
_NAME_CHARS: Final = NAME_CHARS
_NAME_BYTES: Final = NAME_BYTES
_ITEMS: Final = ITEMS
_REQ: Final = int(Kind.REQ)
_SUBMIT: Final = int(Kind.SUBMIT)
_RES: Final = int(Kind.RES)
_EVT: Final = int(Kind.EVT)
_EVB: Final = int(Kind.EVB)
_STEP: Final = int(Kind.STEP)
_END: Final = int(Kind.END)


# -- frames to messages ----------------------------------------------------------------------------


class _Extraordinary(Exception):
    """Not what is decoded here."""


def _check_same(read: object, meta: bytes) -> None:
    if _write(read) != meta:
        raise _Extraordinary


def _request(frame: Frame, limits: Limits) -> Request:
    meta = frame.meta
    read = read_request(meta)
    _check_same(read, meta)
    return Request(
        frame.stream,
        read.op,
        read.key,
        read.model,
        _opened(read.inputs, frame, limits),
        read.params,
        read.deadline_ms,
        read.credit,
        read.priority,
        read.trace,
    )


def _submit(frame: Frame, limits: Limits) -> Submit:
    meta = frame.meta
    read: _Fields = _read_submit(meta)
    _check_same(read, meta)
    op, key, attempt, model, inputs, params, deadline_ms, priority, so_far, tenant = read
    return Submit(
        frame.stream,
        op,
        key,
        attempt,
        model,
        _opened(inputs, frame, limits),
        params,
        deadline_ms,
        priority,
        unpacked_ids(so_far, "so_far") if so_far else [],
        tenant,
    )


def _result(frame: Frame, limits: Limits) -> Result:
    meta = frame.meta
    read: _Fields = _read_result(meta)
    _check_same(read, meta)
    outputs: dict[str, Any]
    usage: dict[str, Any]
    timings: dict[str, Any]
    extra: dict[str, Any]
    outputs, usage, timings, extra = read
    for values in (outputs, usage, timings, extra):
        for name in values:
            if len(name) > _NAME_CHARS:
                raise _Extraordinary
    return Result(frame.stream, _opened(outputs, frame, limits), usage, timings, extra)


def _opened(values: dict[str, Any], frame: Frame, limits: Limits) -> dict[str, Any]:
    """Put arrays in the places of their descriptors."""
    source: TensorSource | None = None
    for name, value in values.items():
        if type(value) is _ext:
            if source is None:
                source = TensorSource(frame.segments, limits)
            values[name] = source.ext_hook(value.code, bytes(value.data))
    return values


def _event(frame: Frame, limits: Limits) -> Event:
    read = read_event(frame.meta)
    _check_items(limits, read.tokens)
    return Event(frame.stream, read.index, read.tokens, read.text)


def _event_batch(frame: Frame, limits: Limits) -> EventBatch:
    read = read_event_batch(frame.meta)
    _check_items(limits, read.streams)
    _check_items(limits, read.tokens)
    columns(read.streams, read.first_indexes, read.counts, read.tokens, read.texts)
    return EventBatch(
        read.streams,
        read.first_indexes,
        read.counts,
        read.tokens,
        read.texts,
    )


def _step(frame: Frame, limits: Limits) -> Step:
    read = read_step(frame.meta)
    _check_items(limits, read.streams)
    _check_items(limits, read.tokens)
    columns(read.streams, read.first_indexes, read.counts, read.tokens, read.texts)
    if len(read.attempts) != len(read.streams):
        raise _Extraordinary
    return Step(
        read.streams,
        read.attempts,
        read.first_indexes,
        read.counts,
        read.tokens,
        read.texts,
    )


def _end(frame: Frame, _: Limits) -> End:
    meta = frame.meta
    read = read_end(meta)
    _check_same(read, meta)
    return End(
        frame.stream,
        FINISH[read.finish],
        read.count,
        read.checksum,
        read.usage,
        read.timings,
        read.extra,
    )


def _check_items(limits: Limits, items: list[Any]) -> None:
    # The other columns are as long as these, or the batch is refused.
    if len(items) > limits.container_items:
        raise _Extraordinary


# -- frames on their way through a gateway ---------------------------------------------------------


def _request_packed(frame: Frame, limits: Limits) -> Request:
    op, key, model, inputs, params, deadline_ms, credit, priority, trace = _read(
        _read_packed_request, _read_other_packed_request, frame.meta
    )
    return Request(
        frame.stream,
        op,
        key,
        model,
        Packed(inputs, frame.segments),
        EMPTY
        if params == _EMPTY_MAP
        else plain_map(unpack(bytes(params), limits), "params", limits),
        deadline_ms,
        credit,
        priority or 0,
        trace,
    )


def _result_packed(frame: Frame, limits: Limits) -> PackedResult:
    outputs, usage, timings, extra = _read(
        _read_packed_result, _read_other_packed_result, frame.meta
    )
    return PackedResult(frame.stream, Packed(outputs, frame.segments), usage, timings, extra)


def _read(usual: Callable[[bytes], _Fields], other: Callable[[bytes], Any], meta: bytes) -> _Fields:
    try:
        return usual(meta)
    except Exception:  # it has more or fewer fields, or is wrong
        return astuple(_sound(other, meta))


def _sound(reader: Callable[[bytes], Any], meta: bytes) -> Any:
    try:
        return reader(meta)
    except Exception as error:
        # msgspec says which field it is and what it should be, in types and positions alone.
        raise BadMeta(f"the meta is not as it should be: {error}") from error


def extended(packed: msgspec.Raw, more: dict[str, float]) -> msgspec.Raw:
    """Return a map that is not opened with more names in it, which it does not have yet."""
    before = bytes(packed)
    num_items = (before[0] & _FIXMAP_ITEMS) + len(more)
    if before[0] & _FIXMAP_MASK != _FIXMAP or num_items > _FIXMAP_ITEMS:
        return _raw(_write({**_sound(read_map, before), **more}))
    return _raw(_FIXMAPS[num_items] + before[1:] + _write(more)[1:])


def opened(packed: msgspec.Raw) -> dict[str, Any]:
    """Return a map without arrays that a gateway left unopened.

    Raises:
        BadMeta: it is none.
    """
    return plain_map(unpack(bytes(packed), WORKER_LINK), "the map", WORKER_LINK)


# -- messages to frames ----------------------------------------------------------------------------


def _write_request(m: Request, limits: Limits) -> list[Any]:
    segments: list[memoryview] = []
    inputs = _writable(m.inputs, segments, limits)
    if inputs is None or not (isinstance(m.inputs, Packed) or _is_plain(m.params)):
        return encode(m, limits)
    meta = [m.op, m.key, m.model, inputs, m.params, m.deadline_ms, m.credit, m.priority, m.trace]
    return _frame(m, _REQ, m.stream, meta, limits, segments)


def _write_submit(m: Submit, limits: Limits) -> list[Any]:
    segments: list[memoryview] = []
    inputs = _writable(m.inputs, segments, limits)
    if inputs is None or not (isinstance(m.inputs, Packed) or _is_plain(m.params)):
        return encode(m, limits)
    so_far = pack_ids(m.so_far) if m.so_far else b""
    meta = [
        m.op, m.key, m.attempt, m.model, inputs, m.params, m.deadline_ms, m.priority, so_far,
        m.tenant,
    ]  # fmt: skip
    return _frame(m, _SUBMIT, m.stream, meta, limits, segments)


def _write_result(m: Result, limits: Limits) -> list[Any]:
    segments: list[memoryview] = []
    outputs = _writable(m.outputs, segments, limits)
    if outputs is None or not (_is_plain(m.usage) and _is_plain(m.timings) and _is_plain(m.extra)):
        return encode(m, limits)
    return _frame(m, _RES, m.stream, [outputs, m.usage, m.timings, m.extra], limits, segments)


def _write_packed_result(m: PackedResult, limits: Limits) -> list[Any]:
    meta = [m.outputs.meta, m.usage, m.timings, m.extra]
    return _frame(m, _RES, m.stream, meta, limits, m.outputs.segments)


def _write_event(m: Event, limits: Limits) -> list[Any]:
    if m.extra:
        return encode(m, limits)
    return _frame(m, _EVT, m.stream, [m.index, m.tokens, m.text, None], limits)


def _write_event_batch(m: EventBatch, limits: Limits) -> list[Any]:
    if m.extra:
        return encode(m, limits)
    meta = [m.streams, m.first_indexes, m.counts, m.tokens, m.texts, None]
    return _frame(m, _EVB, 0, meta, limits)


def _write_step(m: Step, limits: Limits) -> list[Any]:
    if m.extra:
        return encode(m, limits)
    meta = [m.streams, m.attempts, m.first_indexes, m.counts, m.tokens, m.texts, None]
    return _frame(m, _STEP, 0, meta, limits)


def _write_end(m: End, limits: Limits) -> list[Any]:
    if not (_is_plain(m.usage) and _is_plain(m.timings) and _is_plain(m.extra)):
        return encode(m, limits)
    meta = [m.finish.value, m.count, m.checksum, m.usage, m.timings, m.extra]
    return _frame(m, _END, m.stream, meta, limits)


def _frame(
    m: Message,
    kind: int,
    stream: int,
    meta: list[Any],
    limits: Limits,
    segments: list[memoryview] | None = None,
) -> list[Any]:
    if segments and len(segments) > limits.segments:
        raise BadTensor(f"{len(segments)} arrays; a message carries {limits.segments}")
    try:
        packed = _write(meta)
    except Exception:  # the plain codec says what cannot be sent
        return encode(m, limits)
    if segments:
        return build_segmented_frame(kind, stream, packed, segments)
    size = len(packed)
    return [pack_header(size, kind, 0, 0, stream, size) + packed]


_SCALARS: Final = frozenset({type(None), bool, int, float, str, bytes})
_TEXT: Final = frozenset({str})


def _is_plain(values: Mapping[str, Any]) -> bool:
    # Of anything else (dates, sets, data classes) msgspec knows more than the wire does. What a
    # gateway passes on came from the wire, and the plain codec cannot write what is unopened.
    known: dict[str, Any] = values if isinstance(values, dict) else {**values}
    return all(type(value) in _SCALARS for value in known.values())


def _writable(
    values: Mapping[str, Any] | Packed, segments: list[memoryview], limits: Limits
) -> Any:
    """Return inputs or outputs for `_write`, their arrays in `segments`; None: too special."""
    if isinstance(values, Packed):
        segments += values.segments
        return values.meta
    known: dict[str, Any] = values if isinstance(values, dict) else {**values}
    arrays: dict[str, Ext] = {}
    for name, value in known.items():
        kind = type(value)
        if kind is np.ndarray:
            arrays[name] = _array(value, segments, limits)
        elif kind not in _SCALARS and not (kind is list and _TEXT.issuperset(map(type, value))):
            return None
    return {**known, **arrays} if arrays else known


def _array(value: Any, segments: list[memoryview], limits: Limits) -> Ext:
    name, dense = describe(value)
    raw = dense.reshape(-1).view(np.uint8).data
    ref: int | bytes
    if len(raw) <= limits.inline_bytes:
        ref = bytes(raw)
    else:
        ref = len(segments)
        segments.append(raw)
    return Ext(EXT_TENSOR, write((name, dense.shape, ref)))


# -- the two codecs --------------------------------------------------------------------------------
# Chosen by comparisons, not from a table: compiled code calls what it knows by name at once.


class _Typed(Codec):
    """Reads what is ordinary typed, the rest plainly."""

    def decode(self, frame: Frame, limits: Limits) -> Message:
        if limits.key_bytes >= _NAME_BYTES and limits.container_items >= _ITEMS:
            kind = frame.kind
            try:
                if kind == _RES:
                    return _result(frame, limits)
                if kind == _SUBMIT:
                    return _submit(frame, limits)
                if kind == _REQ:
                    return _request(frame, limits)
                if kind == _EVB:
                    return _event_batch(frame, limits)
                if kind == _STEP:
                    return _step(frame, limits)
                if kind == _EVT:
                    return _event(frame, limits)
                if kind == _END:
                    return _end(frame, limits)
            except Exception:  # whatever it is: the plain codec reads it, or says what is wrong
                pass
        return decode(frame, limits)

    def encode(self, message: Message, limits: Limits) -> list[bytes | memoryview]:
        if type(message) is EncodedTerminal:
            return message.buffers
        if type(message) is Submit:
            return _write_submit(message, limits)
        if type(message) is PackedResult:
            return _write_packed_result(message, limits)
        if type(message) is Request:
            return _write_request(message, limits)
        if type(message) is Result:
            return _write_result(message, limits)
        if type(message) is EventBatch:
            return _write_event_batch(message, limits)
        if type(message) is Step:
            return _write_step(message, limits)
        if type(message) is Event:
            return _write_event(message, limits)
        if type(message) is End:
            return _write_end(message, limits)
        return encode(message, limits)


class _Packing(_Typed):
    """Leaves the values of what passes through unopened."""

    def decode(self, frame: Frame, limits: Limits) -> Message:
        if frame.kind == _REQ:
            return _request_packed(frame, limits)
        if frame.kind == _RES:
            return _result_packed(frame, limits)
        return super().decode(frame, limits)


TYPED: Final = _Typed()
PACKING: Final = _Packing()
