"""Bytes to messages: every class comes back as it went, and nothing hostile comes through."""

from __future__ import annotations

import contextlib
import time
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorwire_protocol.codec import decode
from tensorwire_protocol.errors import BadMeta, BadTensor, TensorwireError
from tensorwire_protocol.frames import build_frame
from tensorwire_protocol.limits import CLIENT_LINK, WORKER_LINK, Limits
from tensorwire_protocol.messages import (
    EventBatch,
    Failure,
    Kind,
    Message,
    Request,
    Result,
)

from protocol.samples import EXAMPLES, KEY, STRATEGIES, cut, plain, request, wire

BY_KIND: dict[int, Message] = {int(m.KIND): m for m in EXAMPLES}
META_KINDS = [kind for kind in Kind if kind != Kind.DATA]


def read(kind: int, meta: bytes, *, aux: int = 0, limits: Limits = WORKER_LINK) -> Message:
    return decode(cut(build_frame(kind, 1, meta, aux=aux))[0], limits)


def read_fields(kind: int, meta: Any, *, limits: Limits = WORKER_LINK) -> Message:
    return read(kind, msgpack.packb(meta), limits=limits)


def example_fields(kind: int) -> Any:
    """Return a good meta of this kind, as plain values."""
    return msgpack.unpackb(cut(wire(BY_KIND[kind]))[0].meta)


@pytest.mark.parametrize("cls", STRATEGIES, ids=lambda cls: cls.__name__)
@given(data=st.data())
@settings(max_examples=25)
def test_every_message_comes_back_as_it_went(cls: type[Message], data: st.DataObject) -> None:
    message = data.draw(STRATEGIES[cls])
    (frame,) = cut(wire(message))
    assert plain(decode(frame, WORKER_LINK)) == plain(message)


@given(st.sampled_from(list(STRATEGIES)).flatmap(lambda cls: STRATEGIES[cls]), st.data())
def test_a_damaged_byte_never_raises_anything_but_an_error_of_ours(
    message: Message, data: st.DataObject
) -> None:
    damaged = bytearray(wire(message))
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at] = data.draw(st.integers(0, 255))
    try:
        for frame in cut(bytes(damaged)):
            if frame.kind in BY_KIND:
                decode(frame, WORKER_LINK)
    except TensorwireError:
        pass


