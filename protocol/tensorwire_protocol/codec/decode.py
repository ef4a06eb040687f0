"""Frames to typed messages, in plain msgpack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorwire_protocol.codec.checks import (
    STR_ONLY,
    byte_string,
    column,
    integer,
    numbers_map,
    optional_integer,
    optional_string,
    padded,
    plain_map,
    string,
    tokens_column,
)
from tensorwire_protocol.codec.unpack import unpack
from tensorwire_protocol.errors import BadMeta, Executed
from tensorwire_protocol.frames import SEGMENT_KINDS, Flag, Frame
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
    Finish,
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
from tensorwire_protocol.tensors import TensorSource, unpack_ids

if TYPE_CHECKING:
    from collections.abc import Callable

    from tensorwire_protocol.limits import Limits

_EXECUTED = {e.value: e for e in Executed}
FINISH = {f.value: f for f in Finish}


def decode(frame: Frame, limits: Limits) -> Message:
    """Return the typed message of a frame of a known kind.

    Raises:
        BadMeta, BadTensor: the meta is not readable or not of the kind's shape.
    """
    meta = None
    if frame.kind in SEGMENT_KINDS:
        meta = unpack(frame.meta, limits, TensorSource(frame.segments, limits).ext_hook)
    elif frame.kind != Kind.DATA:
        meta = unpack(frame.meta, limits)
    return _DECODERS[frame.kind](frame, meta, limits)


def unpacked_ids(value: Any, name: str) -> list[int]:
    """Return token ids that came packed; None is none."""
    packed = byte_string(b"" if value is None else value, name)
    if len(packed) % 4:
        raise BadMeta(f"{name} must be 4 bytes for each token")
    return unpack_ids(packed)


def columns(
    streams: Any, firsts: Any, counts: Any, tokens: Any, texts: Any
) -> tuple[list[int], list[int], list[int] | None, list[int], list[str]]:
    """Return the columns of a batch of events, proven to fit one another."""
    streams, firsts, tokens = (
        column(streams, "streams"),
        column(firsts, "first_indexes"),
        tokens_column(tokens),
    )
    texts = column(texts, "texts", STR_ONLY)
    counts = None if counts is None else column(counts, "counts")
    num_tokens = len(streams) if counts is None else sum(counts)
    if counts is not None and (len(counts) != len(streams) or min(counts, default=0) < 0):
        raise BadMeta("counts must hold one number >= 0 for each stream")
    if not len(streams) == len(firsts) == len(texts) or len(tokens) != num_tokens:
        raise BadMeta("the columns of a batch of events have different lengths")
    return streams, firsts, counts, tokens, texts


def _hello(_: Frame, meta: Any, limits: Limits) -> Hello:
    version, features, announced, software, auth = padded(meta, 2, 5)
    return Hello(
        version=integer(version, "version"),
        features=tuple(column(features, "features", STR_ONLY)),
        limits=plain_map(announced, "limits", limits),
        software=string("" if software is None else software, "software"),
        auth=plain_map(auth, "auth", limits) or None,
    )


def _welcome(_: Frame, meta: Any, limits: Limits) -> Welcome:
    version, features, announced, software, session, auth = padded(meta, 2, 6)
    return Welcome(
        version=integer(version, "version"),
        features=tuple(column(features, "features", STR_ONLY)),
        limits=plain_map(announced, "limits", limits),
        software=string("" if software is None else software, "software"),
        session=byte_string(b"" if session is None else session, "session"),
        auth=plain_map(auth, "auth", limits) or None,
    )


def _auth(_: Frame, meta: Any, limits: Limits) -> Auth:
    return Auth(payload=plain_map(padded(meta, 1, 1)[0], "auth", limits))


def _ping(_: Frame, meta: Any, limits: Limits) -> Ping:
    return Ping(payload=byte_string(meta, "ping", 8))


def _pong(_: Frame, meta: Any, limits: Limits) -> Pong:
    return Pong(payload=byte_string(meta, "pong", 8))


def _goaway(frame: Frame, meta: Any, limits: Limits) -> Goaway:
    last, grace, alternatives = padded(meta, 1, 3)
    return Goaway(
        code=frame.aux,
        last_stream=integer(last, "last_stream"),
        grace_ms=integer(0 if grace is None else grace, "grace_ms"),
        alternatives=tuple(
            column([] if alternatives is None else alternatives, "alternatives", STR_ONLY)
        ),
    )


def _credit(frame: Frame, meta: Any, limits: Limits) -> Credit:
    return Credit(stream=frame.stream, amount=integer(meta, "credit", 1))


def _request(frame: Frame, meta: Any, limits: Limits) -> Request:
    op, key, model, inputs, params, deadline, credit, priority, trace = padded(meta, 2, 9)
    return Request(
        stream=frame.stream,
        op=string(op, "op"),
        key=byte_string(key, "key", 16),
        model=optional_string(model, "model"),
        inputs=plain_map(inputs, "inputs", limits, arrays=True),
        params=plain_map(params, "params", limits),
        deadline_ms=optional_integer(deadline, "deadline_ms"),
        credit=optional_integer(credit, "credit"),
        priority=integer(0 if priority is None else priority, "priority", -100, 100),
        trace=optional_string(trace, "trace"),
    )


def _data(frame: Frame, _: Any, limits: Limits) -> Data:
    return Data(
        stream=frame.stream,
        segment=frame.aux,
        payload=frame.segments[0],
        last=bool(frame.flags & Flag.END),
    )


def _cancel(frame: Frame, meta: Any, limits: Limits) -> Cancel:
    return Cancel(stream=frame.stream, reason=string(padded(meta, 1, 1)[0], "reason"))


def _resume(frame: Frame, meta: Any, limits: Limits) -> Resume:
    key, next_index, next_char, credit = padded(meta, 2, 4)
    return Resume(
        stream=frame.stream,
        key=byte_string(key, "key", 16),
        next_index=integer(next_index, "next_index"),
        next_char=0 if next_char is None else integer(next_char, "next_char"),
        credit=optional_integer(credit, "credit"),
    )


def _result(frame: Frame, meta: Any, limits: Limits) -> Result:
    outputs, usage, timings, extra = padded(meta, 1, 4)
    return Result(
        stream=frame.stream,
        outputs=plain_map(outputs, "outputs", limits, arrays=True),
        usage=numbers_map(usage, "usage", limits),
        timings=numbers_map(timings, "timings", limits),
        extra=plain_map(extra, "extra", limits),
    )


def _event(frame: Frame, meta: Any, limits: Limits) -> Event:
    index, tokens, text, extra = padded(meta, 3, 4)
    return Event(
        stream=frame.stream,
        index=integer(index, "index"),
        tokens=tokens_column(tokens),
        text=string(text, "text"),
        extra=plain_map(extra, "extra", limits) or None,
    )


def _event_batch(_: Frame, meta: Any, limits: Limits) -> EventBatch:
    streams, firsts, counts, tokens, texts, extra = padded(meta, 5, 6)
    streams, firsts, counts, tokens, texts = columns(streams, firsts, counts, tokens, texts)
    return EventBatch(
        streams=streams,
        first_indexes=firsts,
        counts=counts,
        tokens=tokens,
        texts=texts,
        extra=plain_map(extra, "extra", limits) or None,
    )


def _failure(frame: Frame, meta: Any, limits: Limits) -> Failure:
    text, retryable, executed, retry_after, log_id, detail = padded(meta, 3, 6)
    if type(retryable) is not bool or type(executed) is not str or executed not in _EXECUTED:
        raise BadMeta("an error must say if it is retryable and was executed (no, maybe, yes)")
    return Failure(
        stream=frame.stream,
        code=frame.aux,
        message=string(text, "message"),
        retryable=retryable,
        executed=_EXECUTED[executed],
        retry_after_ms=optional_integer(retry_after, "retry_after_ms"),
        log_id=optional_string(log_id, "log_id"),
        detail=plain_map(detail, "detail", limits),
    )


def _ack(frame: Frame, meta: Any, limits: Limits) -> Ack:
    num_tokens, ids = padded(meta, 0, 2)
    return Ack(
        stream=frame.stream,
        prompt_tokens=optional_integer(num_tokens, "prompt_tokens"),
        prompt_ids=None if ids is None else unpacked_ids(ids, "prompt_ids"),
    )


def _end(frame: Frame, meta: Any, limits: Limits) -> End:
    finish, count, checksum, usage, timings, extra = padded(meta, 3, 6)
    if type(finish) is not str or finish not in FINISH:
        raise BadMeta(f"the finish reason must be one of {', '.join(FINISH)}")
    return End(
        stream=frame.stream,
        finish=FINISH[finish],
        count=integer(count, "count"),
        checksum=integer(checksum, "checksum"),
        usage=numbers_map(usage, "usage", limits),
        timings=numbers_map(timings, "timings", limits),
        extra=plain_map(extra, "extra", limits),
    )


def _submit(frame: Frame, meta: Any, limits: Limits) -> Submit:
    op, key, attempt, model, inputs, params, deadline, priority, so_far, tenant = padded(
        meta, 3, 10
    )
    return Submit(
        stream=frame.stream,
        op=string(op, "op"),
        key=byte_string(key, "key", 16),
        attempt=integer(attempt, "attempt", 1),
        model=optional_string(model, "model"),
        inputs=plain_map(inputs, "inputs", limits, arrays=True),
        params=plain_map(params, "params", limits),
        deadline_ms=optional_integer(deadline, "deadline_ms"),
        priority=integer(0 if priority is None else priority, "priority", -100, 100),
        so_far=unpacked_ids(so_far, "so_far"),
        tenant=optional_string(tenant, "tenant") or "",
    )


def _step(_: Frame, meta: Any, limits: Limits) -> Step:
    streams, attempts, firsts, counts, tokens, texts, extra = padded(meta, 6, 7)
    streams, firsts, counts, tokens, texts = columns(streams, firsts, counts, tokens, texts)
    if len(column(attempts, "attempts")) != len(streams):
        raise BadMeta("attempts must hold one number for each stream")
    return Step(
        streams=streams,
        attempts=attempts,
        first_indexes=firsts,
        counts=counts,
        tokens=tokens,
        texts=texts,
        extra=plain_map(extra, "extra", limits) or None,
    )


def _heartbeat(_: Frame, meta: Any, limits: Limits) -> Heartbeat:
    state, steps, load, card, detail = padded(meta, 1, 5)
    return Heartbeat(
        state=string(state, "state"),
        steps=integer(0 if steps is None else steps, "steps"),
        load=plain_map(load, "load", limits),
        card=None if card is None else plain_map(card, "card", limits),
        detail=optional_string(detail, "detail"),
    )


def _drain(_: Frame, meta: Any, limits: Limits) -> Drain:
    return Drain(grace_ms=integer(padded(meta, 1, 1)[0], "grace_ms"))


def _load(_: Frame, meta: Any, limits: Limits) -> Load:
    return Load(payload=plain_map(padded(meta, 1, 1)[0], "load", limits))


def _shm(frame: Frame, meta: Any, limits: Limits) -> Shm:
    return Shm(stream=frame.stream, payload=plain_map(padded(meta, 1, 1)[0], "shm", limits))


_DECODERS: dict[int, Callable[[Frame, Any, Limits], Message]] = {
    Kind.HELLO: _hello,
    Kind.WELCOME: _welcome,
    Kind.AUTH: _auth,
    Kind.PING: _ping,
    Kind.PONG: _pong,
    Kind.GOAWAY: _goaway,
    Kind.CREDIT: _credit,
    Kind.REQ: _request,
    Kind.DATA: _data,
    Kind.CANCEL: _cancel,
    Kind.RESUME: _resume,
    Kind.RES: _result,
    Kind.EVT: _event,
    Kind.EVB: _event_batch,
    Kind.ERR: _failure,
    Kind.ACK: _ack,
    Kind.END: _end,
    Kind.SUBMIT: _submit,
    Kind.STEP: _step,
    Kind.HEARTBEAT: _heartbeat,
    Kind.DRAIN: _drain,
    Kind.LOAD: _load,
    Kind.SHM: _shm,
}
