"""Messages to frames and back through msgspec: the plain codec's bytes, several times faster.

Used where msgspec is installed; a server requires it. Here are the hot messages in their ordinary
shape. Everything else (rare messages, nested or many values, fields of a later version, and all
that is wrong) is left to the plain codec, so that both accept and refuse the same. msgspec lets the
last of two equal keys win; so what was read is written again, and must give the very same bytes.

A gateway passes inputs and outputs on unopened (`PACKING`): it reads what it decides by, and who
opens the values, checks them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
from msgspec.msgpack import Decoder, Encoder, Ext

from tensorwire_protocol.codec.checks import U32_MAX, plain_map
from tensorwire_protocol.codec.choice import Codec
from tensorwire_protocol.codec.decode import FINISH, columns, decode, unpacked_ids
from tensorwire_protocol.codec.encode import encode
from tensorwire_protocol.codec.unpack import unpack
from tensorwire_protocol.errors import BadMeta, BadTensor
from tensorwire_protocol.frames import HEADER, build_segmented_frame
from tensorwire_protocol.limits import WORKER_LINK
from tensorwire_protocol.messages import (
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

_EMPTY_MAP = b"\x80"
_FIXMAP, _FIXMAP_MASK, _FIXMAP_ITEMS = 0x80, 0xF0, 15
_NO_MAP = msgspec.Raw(_EMPTY_MAP)

_U32 = Annotated[int, msgspec.Meta(ge=0, le=U32_MAX)]
_I32 = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
_Key = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
_Priority = Annotated[int, msgspec.Meta(ge=-100, le=100)]
# What is ordinary: within these bounds no usual limit can be broken.
_NAME_CHARS, _NAME_BYTES = 16, 64
_ITEMS = 64
_Name = Annotated[str, msgspec.Meta(max_length=_NAME_CHARS)]
_few = msgspec.Meta(max_length=_ITEMS)
_Texts = Annotated[list[str], _few]
_Values = Annotated[dict[_Name, bool | int | float | str | _Texts | Ext | None], _few]
_Scalars = Annotated[dict[_Name, bool | int | float | str | None], _few]
_Numbers = Annotated[dict[_Name, int | float], _few]


class _Meta(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """A meta as an array of exactly these fields."""


class _RequestMeta(_Meta):
    op: str
    key: _Key
    model: str | None
    inputs: _Values
    params: _Scalars
    deadline_ms: _U32 | None
    credit: _U32 | None
    priority: _Priority
    trace: str | None


class _PackedRequestMeta(msgspec.Struct, array_like=True, gc=False):
    op: str
    key: _Key
    model: str | None = None
    inputs: msgspec.Raw = _NO_MAP
    params: msgspec.Raw = _NO_MAP
    deadline_ms: _U32 | None = None
    credit: _U32 | None = None
    priority: _Priority | None = None
    trace: str | None = None


class _SubmitMeta(_Meta):
    op: str
    key: _Key
    attempt: Annotated[int, msgspec.Meta(ge=1, le=U32_MAX)]
    model: str | None
    inputs: _Values
    params: _Scalars
    deadline_ms: _U32 | None
    priority: _Priority
    so_far: bytes
    tenant: str


class _ResultMeta(_Meta):
    outputs: _Values
    usage: _Numbers
    timings: _Numbers
    extra: _Scalars


class _PackedResultMeta(msgspec.Struct, array_like=True, gc=False):
    outputs: msgspec.Raw
    usage: msgspec.Raw = _NO_MAP
    timings: msgspec.Raw = _NO_MAP
    extra: msgspec.Raw = _NO_MAP


class _EventMeta(_Meta):
    index: _U32
    tokens: list[_I32]
    text: str
    extra: None


class _EventBatchMeta(_Meta):
    streams: list[int]
    first_indexes: list[int]
    counts: list[int] | None
    tokens: list[_I32]
    texts: list[str]
    extra: None


class _StepMeta(_Meta):
    streams: list[int]
    attempts: list[int]
    first_indexes: list[int]
    counts: list[int] | None
    tokens: list[_I32]
    texts: list[str]
    extra: None


class _EndMeta(_Meta):
    finish: str
    count: _U32
    checksum: _U32
    usage: _Numbers
    timings: _Numbers
    extra: _Scalars


_read_request = Decoder(_RequestMeta).decode
_read_packed_request = Decoder(_PackedRequestMeta).decode
_read_submit = Decoder(_SubmitMeta).decode
_read_result = Decoder(_ResultMeta).decode
_read_packed_result = Decoder(_PackedResultMeta).decode
_read_event = Decoder(_EventMeta).decode
_read_event_batch = Decoder(_EventBatchMeta).decode
_read_step = Decoder(_StepMeta).decode
_read_end = Decoder(_EndMeta).decode
_read_map = Decoder(dict[str, Any]).decode
_write = Encoder().encode


# -- frames to messages ----------------------------------------------------------------------------


class _Extraordinary(Exception):
    """Not what is decoded here."""


def _check_same(read: _Meta, meta: memoryview) -> None:
    if _write(read) != meta:
        raise _Extraordinary


def _request(frame: Frame, limits: Limits) -> Request:
    read = _read_request(frame.meta)
    _check_same(read, frame.meta)
    return Request(
        stream=frame.stream,
        op=read.op,
        key=read.key,
        model=read.model,
        inputs=_opened(read.inputs, frame, limits),
        params=read.params,
        deadline_ms=read.deadline_ms,
        credit=read.credit,
        priority=read.priority,
        trace=read.trace,
    )


def _submit(frame: Frame, limits: Limits) -> Submit:
    read = _read_submit(frame.meta)
    _check_same(read, frame.meta)
    return Submit(
        stream=frame.stream,
        op=read.op,
        key=read.key,
        attempt=read.attempt,
        model=read.model,
        inputs=_opened(read.inputs, frame, limits),
        params=read.params,
        deadline_ms=read.deadline_ms,
        priority=read.priority,
        so_far=unpacked_ids(read.so_far, "so_far") if read.so_far else [],
        tenant=read.tenant,
    )


def _result(frame: Frame, limits: Limits) -> Result:
    read = _read_result(frame.meta)
    _check_same(read, frame.meta)
    return Result(
        stream=frame.stream,
        outputs=_opened(read.outputs, frame, limits),
        usage=read.usage,
        timings=read.timings,
        extra=read.extra,
    )


def _opened(values: dict[str, Any], frame: Frame, limits: Limits) -> dict[str, Any]:
    """Put arrays in the places of their descriptors."""
    source: TensorSource | None = None
    for name, value in values.items():
        if type(value) is Ext:
            if source is None:
                _check_segments(frame, limits)
                source = TensorSource(frame.segments, limits)
            values[name] = source.ext_hook(value.code, bytes(value.data))
    return values


def _event(frame: Frame, limits: Limits) -> Event:
    read = _read_event(frame.meta)
    _check_items(limits, read.tokens)
    return Event(stream=frame.stream, index=read.index, tokens=read.tokens, text=read.text)


def _event_batch(frame: Frame, limits: Limits) -> EventBatch:
    read = _read_event_batch(frame.meta)
    _check_items(limits, read.streams)
    _check_items(limits, read.tokens)
    columns(read.streams, read.first_indexes, read.counts, read.tokens, read.texts)
    return EventBatch(
        streams=read.streams,
        first_indexes=read.first_indexes,
        counts=read.counts,
        tokens=read.tokens,
        texts=read.texts,
    )


def _step(frame: Frame, limits: Limits) -> Step:
    read = _read_step(frame.meta)
    _check_items(limits, read.streams)
    _check_items(limits, read.tokens)
    columns(read.streams, read.first_indexes, read.counts, read.tokens, read.texts)
    if len(read.attempts) != len(read.streams):
        raise _Extraordinary
    return Step(
        streams=read.streams,
        attempts=read.attempts,
        first_indexes=read.first_indexes,
        counts=read.counts,
        tokens=read.tokens,
        texts=read.texts,
    )


def _end(frame: Frame, _: Limits) -> End:
    read = _read_end(frame.meta)
    _check_same(read, frame.meta)
    return End(
        stream=frame.stream,
        finish=FINISH[read.finish],
        count=read.count,
        checksum=read.checksum,
        usage=read.usage,
        timings=read.timings,
        extra=read.extra,
    )


def _check_items(limits: Limits, items: list[Any]) -> None:
    # The other columns are as long as these, or the batch is refused.
    if len(items) > limits.container_items:
        raise _Extraordinary


def _check_segments(frame: Frame, limits: Limits) -> None:
    if frame.aux > limits.segments:
        raise BadTensor(f"{frame.aux} segments; a message carries at most {limits.segments}")


# -- frames on their way through a gateway ---------------------------------------------------------


def _request_packed(frame: Frame, limits: Limits) -> Request:
    if frame.aux:
        _check_segments(frame, limits)
    # A copy, and the values stay in it: the frame's memory is used again by the next read.
    read = _read(_read_packed_request, bytes(frame.meta))
    params = bytes(read.params)
    return Request(
        stream=frame.stream,
        op=read.op,
        key=read.key,
        model=read.model,
        inputs=Packed(read.inputs, frame.segments),
        params={} if params == _EMPTY_MAP else plain_map(unpack(params, limits), "params", limits),
        deadline_ms=read.deadline_ms,
        credit=read.credit,
        priority=read.priority or 0,
        trace=read.trace,
    )


def _result_packed(frame: Frame, limits: Limits) -> PackedResult:
    if frame.aux:
        _check_segments(frame, limits)
    read = _read(_read_packed_result, bytes(frame.meta))
    return PackedResult(
        stream=frame.stream,
        outputs=Packed(read.outputs, frame.segments),
        usage=read.usage,
        timings=read.timings,
        extra=read.extra,
    )


def _read(reader: Callable[[bytes], Any], meta: bytes) -> Any:
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
        return msgspec.Raw(_write({**_read(_read_map, before), **more}))
    return msgspec.Raw(bytes((_FIXMAP | num_items,)) + before[1:] + _write(more)[1:])


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
    return _frame(m, m.stream, meta, limits, segments)


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
    return _frame(m, m.stream, meta, limits, segments)


def _write_result(m: Result, limits: Limits) -> list[Any]:
    segments: list[memoryview] = []
    outputs = _writable(m.outputs, segments, limits)
    if outputs is None or not (_is_plain(m.usage) and _is_plain(m.timings) and _is_plain(m.extra)):
        return encode(m, limits)
    return _frame(m, m.stream, [outputs, m.usage, m.timings, m.extra], limits, segments)


def _write_packed_result(m: PackedResult, limits: Limits) -> list[Any]:
    meta = [m.outputs.meta, m.usage, m.timings, m.extra]
    return _frame(m, m.stream, meta, limits, m.outputs.segments)


def _write_event(m: Event, limits: Limits) -> list[Any]:
    if m.extra:
        return encode(m, limits)
    return _frame(m, m.stream, [m.index, m.tokens, m.text, None], limits)


def _write_event_batch(m: EventBatch, limits: Limits) -> list[Any]:
    if m.extra:
        return encode(m, limits)
    meta = [m.streams, m.first_indexes, m.counts, m.tokens, m.texts, None]
    return _frame(m, 0, meta, limits)


def _write_step(m: Step, limits: Limits) -> list[Any]:
    if m.extra:
        return encode(m, limits)
    meta = [m.streams, m.attempts, m.first_indexes, m.counts, m.tokens, m.texts, None]
    return _frame(m, 0, meta, limits)


def _write_end(m: End, limits: Limits) -> list[Any]:
    if not (_is_plain(m.usage) and _is_plain(m.timings) and _is_plain(m.extra)):
        return encode(m, limits)
    meta = [m.finish.value, m.count, m.checksum, m.usage, m.timings, m.extra]
    return _frame(m, m.stream, meta, limits)


def _frame(
    m: Message,
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
        return build_segmented_frame(m.KIND, stream, packed, segments)
    size = len(packed)
    return [HEADER.pack(size, m.KIND, 0, 0, stream, size) + packed]


_SCALARS = frozenset({type(None), bool, int, float, str, bytes})
_TEXT = frozenset({str})


def _is_plain(values: Mapping[str, Any]) -> bool:
    # Of anything else (dates, sets, data classes) msgspec knows more than the wire does. What a
    # gateway passes on came from the wire, and the plain codec cannot write what is unopened.
    return not values or _SCALARS.issuperset(map(type, values.values()))


def _writable(
    values: Mapping[str, Any] | Packed, segments: list[memoryview], limits: Limits
) -> Any:
    """Return inputs or outputs for `_write`, their arrays in `segments`; None: too special."""
    if isinstance(values, Packed):
        segments += values.segments
        return values.meta
    arrays: dict[str, Ext] = {}
    for name, value in values.items():
        kind = type(value)
        if kind is np.ndarray:
            arrays[name] = _array(value, segments, limits)
        elif kind not in _SCALARS and not (kind is list and _TEXT.issuperset(map(type, value))):
            return None
    return {**values, **arrays} if arrays else values


def _array(value: Any, segments: list[memoryview], limits: Limits) -> Ext:
    name, dense = describe(value)
    raw = dense.reshape(-1).view(np.uint8).data
    ref: int | bytes
    if len(raw) <= limits.inline_bytes:
        ref = bytes(raw)
    else:
        ref = len(segments)
        segments.append(raw)
    return Ext(EXT_TENSOR, _write((name, dense.shape, ref)))


# -- the two codecs --------------------------------------------------------------------------------

_DECODERS: dict[int, Callable[[Frame, Limits], Message]] = {
    Kind.REQ: _request,
    Kind.SUBMIT: _submit,
    Kind.RES: _result,
    Kind.EVT: _event,
    Kind.EVB: _event_batch,
    Kind.STEP: _step,
    Kind.END: _end,
}
_PACKED_DECODERS: dict[int, Callable[[Frame, Limits], Message]] = {
    Kind.REQ: _request_packed,
    Kind.RES: _result_packed,
}
_ENCODERS: dict[type, Callable[[Any, Limits], list[Any]]] = {
    Request: _write_request,
    Submit: _write_submit,
    Result: _write_result,
    PackedResult: _write_packed_result,
    Event: _write_event,
    EventBatch: _write_event_batch,
    Step: _write_step,
    End: _write_end,
    EncodedTerminal: lambda m, _: m.buffers,
}


def _decode(frame: Frame, limits: Limits) -> Message:
    decoder = _DECODERS.get(frame.kind)
    is_usual = limits.key_bytes >= _NAME_BYTES and limits.container_items >= _ITEMS
    if decoder is not None and is_usual:
        try:
            return decoder(frame, limits)
        except Exception:  # whatever it is: the plain codec reads it, or says what is wrong
            pass
    return decode(frame, limits)


def _decode_packed(frame: Frame, limits: Limits) -> Message:
    decoder = _PACKED_DECODERS.get(frame.kind)
    return _decode(frame, limits) if decoder is None else decoder(frame, limits)


def _encode(message: Message, limits: Limits) -> list[bytes | memoryview]:
    encoder = _ENCODERS.get(type(message))
    return encode(message, limits) if encoder is None else encoder(message, limits)


TYPED = Codec(decode=_decode, encode=_encode)
PACKING = Codec(decode=_decode_packed, encode=_encode)