# What each field may be, by position: a letter for each type it takes. n nil, b bool, i integer,
# f float, s string, y bytes, l list, m map.
FIELDS: dict[int, list[str]] = {
    Kind.HELLO: ["i", "l", "nm", "ns", "nm"],
    Kind.WELCOME: ["i", "l", "nm", "ns", "ny", "nm"],
    Kind.AUTH: ["nm"],
    Kind.GOAWAY: ["i", "ni", "nl"],
    Kind.REQ: ["s", "y", "ns", "nm", "nm", "ni", "ni", "ni", "ns"],
    Kind.CANCEL: ["s"],
    Kind.RESUME: ["y", "i", "ni", "ni"],
    Kind.RES: ["nm", "nm", "nm", "nm"],
    Kind.EVT: ["i", "l", "s", "nm"],
    Kind.EVB: ["l", "l", "nl", "l", "l", "nm"],
    Kind.ERR: ["s", "b", "s", "ni", "ns", "nm"],
    Kind.ACK: ["ni", "ny"],
    Kind.END: ["s", "i", "i", "nm", "nm", "nm"],
    Kind.SUBMIT: ["s", "y", "i", "ns", "nm", "nm", "ni", "ni", "ny", "ns"],
    Kind.STEP: ["l", "l", "l", "nl", "l", "l", "nm"],
    Kind.HEARTBEAT: ["s", "ni", "nm", "nm", "ns"],
    Kind.DRAIN: ["i"],
    Kind.LOAD: ["nm"],
    Kind.SHM: ["nm"],
}
WRONG: list[tuple[str, Any]] = [
    ("n", None),
    ("b", True),
    ("b", False),
    ("i", -1),
    ("i", 0),
    ("i", 2**64 - 1),
    ("f", 1.0),
    ("f", 0.0),
    ("s", ""),
    ("s", "x"),
    ("y", b""),
    ("y", b"xyz"),
    ("l", []),
    ("l", [None]),
    ("l", [[]]),
    ("m", {}),
    ("m", {"a": None}),
    ("t", msgpack.ExtType(1, msgpack.packb(["U8", [1], b"a"]))),
    ("t", msgpack.ExtType(5, b"")),
    ("t", msgpack.Timestamp(0)),
]


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: Kind(kind).name)
def test_a_field_of_the_wrong_type_is_refused(kind: int) -> None:
    good = example_fields(kind)
    assert len(good) == len(FIELDS[kind])
    for at, types in enumerate(FIELDS[kind]):
        for letter, value in WRONG:
            meta = [*good[:at], value, *good[at + 1 :]]
            if letter not in types:
                with pytest.raises((BadMeta, BadTensor)):
                    read_fields(kind, meta)
            elif letter == "n":
                read_fields(kind, meta)


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: Kind(kind).name)
def test_short_metas_are_refused_or_completed_and_long_ones_are_cut(kind: int) -> None:
    good = example_fields(kind)
    whole = plain(read_fields(kind, good))
    assert plain(read_fields(kind, [*good, "later", {"field": [1]}])) == whole
    for length in range(len(good)):
        try:
            read_fields(kind, good[:length])
        except BadMeta:
            continue
        # Optional fields left out are as if they were nil.
        padded = good[:length] + [None] * (len(good) - length)
        assert plain(read_fields(kind, good[:length])) == plain(read_fields(kind, padded))


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=12))
    | st.builds(
        lambda *parts: msgpack.ExtType(1, msgpack.packb(list(parts))),
        st.sampled_from(["U8", "F32", "BF16", "O"]),
        st.lists(st.integers(-1, 2**63), max_size=3),
        st.integers(-1, 3) | st.binary(max_size=8),
    )
    | st.just(msgpack.Timestamp(1, 2)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4) | st.binary(max_size=4), inner, max_size=3)
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("kind", META_KINDS)
@given(meta=ANYTHING, aux=st.sampled_from([0, 1, 65, 65535]))
@settings(max_examples=20)
def test_any_meta_gives_a_message_or_an_error_of_ours(kind: Kind, meta: Any, aux: int) -> None:
    with contextlib.suppress(BadMeta, BadTensor):
        decode(_frame(kind, msgpack.packb(meta), aux), CLIENT_LINK)


@pytest.mark.parametrize("kind", META_KINDS)
@given(data=st.data())
@settings(max_examples=20)
def test_any_fields_give_a_message_or_an_error_of_ours(kind: Kind, data: st.DataObject) -> None:
    good = example_fields(kind)
    meta = data.draw(ANYTHING)
    if isinstance(good, list):  # good fields with some replaced reach deeper than noise does
        meta = [data.draw(st.just(field) | ANYTHING) for field in good]
    with contextlib.suppress(BadMeta, BadTensor):
        decode(_frame(kind, msgpack.packb(meta), 0), CLIENT_LINK)


@pytest.mark.parametrize("kind", META_KINDS)
@given(meta=st.binary(max_size=40))
@settings(max_examples=15)
def test_any_bytes_give_a_message_or_an_error_of_ours(kind: Kind, meta: bytes) -> None:
    with contextlib.suppress(BadMeta, BadTensor):
        decode(_frame(kind, meta, 0), CLIENT_LINK)


def _frame(kind: int, meta: bytes, aux: int) -> Any:
    frame = cut(build_frame(kind, 1, meta))[0]
    frame.aux = aux
    return frame


@pytest.mark.parametrize("code", [c for c in range(-128, 128) if c != 1])
@pytest.mark.parametrize("kind", [Kind.REQ, Kind.EVT])
def test_every_ext_type_but_tensors_is_refused(kind: Kind, code: int) -> None:
    ext = bytes([0xD4, code & 0xFF, 0])  # fixext 1: not a length that timestamps have
    packed = [msgpack.packb(field) for field in example_fields(kind)]
    packed[3] = b"\x81\xa1a" + ext  # the inputs, or the extra
    with pytest.raises((BadMeta, BadTensor)):
        read(kind, bytes([0x90 + len(packed)]) + b"".join(packed))


