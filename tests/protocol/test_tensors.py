"""Arrays: descriptors, alignment, and everything a hostile descriptor may claim."""

from __future__ import annotations

import importlib
import types
import zlib
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorwire_protocol import tensors
from tensorwire_protocol.errors import BadTensor
from tensorwire_protocol.limits import CLIENT_LINK, Limits
from tensorwire_protocol.tensors import (
    RawTensor,
    TensorSink,
    TensorSource,
    aligned_buffer,
    describe,
    ids_checksum,
    pack_ids,
    padding,
    unpack_ids,
)

from .samples import ARRAY, TOKENS, plain

if TYPE_CHECKING:
    from numpy.typing import NDArray

NAMES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
    "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
RAW_NAMES = {"BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1"}


def sent(value: Any, *, inline_bytes: int = 1024) -> tuple[bytes, list[memoryview]]:
    """Return an array's descriptor, and the segments beside it."""
    sink = TensorSink(inline_bytes)
    return sink.default(value).data, sink.segments


def received(
    descriptor: bytes, segments: list[memoryview] | None = None, limits: Limits = CLIENT_LINK
) -> NDArray[Any] | RawTensor:
    return TensorSource(segments or [], limits).ext_hook(1, descriptor)


def claimed(name: Any, shape: Any, ref: Any, segment: bytes = b"") -> NDArray[Any] | RawTensor:
    """Receive a descriptor that says this, beside one segment."""
    return received(msgpack.packb([name, shape, ref]), [memoryview(segment)])


def test_a_descriptor_is_dtype_shape_and_bytes_while_they_are_few() -> None:
    descriptor, segments = sent(np.array([[1, 2]], dtype=np.int16))
    assert descriptor.hex() == "93a3493136920102c40401000200"
    assert segments == []


def test_a_descriptor_names_a_segment_when_the_bytes_are_many() -> None:
    descriptor, segments = sent(np.zeros(257, dtype=np.float32))
    assert descriptor.hex() == "93a346333291cd010100"
    assert [len(s) for s in segments] == [1028]


@pytest.mark.parametrize(("size", "num_segments"), [(1023, 0), (1024, 0), (1025, 1)])
def test_arrays_above_the_inline_limit_become_segments(size: int, num_segments: int) -> None:
    assert len(sent(np.zeros(size, np.uint8))[1]) == num_segments


@pytest.mark.parametrize(("name", "dtype"), NAMES.items(), ids=NAMES)
@pytest.mark.parametrize("inline_bytes", [0, 1024])
def test_every_dtype_comes_back_as_it_went(name: str, dtype: str, inline_bytes: int) -> None:
    value = np.arange(6).reshape(2, 3).astype(dtype)
    descriptor, segments = sent(value, inline_bytes=inline_bytes)
    assert msgpack.unpackb(descriptor)[0] == name
    assert plain(received(descriptor, segments)) == plain(value)


@given(ARRAY, st.sampled_from([0, 1024]))
def test_any_array_comes_back_as_it_went(value: NDArray[Any], inline_bytes: int) -> None:
    descriptor, segments = sent(value, inline_bytes=inline_bytes)
    assert plain(received(descriptor, segments)) == plain(value)


@pytest.mark.parametrize(
    "value",
    [
        np.arange(24).reshape(4, 6)[::2, ::-1],
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.broadcast_to(np.float32(3), (2, 3)),
        np.arange(4, dtype=">i4"),
        np.arange(4, dtype=">f8").reshape(2, 2).T,
        np.array(7, dtype=">i2"),
        np.array([], dtype=np.float32),
        np.zeros((0, 3), np.int64),
        np.zeros((3, 0), np.int64),
        np.array([1], dtype=np.longlong),
    ],
    ids=lambda value: f"{value.dtype.str}{value.shape}{value.strides}",
)
@pytest.mark.parametrize("inline_bytes", [0, 1024])
def test_values_and_shape_survive_any_memory_layout(value: NDArray[Any], inline_bytes: int) -> None:
    descriptor, segments = sent(value, inline_bytes=inline_bytes)
    back = received(descriptor, segments)
    assert isinstance(back, np.ndarray)
    assert back.shape == value.shape
    assert back.dtype.itemsize == value.dtype.itemsize
    np.testing.assert_array_equal(back, value)


