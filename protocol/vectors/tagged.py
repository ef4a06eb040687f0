"""Messages as JSON that loses nothing: README.md says how bytes, floats and tensors are written."""

from __future__ import annotations

import struct
from enum import Enum
from typing import Any, get_args

import numpy as np
from tensorwire_protocol.errors import Executed
from tensorwire_protocol.messages import Finish, WireMessage, field_names
from tensorwire_protocol.tensors import RawTensor, describe

_SAFE_INT = 2**53 - 1  # what every JSON reader keeps exact
_DOUBLE = struct.Struct(">d")
_CLASSES: dict[str, Any] = {cls.KIND.name: cls for cls in get_args(WireMessage)}
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
_BITS_ONLY = ("BF16", "F8_E4M3", "F8_E5M2")
_TUPLES = ("features", "alternatives")


def tagged(value: Any) -> Any:
    """Return a message, or anything in one, as tagged JSON."""
    if hasattr(value, "KIND"):
        named = {name: tagged(getattr(value, name)) for name in field_names(value)}
        return {"kind": value.KIND.name, **named}
    if isinstance(value, np.ndarray | RawTensor):
        dtype, dense = describe(value)
        return {"$tensor": [dtype, list(dense.shape), dense.tobytes().hex()]}
    if isinstance(value, bytes | memoryview):
        return {"$bytes": bytes(value).hex()}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        return {"$float": _DOUBLE.pack(value).hex()}
    if isinstance(value, int) and abs(value) > _SAFE_INT:
        return {"$int": str(value)}
    if isinstance(value, list | tuple):
        return [tagged(item) for item in value]
    if isinstance(value, dict):
        return {name: tagged(item) for name, item in value.items()}
    return value


def untagged(value: Any) -> Any:
    """Return what `tagged` made the JSON of."""
    if isinstance(value, list):
        return [untagged(item) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"kind": kind, **named} if kind in _CLASSES:
            return _CLASSES[kind](**{name: _field(name, item) for name, item in named.items()})
        case {"$tensor": [dtype, shape, data]}:
            values = np.frombuffer(bytes.fromhex(data), dtype=_DTYPES[dtype]).reshape(shape)
            return RawTensor(dtype, values) if dtype in _BITS_ONLY else values
        case {"$bytes": data}:
            return bytes.fromhex(data)
        case {"$float": data}:
            return _DOUBLE.unpack(bytes.fromhex(data))[0]
        case {"$int": digits}:
            return int(digits)
    return {name: untagged(item) for name, item in value.items()}


def _field(name: str, value: Any) -> Any:
    if name == "finish":
        return Finish(value)
    if name == "executed":
        return Executed(value)
    return tuple(value) if name in _TUPLES else untagged(value)