@pytest.mark.parametrize("stamp", ["d6ff00000000", "d7ff0000000000000000", "c70cff" + "00" * 12])
@pytest.mark.parametrize("kind", [Kind.REQ, Kind.RES, Kind.SUBMIT, Kind.ERR, Kind.HELLO])
def test_timestamps_are_refused_in_every_form(kind: Kind, stamp: str) -> None:
    places = [i for i, types in enumerate(FIELDS[kind]) if "m" in types]
    for place in places:
        packed = [msgpack.packb(field) for field in example_fields(kind)]
        packed[place] = b"\x81\xa1a\x91" + bytes.fromhex(stamp)
        with pytest.raises(BadMeta):
            read(kind, bytes([0x90 + len(packed)]) + b"".join(packed))


def test_tensors_stand_in_inputs_and_outputs_only() -> None:
    tensor = msgpack.ExtType(1, msgpack.packb(["U8", [1], b"a"]))
    for kind, types in FIELDS.items():
        for place, letters in enumerate(types):
            if "m" not in letters:
                continue
            meta = example_fields(kind)
            meta[place] = {"a": [tensor]}
            slot = (kind, place) in ((Kind.REQ, 3), (Kind.SUBMIT, 4), (Kind.RES, 0))
            if slot:
                read_fields(kind, meta)
            else:
                with pytest.raises((BadTensor, BadMeta)):
                    read_fields(kind, meta)


@pytest.mark.parametrize("place", [3, 4])
@pytest.mark.parametrize(
    "packed_map",
    {
        "the same key twice": b"\x82\xa1a\x01\xa1a\x02",
        "the same key twice, deeper": b"\x81\xa1a\x91\x82\xa1b\xc0\xa1b\xc0",
        "an integer as key": b"\x81\x01\x01",
        "nil as key": b"\x81\xc0\x01",
        "bytes as key": b"\x81\xc4\x01a\x01",
        "a list as key": b"\x81\x90\x01",
        "an ext type as key": b"\x81\xd4\x01\x00\x01",
        "a key of 65 bytes": b"\x81\xd9\x41" + b"a" * 65 + b"\x01",
        "a key that is no UTF-8": b"\x81\xa1\xff\x01",
    }.items(),
    ids=lambda item: item[0] if isinstance(item, tuple) else str(item),
)
def test_keys_that_are_not_unique_short_strings_are_refused(
    place: int, packed_map: tuple[str, bytes]
) -> None:
    packed = [msgpack.packb(field) for field in example_fields(Kind.REQ)]
    packed[place] = packed_map[1]
    with pytest.raises((BadMeta, BadTensor)):
        read(Kind.REQ, b"\x99" + b"".join(packed))


@pytest.mark.parametrize("meta", ["", "c1", "9900", "99", "dd00000001", "dfffffffff", "a1"])
def test_a_meta_that_is_not_exactly_one_object_is_refused(meta: str) -> None:
    with pytest.raises(BadMeta):
        read(Kind.REQ, bytes.fromhex(meta))


def test_bytes_behind_the_object_are_refused() -> None:
    meta = bytes(cut(wire(request(1)))[0].meta)
    read(Kind.REQ, meta)
    with pytest.raises(BadMeta):
        read(Kind.REQ, meta + b"\xc0")


@pytest.mark.parametrize(("items", "fits"), [(4095, True), (4096, True), (4097, False)])
@pytest.mark.parametrize("kind_of", [list, dict])
def test_containers_have_a_largest_number_of_items(kind_of: type, items: int, fits: bool) -> None:
    value: Any = [0] * items if kind_of is list else {str(i): 0 for i in range(items)}
    meta = msgpack.packb(["embed", KEY, "m", {"a": value}])
    if fits:
        read(Kind.REQ, meta, limits=CLIENT_LINK)
    else:
        with pytest.raises(BadMeta):
            read(Kind.REQ, meta, limits=CLIENT_LINK)


