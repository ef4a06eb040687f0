"""Golden frames whose headers and bodies contradict themselves."""

from __future__ import annotations

import struct

import numpy as np
from tensorwire_protocol.errors import ErrorCode
from tensorwire_protocol.frames import Flag
from tensorwire_protocol.messages import (
    Kind,
    Ping,
)
from vectors.making.building import (
    CONNECTION,
    DOWN,
    UP,
    Vector,
    bad,
    fields_of,
    frame,
    framing,
    good,
    meta_with,
    pack,
    request,
    segmented,
    tensor,
)


def headers() -> list[Vector]:
    ping = pack(bytes(8))
    two = segmented(
        Kind.REQ,
        meta_with(inputs={"a": tensor("U8", [3], 0), "b": tensor("U8", [2], 1)}),
        [b"abc", b"de"],
    )
    first_pad = two.index(b"abc") - 1
    unknown, too_large = ErrorCode.UNKNOWN_KIND, ErrorCode.FRAME_TOO_LARGE

    def changed(data: bytes, at: int, value: int) -> bytes:
        return data[:at] + bytes([value]) + data[at + 1 :]

    def announcing(length: int) -> bytes:
        """Return the frame with another length of its first segment."""
        return two[:16] + struct.pack("<Q", length) + two[24:]

    return [
        *[
            bad(f"header: kind {kind:#04x}", UP, frame(kind, b"\xc0"), unknown, CONNECTION)
            for kind in (0x00, 0x08, 0x0F, 0x14, 0x26, 0x5F, 0x66, 0x7F)
        ],
        *[
            bad(
                f"header: kind {kind.name} from a client",
                UP,
                frame(kind, b"\xc0"),
                unknown,
                CONNECTION,
            )
            for kind in (
                Kind.WELCOME,
                Kind.RES,
                Kind.EVT,
                Kind.EVB,
                Kind.ACK,
                Kind.END,
                Kind.HEARTBEAT,
            )
        ],
        *[
            bad(
                f"header: kind {kind.name} from a server",
                DOWN,
                frame(kind, b"\xc0"),
                unknown,
                CONNECTION,
            )
            for kind in (Kind.HELLO, Kind.REQ, Kind.CANCEL, Kind.RESUME, Kind.DRAIN)
        ],
        good(
            "header: kinds from 0x80 up are skipped",
            UP,
            [],
            frame(0x80, b"abc", stream=9, flags=0xFF, aux=9, meta_len=2),
        ),
        good(
            "header: a skipped kind's numbers mean nothing",
            DOWN,
            [],
            frame(0xFF, b"", stream=1, flags=2, aux=65535, meta_len=2**32 - 1),
        ),
        good(
            "header: behind a skipped kind the next frame is heard",
            UP,
            [Ping(payload=bytes(8))],
            frame(0xA5, bytes(100)) + frame(Kind.PING, ping),
        ),
        *[
            framing(f"header: reserved flag {flag:#04x}", UP, frame(Kind.PING, ping, flags=flag))
            for flag in (0x02, 0x08, 0x10, 0x80)
        ],
        framing(
            "header: a reserved flag on a request",
            UP,
            frame(Kind.REQ, pack(fields_of()), stream=1, flags=2),
        ),
        framing(
            "header: BODY where no body can follow", UP, frame(Kind.PING, ping, flags=Flag.BODY)
        ),
        framing(
            "header: BODY on an event",
            DOWN,
            frame(Kind.EVT, pack([0, [5], "a"]), stream=1, flags=Flag.BODY),
        ),
        framing(
            "header: BODY without segments",
            UP,
            frame(Kind.REQ, pack(fields_of()), stream=1, flags=Flag.BODY),
        ),
        framing("header: END on a ping", UP, frame(Kind.PING, ping, flags=Flag.END)),
        framing(
            "header: END on a request",
            UP,
            frame(Kind.REQ, pack(fields_of()), stream=1, flags=Flag.END),
        ),
        framing(
            "header: END on the end",
            DOWN,
            frame(Kind.END, pack(["stop", 0, 0]), stream=1, flags=Flag.END),
        ),
        framing("header: aux on a ping", UP, frame(Kind.PING, ping, aux=1)),
        framing(
            "header: aux on a batch", DOWN, frame(Kind.EVB, pack([[], [], None, [], []]), aux=1)
        ),
        framing(
            "header: a meta longer than the body",
            UP,
            frame(Kind.PING, ping, meta_len=len(ping) + 1),
        ),
        framing("header: a meta of 4 GiB", UP, frame(Kind.PING, ping, meta_len=2**32 - 1)),
        framing(
            "header: a meta shorter than the body",
            UP,
            frame(Kind.PING, ping, meta_len=len(ping) - 1),
        ),
        framing(
            "header: no room for the table of segments",
            UP,
            frame(Kind.REQ, b"", stream=1, aux=2, table=bytes(8)),
        ),
        bad(
            "header: 4 GiB are announced",
            UP,
            frame(Kind.REQ, b"", stream=1, body_len=2**32 - 1),
            too_large,
            CONNECTION,
        ),
        bad("header: text", UP, b"GET / HTTP/1.1\r\n", too_large, CONNECTION),
        good(
            "body: two segments",
            UP,
            request(inputs={"a": np.frombuffer(b"abc", "u1"), "b": np.frombuffer(b"de", "u1")}),
            two,
        ),
        framing(
            "body: padding before the first segment is not zero", UP, changed(two, first_pad, 1)
        ),
        framing("body: padding between segments is not zero", UP, changed(two, first_pad + 5, 1)),
        framing("body: a segment longer than the body", UP, announcing(2**64 - 1)),
        framing("body: a segment that takes the next one's place", UP, announcing(100)),
        framing("body: a byte behind the last segment", UP, _longer(two, b"\0")),
        framing("body: padding behind the last segment", UP, _longer(two, bytes(62))),
        framing("body: the last segment cut short", UP, _longer(two[:-1], b"")),
    ]


def _longer(data: bytes, tail: bytes) -> bytes:
    """Return a frame with bytes at its end, announced as such."""
    body = data[16:] + tail
    return struct.pack("<I", len(body)) + data[4:16] + body
