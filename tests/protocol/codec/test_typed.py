"""The msgspec codec beside the plain one: the same messages, the same refusals, the same bytes."""

from __future__ import annotations

import contextlib
from typing import Any

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorwire_protocol.codec import PLAIN
from tensorwire_protocol.codec.typed import PACKING, TYPED, extended, opened
from tensorwire_protocol.errors import BadMeta, TensorwireError
from tensorwire_protocol.frames import build_frame
from tensorwire_protocol.limits import CLIENT_LINK, WORKER_LINK
from tensorwire_protocol.messages import (
    Kind,
    Message,
    Packed,
    PackedResult,
    Request,
    Result,
    Submit,
)

from protocol.samples import KEY, STRATEGIES, cut, plain, wire

any_message = st.sampled_from(list(STRATEGIES)).flatmap(lambda cls: STRATEGIES[cls])


def outcome(codec: Any, data: bytes) -> Any:
    """Return what a codec makes of one frame, or the name of its error."""
    (frame,) = cut(data)
    try:
        return plain(codec.decode(frame, WORKER_LINK))
    except TensorwireError as error:
        return type(error)


@given(any_message)
def test_both_write_what_both_read_alike(message: Message) -> None:
    for data in (wire(message), b"".join(TYPED.encode(message, WORKER_LINK))):
        assert repr(outcome(TYPED, data)) == repr(outcome(PLAIN, data)) == repr(plain(message))


@given(any_message, st.data())
@settings(max_examples=300)
def test_a_damaged_byte_is_taken_alike(message: Message, data: st.DataObject) -> None:
    damaged = bytearray(wire(message))
    meta_from = len(damaged) - len(cut(bytes(damaged))[0].meta)
    if meta_from < len(damaged):
        at = data.draw(st.integers(meta_from, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(TensorwireError):
        cut(bytes(damaged))
        expected, found = outcome(PLAIN, bytes(damaged)), outcome(TYPED, bytes(damaged))
        assert repr(found) == repr(expected)


TWICE = b"\x82\xa1a\x01\xa1a\x02"


@pytest.mark.parametrize(
    "fields",
    [
        [b"\x80", TWICE, b"\x80", b"\x80"],
        [b"\x80", b"\x80", TWICE, b"\x80"],
        [TWICE, b"\x80", b"\x80", b"\x80"],
        [b"\x81\xa1a" + TWICE, b"\x80", b"\x80", b"\x80"],
    ],
)
def test_a_key_twice_is_refused_wherever_it_is(fields: list[bytes]) -> None:
    frame = build_frame(Kind.RES, 1, b"\x94" + b"".join(fields))
    assert outcome(TYPED, frame) is outcome(PLAIN, frame) is BadMeta


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize(
    ("key", "is_taken"), [("x" * 64, True), ("x" * 65, False), ("é" * 33, False)]
)
def test_a_long_key_is_taken_alike_wherever_it_is(at: int, key: str, is_taken: bool) -> None:
    fields: list[dict[str, int]] = [{}, {}, {}, {}]
    fields[at] = {key: 1}
    frame = build_frame(Kind.RES, 1, msgpack.packb(fields))
    found = outcome(TYPED, frame)
    assert repr(found) == repr(outcome(PLAIN, frame))
    assert (found is not BadMeta) == is_taken


@pytest.mark.parametrize("part", ["usage", "timings", "extra"])
def test_what_msgspec_alone_could_write_is_refused_behind_values_that_go(part: str) -> None:
    maps: dict[str, Any] = {part: {"plain": 1, "set": {1, 2}}}
    message = Result(1, {}, **maps)
    with pytest.raises(BadMeta):
        TYPED.encode(message, WORKER_LINK)


@pytest.mark.parametrize("value", [{1, 2}, 1 + 2j, object(), b"x" * 3, (1, 2), np.float32(1.5)])
def test_a_value_of_python_goes_or_is_refused_alike(value: Any) -> None:
    """msgspec would write sets and dates; they have no place on the wire."""
    message = Request(stream=1, op="infer", key=KEY, inputs={"x": value}, params={"y": value})

    def written(codec: Any) -> Any:
        try:
            return b"".join(codec.encode(message, CLIENT_LINK))
        except TensorwireError as error:
            return type(error)

    assert written(TYPED) == written(PLAIN)


# -- unopened -------------------------------------------------------------------------------------


@given(STRATEGIES[Request])
def test_what_a_gateway_passes_on_reaches_the_worker_as_the_client_meant_it(
    request: Request,
) -> None:
    scratch = bytearray(wire(request))
    (frame,) = cut(bytes(scratch))
    passing = PACKING.decode(frame, WORKER_LINK)
    assert isinstance(passing, Request)
    scratch[:] = bytes(len(scratch))  # the next read uses the memory again
    submit = Submit(stream=7, op=passing.op, key=KEY, attempt=1, inputs=passing.inputs)
    (frame,) = cut(b"".join(PACKING.encode(submit, WORKER_LINK)))
    heard = TYPED.decode(frame, WORKER_LINK)
    assert isinstance(heard, Submit)
    assert repr(
        plain(heard)["inputs"] if isinstance(plain(heard), dict) else plain(heard)[1]["inputs"]
    ) == repr(plain(request)[1]["inputs"])


@pytest.mark.parametrize("params", [{"stop": ["a", "b"]}, {"x": {"y": [1, None]}}, {"wait": True}])
def test_options_of_any_shape_go_through_a_gateway(params: dict[str, Any]) -> None:
    unopened = Packed(msgspec.Raw(b"\x81\xa1a\x01"), [])
    for message in (
        Submit(stream=1, op="generate", key=KEY, attempt=1, inputs=unopened, params=params),
        Request(stream=1, op="generate", key=KEY, inputs=unopened, params=params),
    ):
        (frame,) = cut(b"".join(PACKING.encode(message, WORKER_LINK)))
        heard = TYPED.decode(frame, WORKER_LINK)
        assert isinstance(heard, Submit | Request)
        assert (heard.inputs, heard.params) == ({"a": 1}, params)


@given(STRATEGIES[Result])
def test_a_result_goes_through_a_gateway_unchanged_but_for_what_is_added(result: Result) -> None:
    (frame,) = cut(wire(result))
    passing = PACKING.decode(frame, WORKER_LINK)
    assert isinstance(passing, PackedResult)
    (frame,) = cut(b"".join(PACKING.encode(passing, WORKER_LINK)))
    assert repr(plain(TYPED.decode(frame, WORKER_LINK))) == repr(plain(result))


@pytest.mark.parametrize("num_before", [0, 1, 13, 14, 15, 16, 20])
def test_an_unopened_map_is_extended(num_before: int) -> None:
    before = {f"n{i}": float(i) for i in range(num_before)}
    more = {"x": 1.5, "y": 2.5}
    raw = extended(msgspec.Raw(msgpack.packb(before)), more)
    assert msgpack.unpackb(bytes(raw)) == before | more
    assert opened(raw) == before | more


@pytest.mark.parametrize(
    "meta", [b"\x93\xa1x", b"\x92\x01\x02", b"\x91" * 3000, b"\xdd\xff\xff\xff\xff"]
)
def test_an_unopened_request_must_have_the_shape_of_one(meta: bytes) -> None:
    (frame,) = cut(build_frame(Kind.REQ, 1, meta))
    with pytest.raises(BadMeta):
        PACKING.decode(frame, WORKER_LINK)