def test_numpy_scalars_travel_as_arrays_without_dimensions() -> None:
    back = received(sent(np.float32(1.5))[0])
    assert isinstance(back, np.ndarray)
    assert (back.shape, float(back)) == ((), 1.5)


@pytest.mark.parametrize("name", RAW_NAMES)
@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 2)])
def test_dtypes_that_numpy_lacks_travel_as_their_bits(name: str, shape: tuple[int, ...]) -> None:
    value = RawTensor(name, np.ones(shape, dtype=RAW_NAMES[name]))
    descriptor, segments = sent(value)
    assert msgpack.unpackb(descriptor)[:2] == [name, list(shape)]
    back = tensors._extended(name, np.ones(shape, dtype=RAW_NAMES[name]))
    if isinstance(back, RawTensor):  # ml_dtypes is not installed
        assert plain(received(descriptor, segments)) == plain(value)


@pytest.mark.parametrize("name", RAW_NAMES)
def test_dtypes_that_numpy_lacks_are_viewed_where_ml_dtypes_is_there(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = types.SimpleNamespace(
        bfloat16=np.dtype("<i2"), float8_e4m3fn=np.dtype("i1"), float8_e5m2=np.dtype("i1")
    )
    monkeypatch.setattr(importlib, "import_module", lambda _: stand_in)
    bits = np.ones(3, dtype=RAW_NAMES[name])
    back = received(sent(RawTensor(name, bits))[0])
    assert isinstance(back, np.ndarray)
    assert back.dtype.kind == "i"
    assert back.tobytes() == bits.tobytes()


def test_dtypes_of_ml_dtypes_have_names_on_the_wire() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    value = np.array([1.5, -2], dtype=ml_dtypes.bfloat16)
    assert describe(value)[0] == "BF16"
    assert plain(received(sent(value)[0])) == plain(value)


@pytest.mark.parametrize(
    "value",
    [
        np.array([object()]),
        np.array(["a"]),
        np.array([b"a"]),
        np.array([1j]),
        np.array(["2020-01-01"], dtype="datetime64[D]"),
        np.zeros(1, dtype=[("a", "i4")]),
        np.zeros(1, dtype=np.longdouble),
        RawTensor("F32", np.zeros(1, np.uint32)),
        RawTensor("BF16", np.zeros(1, np.uint8)),
        RawTensor("BF16", np.zeros(1, ">u2")),
    ],
    ids=repr,
)
def test_arrays_without_a_name_on_the_wire_are_refused(value: Any) -> None:
    with pytest.raises(BadTensor):
        sent(value)


def test_what_is_no_array_is_not_sent_as_one() -> None:
    with pytest.raises(TypeError, match="set cannot be sent"):
        TensorSink(1024).default({1})


HOSTILE: dict[str, tuple[Any, Any, Any]] = {
    "a negative dimension": ("U8", [-1, -8], 0),
    "a dimension that is no integer": ("U8", [8.0], 0),
    "a boolean dimension": ("U8", [True, 8], 0),
    "a shape that is a number": ("U8", 8, 0),
    "a shape that is bytes": ("U8", b"\x08", 0),
    "too few bytes": ("U8", [9], 0),
    "too many bytes": ("U8", [7], 0),
    "items wider than the bytes": ("F64", [2], 0),
    "a product that is 0 in 64 bits": ("U8", [2**32, 2**32], 0),
    "a product that is 8 in 64 bits": ("U8", [2**63, 2, 8], 0),
    "a product in bytes that is 8 in 64 bits": ("F64", [2**61 + 1], 0),
    "no bytes, and a dimension beyond arrays": ("U8", [0, 2**63], b""),
    "no bytes, and a product beyond arrays": ("U8", [0, 2**62, 2**62], b""),
    "17 dimensions": ("U8", [8] + [1] * 16, 0),
    "an unknown dtype": ("F128", [8], 0),
    "an object dtype": ("O", [1], 0),
    "numpy's name for a dtype": ("<f4", [2], 0),
    "a dtype that is bytes": (b"U8", [8], 0),
    "a dtype that is a list": (["U8"], [8], 0),
    "a segment that is not there": ("U8", [8], 1),
    "a segment before the first": ("U8", [8], -1),
    "a ref that is a boolean": ("U8", [8], False),
    "a ref that is nil": ("U8", [8], None),
    "a ref that is text": ("U8", [8], "00000000"),
    "a sparse ref": ("U8", [8], [0, 0]),
    "a ref that is a map": ("U8", [8], {"indices": 0, "values": 0}),
}


@pytest.mark.parametrize(("name", "shape", "ref"), HOSTILE.values(), ids=HOSTILE)
def test_a_descriptor_that_lies_is_refused(name: Any, shape: Any, ref: Any) -> None:
    with pytest.raises(BadTensor):
        claimed(name, shape, ref, bytes(8))


@pytest.mark.parametrize(
    "descriptor",
    [
        b"",
        b"\xc1",
        b"\xc0",
        b"\x90",
        b"\x93",
        b"\xdd\xff\xff\xff\xff",
        msgpack.packb(["U8", [1]]),
        msgpack.packb(["U8", [1], b"a", None]),
        msgpack.packb(["U8", [1], b"a"]) + b"\0",
        msgpack.packb(["U8", [1], msgpack.ExtType(1, b"")]),
        msgpack.packb(["U8", [1], msgpack.Timestamp(0)]),
    ],
    ids=bytes.hex,
)
def test_a_descriptor_that_is_none_is_refused(descriptor: bytes) -> None:
    with pytest.raises(BadTensor):
        received(descriptor)


@pytest.mark.parametrize("code", [code for code in range(128) if code != 1])
def test_every_other_ext_type_is_refused(code: int) -> None:
    with pytest.raises(BadTensor, match=f"ext type {code} "):
        TensorSource([], CLIENT_LINK).ext_hook(code, b"")


@pytest.mark.parametrize(("size", "fits"), [(1023, True), (1024, True), (1025, False)])
def test_inline_bytes_have_a_limit(size: int, fits: bool) -> None:
    if fits:
        claimed("U8", [size], bytes(size))
    else:
        with pytest.raises(BadTensor, match="1024 bytes"):
            claimed("U8", [size], bytes(size))


def test_sixteen_dimensions_are_allowed() -> None:
    back = claimed("U8", [1] * 16, b"a")
    assert isinstance(back, np.ndarray)
    assert back.ndim == 16


def test_a_segment_belongs_to_one_tensor() -> None:
    source = TensorSource([memoryview(bytes(8))], CLIENT_LINK)
    descriptor = msgpack.packb(["U8", [8], 0])
    source.ext_hook(1, descriptor)
    with pytest.raises(BadTensor, match="used by two"):
        source.ext_hook(1, descriptor)


def test_a_received_array_is_a_view_of_its_segment() -> None:
    segment = aligned_buffer(8)
    back = received(msgpack.packb(["U8", [8], 0]), [segment])
    assert isinstance(back, np.ndarray)
    segment[3] = 77
    assert back[3] == 77


@pytest.mark.parametrize("inline_bytes", [0, 1024])
def test_received_arrays_may_be_written_to(inline_bytes: int) -> None:
    descriptor, segments = sent(np.zeros(4, np.uint8), inline_bytes=inline_bytes)
    back = received(descriptor, [memoryview(bytearray(s)) for s in segments])
    assert isinstance(back, np.ndarray)
    assert back.flags.writeable


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 4096])
def test_buffers_begin_at_multiples_of_64(size: int) -> None:
    buffer = aligned_buffer(size)
    assert len(buffer) == size
    assert np.frombuffer(buffer, np.uint8).ctypes.data % 64 == 0 or size == 0


@pytest.mark.parametrize(("offset", "pad"), [(0, 0), (1, 63), (63, 1), (64, 0), (65, 63)])
def test_padding_reaches_the_next_multiple_of_64(offset: int, pad: int) -> None:
    assert padding(offset) == pad


def test_token_ids_are_little_endian_int32() -> None:
    assert pack_ids([1, 300, -1]).hex() == "010000002c010000ffffffff"


@given(TOKENS)
def test_token_ids_come_back_as_they_went(ids: list[int]) -> None:
    assert unpack_ids(pack_ids(ids)) == ids
    assert ids_checksum(ids) == zlib.crc32(pack_ids(ids))


@pytest.mark.parametrize("wrong", [[2**31], [-(2**31) - 1], [1.5], ["a"], [None]])
def test_token_ids_beyond_32_bits_are_refused(wrong: list[Any]) -> None:
    with pytest.raises((OverflowError, TypeError)):
        pack_ids(wrong)
