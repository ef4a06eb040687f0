"""Golden frames with tensors, right and wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
from tensorwire_protocol.errors import ErrorCode
from tensorwire_protocol.messages import (
    Kind,
    Result,
)
from tensorwire_protocol.tensors import RawTensor
from vectors.making.building import (
    DOWN,
    STREAM,
    UP,
    Vector,
    bad,
    ext,
    fields_of,
    frame,
    framing,
    good,
    meta_with,
    pack,
    request,
    segmented,
    splice,
    tensor,
)

BAD = ErrorCode.BAD_META
ARRAYS: dict[str, Any] = {
    "F64": np.array([1.5, -0.0, np.inf], "<f8"),
    "F32": np.array([1.5, -0.0, 1e-45], "<f4"),
    "F16": np.array([1.5, 65504, -0.0], "<f2"),
    "BF16": RawTensor("BF16", np.array([0x3FC0, 0x8000], "<u2")),
    "F8_E4M3": RawTensor("F8_E4M3", np.array([0x3C, 0x80, 0x7E], "u1")),
    "F8_E5M2": RawTensor("F8_E5M2", np.array([0x3E, 0x80, 0x7B], "u1")),
    "I64": np.array([-(2**63), 2**63 - 1], "<i8"),
    "I32": np.array([-(2**31), 2**31 - 1], "<i4"),
    "I16": np.array([-(2**15), 2**15 - 1], "<i2"),
    "I8": np.array([-128, 127, 0], "i1"),
    "U64": np.array([0, 2**64 - 1], "<u8"),
    "U32": np.array([0, 2**32 - 1], "<u4"),
    "U16": np.array([0, 2**16 - 1], "<u2"),
    "U8": np.array([0, 255, 7], "u1"),
    "BOOL": np.array([True, False, True], "?"),
}


def tensors() -> list[Vector]:
    def one(name: str, value: Any, segments: list[bytes] | None = None) -> Vector:
        """Return a REQ with one input that is no tensor we could send."""
        meta = meta_with(inputs={"x": value})
        data = segmented(Kind.REQ, meta, segments or []) if segments else _framed(meta)
        return bad(f"tensor: {name}", UP, data, ErrorCode.BAD_TENSOR, STREAM)

    one_byte = tensor("U8", [1], b"x")
    matrix = np.arange(6, dtype="<i2").reshape(2, 3)
    return [
        *[
            good(f"tensor: inline {name}", UP, request(inputs={"x": value}))
            for name, value in ARRAYS.items()
        ],
        *[
            good(
                f"tensor: {name} in a segment",
                DOWN,
                Result(stream=1, outputs={"x": value}),
                inline_bytes=0,
            )
            for name, value in ARRAYS.items()
        ],
        good("tensor: no dimensions", UP, request(inputs={"x": np.array(2.5, "<f4")})),
        good("tensor: no elements", UP, request(inputs={"x": np.zeros((2, 0, 3), "<f4")})),
        good(
            "tensor: no elements, in a segment",
            UP,
            request(inputs={"x": np.zeros((0,), "<f4")}),
            segmented(Kind.REQ, meta_with(inputs={"x": tensor("F32", [0], 0)}), [b""]),
        ),
        good("tensor: a matrix is written row by row", UP, request(inputs={"x": matrix})),
        good(
            "tensor: in lists and maps",
            UP,
            request(inputs={"x": [matrix, {"y": matrix}], "z": "text"}),
        ),
        good(
            "tensor: three segments, inline and plain values between",
            DOWN,
            Result(
                stream=2,
                outputs={
                    "a": np.arange(9, dtype="u1"),
                    "b": np.arange(1, dtype="u1"),
                    "c": [np.arange(70, dtype="u1"), 5],
                    "d": np.arange(3, dtype="<u4"),
                },
            ),
            inline_bytes=4,
        ),
        good(
            "tensor: a segment that ends where the next may begin",
            UP,
            request(inputs={"a": np.arange(64, dtype="u1"), "b": np.arange(128, dtype="u1")}),
            inline_bytes=8,
        ),
        good(
            "tensor: a small one in a segment",
            UP,
            request(inputs={"x": matrix}),
            segmented(
                Kind.REQ, meta_with(inputs={"x": tensor("I16", [2, 3], 0)}), [matrix.tobytes()]
            ),
        ),
        good(
            "tensor: segments in any order",
            UP,
            request(inputs={"a": np.array([1], "u1"), "b": np.array([2], "u1")}),
            segmented(
                Kind.REQ,
                meta_with(inputs={"a": tensor("U8", [1], 1), "b": tensor("U8", [1], 0)}),
                [b"\2", b"\1"],
            ),
        ),
        good(
            "tensor: a segment that nobody names",
            UP,
            request(),
            segmented(Kind.REQ, pack(fields_of()), [b"abc"]),
        ),
        good("tensor: 16 dimensions", UP, request(inputs={"x": np.ones((1,) * 16, "u1")})),
        one("17 dimensions", tensor("U8", [1] * 17, b"x")),
        one("an unknown dtype", tensor("C64", [1], bytes(8))),
        one("a dtype in lower case", tensor("f32", [1], bytes(4))),
        one("a dtype of bytes", tensor(b"U8", [1], b"x")),
        one("no dtype", tensor(None, [1], b"x")),
        one("a shape that is a number", tensor("U8", 1, b"x")),
        one("a dimension below 0", tensor("U8", [-1], b"x")),
        one("a dimension with a fraction", tensor("U8", [1.0], b"x")),
        one("a dimension that is true", tensor("U8", [True], b"x")),
        one("fewer bytes than the shape needs", tensor("F32", [2], bytes(7))),
        one("more bytes than the shape needs", tensor("F32", [2], bytes(9))),
        one("a product of 2**64", tensor("U8", [2**32, 2**32], b"")),
        one("a product that wraps to what came", tensor("U8", [2**63, 2], b"")),
        good(
            "tensor: no elements, many columns",
            UP,
            request(inputs={"x": np.zeros((0, 2**40), "u1")}),
        ),
        one("no elements, 2**63 columns", tensor("U8", [0, 2**63], b"")),
        one("no elements, 2**62 columns of 2 bytes", tensor("F16", [0, 2**62], b"")),
        one(
            "no elements, 2**80 of them in the other dimensions",
            tensor("U8", [0, 2**40, 2**40], b""),
        ),
        one("a ref that is nil", tensor("U8", [1], None)),
        one("a ref that is text", tensor("U8", [1], "x")),
        one("a ref with a fraction", tensor("U8", [1], 0.0), [b"x"]),
        one("a ref below 0", tensor("U8", [1], -1), [b"x"]),
        one("a ref beyond the segments", tensor("U8", [1], 1), [b"x"]),
        one("a ref without segments", tensor("U8", [1], 0)),
        one("a segment used twice", [tensor("U8", [1], 0), tensor("U8", [1], 0)], [b"x"]),
        one("a segment shorter than its shape", tensor("U8", [4], 0), [b"abc"]),
        one("a descriptor of two fields", ext(1, pack(["U8", [1]]))),
        one("a descriptor of four fields", ext(1, pack(["U8", [1], b"x", 0]))),
        one("a descriptor that is a map", ext(1, pack({"dtype": "U8"}))),
        one("an empty descriptor", ext(1, b"")),
        one("a descriptor that is no msgpack", ext(1, b"\xc1")),
        one("a descriptor with bytes behind it", ext(1, pack(["U8", [1], b"x"]) + b"\0")),
        one("another ext type", ext(5, b"x")),
        one("ext type 0", ext(0, b"x")),
        one("ext type 127", ext(127, bytes(16))),
        one("ext type -2", ext(-2, b"x")),
        bad(
            "tensor: in the params",
            UP,
            _framed(meta_with(params={"x": one_byte})),
            ErrorCode.BAD_TENSOR,
            STREAM,
        ),
        bad(
            "tensor: deep in the params",
            UP,
            _framed(meta_with(params={"x": [{"y": one_byte}]})),
            ErrorCode.BAD_TENSOR,
            STREAM,
        ),
        bad("tensor: instead of the model", UP, _framed(meta_with(model=one_byte)), BAD, STREAM),
        bad(
            "ext: another type instead of the model",
            UP,
            _framed(meta_with(model=ext(5, b"\0"))),
            ErrorCode.BAD_TENSOR,
            STREAM,
        ),
        bad("tensor: instead of the inputs", UP, _framed(meta_with(inputs=one_byte)), BAD, STREAM),
        framing(
            "tensor: a bad one in an answer",
            DOWN,
            frame(Kind.RES, splice([{"x": tensor("U8", [2], b"x")}]), stream=1),
        ),
        framing(
            "tensor: another ext type in an event",
            DOWN,
            frame(Kind.EVT, splice([0, [5], ext(5, b"x")]), stream=1),
        ),
        framing("tensor: in a greeting", UP, frame(Kind.HELLO, splice([1, [], {"x": one_byte}]))),
    ]


def _framed(meta: bytes) -> bytes:
    return frame(Kind.REQ, meta, stream=1)
