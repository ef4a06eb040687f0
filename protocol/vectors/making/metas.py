"""Golden frames whose MessagePack is at the edge of what may be."""

from __future__ import annotations

from typing import Any

from tensorwire_protocol.messages import (
    Kind,
)
from vectors.making.building import (
    DOWN,
    UP,
    Raw,
    Vector,
    fields_of,
    frame,
    framing,
    good,
    meta_with,
    pack,
    refused,
    request,
    splice,
)


def readable() -> list[Vector]:
    """What the msgpack of a meta may not be, besides its shape."""

    def nested(containers: int) -> Any:
        value: Any = []
        for _ in range(containers - 1):
            value = [value]
        return value

    def maps(containers: int) -> Any:
        value: dict[str, Any] = {}
        for _ in range(containers - 1):
            value = {"m": value}
        return value

    twice = Raw(b"\x82\xa1a\x01\xa1a\x01")
    return [
        good("msgpack: 15 containers deep", UP, request(inputs={"x": nested(13)})),
        good("msgpack: 16 containers deep", UP, request(inputs={"x": nested(14)})),
        refused("msgpack: 17 containers deep", pack(fields_of(inputs={"x": nested(15)}))),
        good("msgpack: 16 maps and the array around them", UP, request(params={"m": maps(14)})),
        refused(
            "msgpack: 17 maps and the array around them", pack(fields_of(params={"m": maps(15)}))
        ),
        refused("msgpack: 1,000 arrays deep", b"\x91" * 1000 + b"\xc0"),
        refused(
            "msgpack: 100,000 promised elements",
            meta_with(inputs={"x": Raw(b"\xdd\x00\x01\x86\xa0")}),
        ),
        refused(
            "msgpack: 2**32 - 1 promised pairs",
            meta_with(inputs={"x": Raw(b"\xdf\xff\xff\xff\xff")}),
        ),
        refused(
            "msgpack: a string longer than the meta", meta_with(trace=Raw(b"\xdb\xff\xff\xff\xffx"))
        ),
        refused(
            "msgpack: bytes longer than the meta", meta_with(trace=Raw(b"\xc6\x00\x00\x00\x09x"))
        ),
        refused("msgpack: the byte that means nothing", meta_with(inputs={"x": Raw(b"\xc1")})),
        refused("msgpack: an array cut short", pack(fields_of())[:-1]),
        refused("msgpack: a byte behind the object", pack(fields_of()) + b"\xc0"),
        refused("msgpack: a key twice", meta_with(params={"x": twice})),
        refused("msgpack: a key twice at the top of the inputs", meta_with(inputs=twice)),
        refused(
            "msgpack: a key twice in a field of a later version", splice([*fields_of(), twice])
        ),
        refused("msgpack: a key that is a number", meta_with(inputs=Raw(b"\x81\x01\x02"))),
        refused("msgpack: a key that is bytes", meta_with(inputs=Raw(b"\x81\xc4\x01a\x02"))),
        refused("msgpack: a key that is nil", meta_with(params=Raw(b"\x81\xc0\x02"))),
        refused("msgpack: a key that is an array", meta_with(params=Raw(b"\x81\x90\x02"))),
        refused(
            "msgpack: a timestamp of 32 bits", meta_with(inputs={"t": Raw(b"\xd6\xff" + bytes(4))})
        ),
        refused(
            "msgpack: a timestamp of 64 bits", meta_with(inputs={"t": Raw(b"\xd7\xff" + bytes(8))})
        ),
        refused(
            "msgpack: a timestamp of 96 bits",
            meta_with(inputs={"t": Raw(b"\xc7\x0c\xff" + bytes(12))}),
        ),
        refused(
            "msgpack: a timestamp in the params",
            meta_with(params={"t": Raw(b"\xd6\xff" + bytes(4))}),
        ),
        framing(
            "msgpack: a timestamp in an answer",
            DOWN,
            frame(Kind.RES, splice([{"t": Raw(b"\xd6\xff" + bytes(4))}]), stream=1),
        ),
        refused("utf-8: a lone continuation byte", meta_with(inputs={"x": Raw(b"\xa1\x80")})),
        refused("utf-8: a character cut short", meta_with(inputs={"x": Raw(b"\xa2\xe2\x82")})),
        refused("utf-8: an overlong slash", meta_with(inputs={"x": Raw(b"\xa2\xc0\xaf")})),
        refused("utf-8: half a surrogate pair", meta_with(inputs={"x": Raw(b"\xa3\xed\xa0\x80")})),
        refused("utf-8: beyond U+10FFFF", meta_with(inputs={"x": Raw(b"\xa4\xf4\x90\x80\x80")})),
        refused("utf-8: the operation", meta_with(op=Raw(b"\xa1\xff"))),
        refused("utf-8: a key", meta_with(params=Raw(b"\x81\xa1\xff\x01"))),
        framing(
            "utf-8: an event's text",
            DOWN,
            frame(Kind.EVT, splice([0, [5], Raw(b"\xa1\xff")]), stream=1),
        ),
        framing(
            "utf-8: a batch's text",
            DOWN,
            frame(Kind.EVB, splice([[1], [0], None, [5], [Raw(b"\xa1\xff")]])),
        ),
    ]