@pytest.mark.parametrize("levels", [15, 16, 17, 500, 1023, 1024, 5000])
@pytest.mark.parametrize("place", [3, 4])
def test_nesting_has_a_largest_depth(place: int, levels: int) -> None:
    packed = [msgpack.packb(field) for field in example_fields(Kind.REQ)]
    packed[place] = b"\x81\xa1a" + b"\x91" * (levels - 2) + b"\xc0"  # the meta and the map count
    meta = b"\x99" + b"".join(packed)
    if levels <= 16:
        read(Kind.REQ, meta)
    else:
        with pytest.raises(BadMeta):
            read(Kind.REQ, meta)


@pytest.mark.parametrize(
    "bomb",
    {
        "empty maps": b"\xdc\x10\x00" + b"\x80" * 4096,
        "maps of empty maps": (b"\xdc\x00\x10" + (b"\xdc\x03\xe0" + b"\x80" * 992) * 16),
        "nested arrays that promise much": b"\xdc\x10\x00" * 1000,
        "nested long arrays that promise much": b"\xdd\x00\x00\x10\x00" * 3000,
        "nested maps that promise much": b"\xde\x10\x00\xa1a" * 1000,
        "nested arrays at the edge of what is looked at": b"\xdc\x01\xe0" * 155,
        "timestamps": b"\xdc\x08\x00" + b"\xd6\xff\x00\x00\x00\x00" * 2048,
    }.items(),
    ids=lambda item: item[0],
)
def test_bombs_cost_little_memory_and_time(bomb: tuple[str, bytes]) -> None:
    meta = b"\x99" + b"\xa1x\xc4\x10" + KEY + b"\xc0\x81\xa1a" + bomb[1]
    assert len(meta) <= CLIENT_LINK.client_meta_bytes + 600
    frame = cut(build_frame(Kind.REQ, 1, meta))[0]
    tracemalloc.start()
    try:
        with pytest.raises((BadMeta, BadTensor)):
            decode(frame, CLIENT_LINK)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 80 * len(meta) + 2**20
    began = time.process_time()
    with pytest.raises((BadMeta, BadTensor)):
        decode(frame, CLIENT_LINK)
    assert time.process_time() - began < 0.05  # 3 ms is the goal; machines of others are slower


def test_texts_and_bytes_that_look_like_large_containers_are_none() -> None:
    text = "\u0710\u07ff" * 1500  # each character begins with DC..DF
    noise = np.random.default_rng(1).bytes(8000)
    for value in (text, noise, b"\xdc\x10\x00" * 20, list(range(4096))):
        meta = example_fields(Kind.REQ)
        meta[3] = {"a": value}
        message = read_fields(Kind.REQ, meta, limits=CLIENT_LINK)
        assert isinstance(message, Request)
        assert message.inputs["a"] == value


def test_a_thousand_arrays_cannot_share_one_segment() -> None:
    tensor = msgpack.ExtType(1, msgpack.packb(["U8", [2000], 0]))
    good = wire(Request(stream=1, op="infer", key=KEY, inputs={"a": np.zeros(2000, np.uint8)}))
    (frame,) = cut(good)
    decode(frame, CLIENT_LINK)
    meta = msgpack.packb(["infer", KEY, "m", {"a": [tensor] * 2}])
    frame.meta = meta
    with pytest.raises(BadTensor, match="used by two"):
        decode(frame, CLIENT_LINK)


def test_large_arrays_arrive_aligned_and_writable() -> None:
    arrays = {str(i): np.full(1025 + i, i, np.uint8) for i in range(3)}
    message = decode(cut(wire(Result(stream=1, outputs=arrays)))[0], CLIENT_LINK)
    assert isinstance(message, Result)
    for name, array in message.outputs.items():
        np.testing.assert_array_equal(array, arrays[name])
        assert array.ctypes.data % 64 == 0
        assert array.flags.writeable


