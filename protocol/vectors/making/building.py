"""How a golden frame is written down, right or wrong in any of its numbers."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import msgpack
from tensorwire_protocol.codec import encode
from tensorwire_protocol.errors import ErrorCode
from tensorwire_protocol.frames import HEADER
from tensorwire_protocol.limits import WORKER_LINK
from tensorwire_protocol.messages import (
    Kind,
    Message,
    Request,
)
from tensorwire_protocol.tensors import padding
from vectors.tagged import tagged

Vector = dict[str, Any]

KEY = bytes(range(16))
UP, DOWN = "c>s", "s>c"
TO_WORKER, FROM_WORKER = "g>w", "w>g"
CONNECTION, STREAM = "connection", "stream"
# Kinds that are heard only where their feature was negotiated, or not yet at all.
FEATURES = {
    Kind.AUTH: "auth", Kind.RESUME: "resume", Kind.DATA: "body", Kind.CREDIT: "credit",
    Kind.LOAD: "reserved", Kind.SHM: "shm",
}  # fmt: skip


def pack(value: Any) -> bytes:
    """Return plain msgpack, shortest forms."""
    packed: bytes = msgpack.packb(value)
    return packed


def frame(
    kind: int,
    meta: bytes,
    *,
    stream: int = 0,
    flags: int = 0,
    aux: int = 0,
    rest: bytes = b"",
    body_len: int | None = None,
    meta_len: int | None = None,
    table: bytes = b"",
) -> bytes:
    """Return a frame of any numbers, right or wrong."""
    body = table + meta + rest
    header = HEADER.pack(
        len(body) if body_len is None else body_len,
        kind,
        flags,
        aux,
        stream,
        len(meta) if meta_len is None else meta_len,
    )
    return header + body


def segmented(kind: int, meta: bytes, segments: list[bytes], *, stream: int = 1) -> bytes:
    """Return a frame with segments, aligned as they must be."""
    table = b"".join(struct.pack("<Q", len(segment)) for segment in segments)
    at = HEADER.size + len(table) + len(meta)
    rest = b""
    for segment in segments:
        rest += bytes(padding(at + len(rest))) + segment
    return frame(kind, meta, stream=stream, aux=len(segments), table=table, rest=rest)


def good(
    name: str,
    direction: str,
    message: Message | list[Message],
    data: bytes | None = None,
    /,
    **limits: int,
) -> Vector:
    """Return a vector that decodes to `message`; its bytes are ours unless others are given."""
    messages = message if isinstance(message, list) else [message]
    if data is None:
        sent = b"".join(b"".join(encode(m, replace(WORKER_LINK, **limits))) for m in messages)
    else:
        sent = data
    vector: Vector = {"name": name, "direction": direction, "hex": sent.hex()}
    if limits:
        vector["limits"] = limits
    if messages and messages[0].KIND in FEATURES:
        vector["feature"] = FEATURES[messages[0].KIND]
    if data is not None:
        vector["encode"] = False  # another encoder may well write it shorter
    return vector | {"ok": [tagged(m) for m in messages]}


def bad(
    name: str, direction: str, data: bytes, code: ErrorCode, scope: str, **limits: int
) -> Vector:
    """Return a vector that must be refused."""
    vector: Vector = {"name": name, "direction": direction, "hex": data.hex()}
    if limits:
        vector["limits"] = limits
    if code != ErrorCode.UNKNOWN_KIND and data[4] in FEATURES:
        vector["feature"] = FEATURES[Kind(data[4])]
    return vector | {"err": {"code": int(code), "name": code.name, "scope": scope}}


def framing(name: str, direction: str, data: bytes, **limits: int) -> Vector:
    """Return a vector that ends the connection with FRAMING."""
    return bad(name, direction, data, ErrorCode.FRAMING, CONNECTION, **limits)


def refused(name: str, meta: bytes, code: ErrorCode = ErrorCode.BAD_META, **limits: int) -> Vector:
    """Return a REQ whose meta fails that request alone."""
    return bad(name, UP, frame(Kind.REQ, meta, stream=1), code, STREAM, **limits)


def request(**changes: Any) -> Request:
    named: dict[str, Any] = {"stream": 1, "op": "infer", "key": KEY, "model": "m"}
    return Request(**(named | changes))


def fields_of(**changes: Any) -> list[Any]:
    """Return a REQ's meta before it is packed."""
    named: dict[str, Any] = {
        "op": "infer", "key": KEY, "model": "m", "inputs": {}, "params": {}, "deadline_ms": None,
        "credit": None, "priority": 0, "trace": None,
    }  # fmt: skip
    return list((named | changes).values())


class Raw:
    """Bytes that stand in a meta as they are."""

    def __init__(self, packed: bytes) -> None:
        self.packed = packed


def splice(value: Any) -> bytes:
    """Return msgpack in which `Raw` values stand as they are."""
    if isinstance(value, Raw):
        return value.packed
    if isinstance(value, list):
        opening: bytes = msgpack.Packer().pack_array_header(len(value))
        return opening + b"".join(map(splice, value))
    if isinstance(value, dict):
        head: bytes = msgpack.Packer().pack_map_header(len(value))
        return head + b"".join(splice(k) + splice(v) for k, v in value.items())
    return pack(value)


def meta_with(**changes: Any) -> bytes:
    """Return a REQ's meta in which any field may be `Raw`."""
    return splice(fields_of(**changes))


def ext(code: int, data: bytes) -> Raw:
    """Return a msgpack ext value."""
    return Raw(pack(msgpack.ExtType(code, data)) if code >= 0 else _negative_ext(code, data))


def _negative_ext(code: int, data: bytes) -> bytes:
    return b"\xc7" + bytes([len(data), code & 0xFF]) + data


def tensor(dtype: Any, shape: Any, ref: Any) -> Raw:
    """Return a descriptor of any numbers, right or wrong."""
    return ext(1, pack([dtype, shape, ref]))
