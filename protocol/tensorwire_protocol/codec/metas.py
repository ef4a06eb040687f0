"""The metas of the hot messages as msgspec knows them, each in its ordinary shape.

Apart from `typed`, which may be compiled: msgspec makes its structs from ordinary classes only.
What passes through a gateway or comes to a worker is read as a tuple of exactly its fields, in half
the time of a struct; a gateway has a struct besides for what has fewer fields, or more.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec.msgpack import Decoder, Encoder, Ext

from tensorwire_protocol.codec.checks import U32_MAX

_NO_MAP = msgspec.Raw(b"\x80")

_U32 = Annotated[int, msgspec.Meta(ge=0, le=U32_MAX)]
_I32 = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
_Key = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
_Priority = Annotated[int, msgspec.Meta(ge=-100, le=100)]
# What is ordinary: within these bounds no usual limit can be broken.
NAME_CHARS, NAME_BYTES = 16, 64
ITEMS = 64
_Name = Annotated[str, msgspec.Meta(max_length=NAME_CHARS)]
_few = msgspec.Meta(max_length=ITEMS)
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


_PackedRequest = tuple[
    str,  # as the fields below
    _Key,
    str | None,
    msgspec.Raw,
    msgspec.Raw,
    _U32 | None,
    _U32 | None,
    _Priority,
    str | None,
]


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


_Submit = tuple[
    str,  # as the fields of a REQ, and
    _Key,
    Annotated[int, msgspec.Meta(ge=1, le=U32_MAX)],  # the attempt
    str | None,
    _Values,
    _Scalars,
    _U32 | None,
    _Priority,
    bytes,  # tokens so far
    str,  # the tenant
]


# Its keys are not bounded here: that costs as much as all else. `typed` looks at them.
_Result = tuple[
    Annotated[dict[str, bool | int | float | str | _Texts | Ext | None], _few],
    Annotated[dict[str, int | float], _few],
    Annotated[dict[str, int | float], _few],
    Annotated[dict[str, bool | int | float | str | None], _few],
]


_PackedResult = tuple[msgspec.Raw, msgspec.Raw, msgspec.Raw, msgspec.Raw]


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


read_request = Decoder(_RequestMeta).decode
read_packed_request = Decoder(_PackedRequest).decode
read_other_packed_request = Decoder(_PackedRequestMeta).decode
read_submit = Decoder(_Submit).decode
read_result = Decoder(_Result).decode
read_packed_result = Decoder(_PackedResult).decode
read_other_packed_result = Decoder(_PackedResultMeta).decode
read_event = Decoder(_EventMeta).decode
read_event_batch = Decoder(_EventBatchMeta).decode
read_step = Decoder(_StepMeta).decode
read_end = Decoder(_EndMeta).decode
read_map = Decoder(dict[str, Any]).decode
write = Encoder().encode