def test_numbers_that_are_not_finite_pass_where_they_do_no_harm() -> None:
    for place, value in ((4, {"temperature": float("nan")}), (3, {"x": float("inf")})):
        meta = example_fields(Kind.REQ)
        meta[place] = value
        assert isinstance(read_fields(Kind.REQ, meta), Request)  # the operation's checks refuse it


COLUMNS: dict[str, list[Any]] = {
    "fewer first indexes": [[1, 2], [0], None, [5, 6], ["a", "b"]],
    "fewer texts": [[1, 2], [0, 0], None, [5, 6], ["a"]],
    "fewer tokens than streams": [[1, 2], [0, 0], None, [5], ["a", "b"]],
    "fewer counts": [[1, 2], [0, 0], [2], [5, 6], ["a", "b"]],
    "counts that add up to another number": [[1, 2], [0, 0], [1, 2], [5, 6], ["a", "b"]],
    "a negative count": [[1, 2], [0, 0], [3, -1], [5, 6], ["a", "b"]],
    "a token of 33 bits": [[1], [0], None, [2**32], ["a"]],
    "a text that is bytes": [[1], [0], None, [5], [b"a"]],
}


@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS)
def test_columns_that_do_not_fit_one_another_are_refused(columns: list[Any]) -> None:
    with pytest.raises(BadMeta):
        read_fields(Kind.EVB, columns)
    with pytest.raises(BadMeta):
        read_fields(Kind.STEP, [columns[0], [1] * len(columns[0]), *columns[1:]])


def test_columns_with_counts_hold_that_many_tokens() -> None:
    batch = read_fields(Kind.EVB, [[1, 2], [0, 9], [0, 2], [5, 6], ["", "ab"]])
    assert isinstance(batch, EventBatch)
    assert (batch.counts, batch.tokens) == ([0, 2], [5, 6])


def test_attempts_stand_for_each_stream() -> None:
    with pytest.raises(BadMeta, match="attempts"):
        read_fields(Kind.STEP, [[1], [1, 1], [0], None, [5], ["a"]])


@pytest.mark.parametrize(
    ("kind", "place", "values"),
    [
        (Kind.ERR, 2, ["perhaps", "", "NO", None, [], {}, 1]),
        (Kind.END, 0, ["done", "", None, [], {}]),
        (Kind.REQ, 1, [bytes(15), bytes(17), b"", KEY.hex()]),
        (Kind.REQ, 7, [-101, 101]),
        (Kind.SUBMIT, 2, [0, -1]),
        (Kind.SUBMIT, 8, [b"abc", b"abcde"]),
        (Kind.ACK, 1, [b"abc"]),
        (Kind.END, 3, [{"n": "1"}, {"n": None}, {"n": True}, {"n": [1]}]),
        (Kind.RES, 2, [{"n": "1"}, {"n": b"1"}]),
        (Kind.HELLO, 1, [[1], [None], [b"a"]]),
    ],
)
def test_values_out_of_their_range_are_refused(kind: Kind, place: int, values: list[Any]) -> None:
    for value in values:
        meta = example_fields(kind)
        meta[place] = value
        with pytest.raises(BadMeta):
            read_fields(kind, meta)


@pytest.mark.parametrize("payload", [b"1234567", b"123456789", b"", "12345678", 1, None, [1]])
@pytest.mark.parametrize("kind", [Kind.PING, Kind.PONG])
def test_pings_carry_eight_bytes(kind: Kind, payload: Any) -> None:
    with pytest.raises(BadMeta):
        read_fields(kind, payload)


@pytest.mark.parametrize("amount", [0, -1, 2**32, None, 1.0, "1", True])
def test_credit_is_a_number_above_0(amount: Any) -> None:
    with pytest.raises(BadMeta):
        read_fields(Kind.CREDIT, amount)


def test_numbers_of_the_header_reach_the_message() -> None:
    failure = read(Kind.ERR, msgpack.packb(["m", True, "no"]), aux=0x0301)
    assert isinstance(failure, Failure)
    assert (failure.code, failure.stream) == (0x0301, 1)
