"""Golden exchanges of messages whose segments follow in DATA frames."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from tensorwire_protocol.errors import ErrorCode
from tensorwire_protocol.frames import PREFACE, Flag
from tensorwire_protocol.messages import (
    Cancel,
    Data,
    Failure,
    Goaway,
    Hello,
    Kind,
    Ping,
    Pong,
    Result,
    Welcome,
)
from vectors.making.building import fields_of, frame, pack, request, splice, tensor
from vectors.making.scripts import Script, end, failure, hello, welcome
from vectors.tagged import tagged

BODY = ("body",)
SEQUENCE, FRAMING = ErrorCode.SEQUENCE, ErrorCode.FRAMING

X = np.arange(6, dtype=np.int16)
Y = np.array([1.5, -2.0], dtype=np.float32)
ARRAYS = {"x": X, "none": np.zeros((0, 3), np.uint8), "y": Y}
# `none` has a segment of its own, without bytes.
DESCRIPTORS = {
    "x": tensor("I16", [6], 0), "none": tensor("U8", [0, 3], 1), "y": tensor("F32", [2], 2),
}  # fmt: skip
LENGTHS = (12, 0, 8)


def head(kind: Kind, meta: bytes, *lengths: int, stream: int = 1) -> bytes:
    """Return the head of a body."""
    table = b"".join(struct.pack("<Q", length) for length in lengths)
    return frame(kind, meta, stream=stream, flags=Flag.BODY, aux=len(lengths), table=table)


def asked(*lengths: int, stream: int = 1, inputs: Any = None) -> bytes:
    """Return the head of a request."""
    meta = splice(fields_of(inputs=DESCRIPTORS if inputs is None else inputs))
    return head(Kind.REQ, meta, *lengths, stream=stream)


def data(segment: int, payload: bytes, *, last: bool = False, stream: int = 1) -> Data:
    return Data(stream=stream, segment=segment, payload=payload, last=last)


ALL = (data(0, X.tobytes()[:5]), data(0, X.tobytes()[5:]), data(2, Y.tobytes(), last=True))


def server(name: str, **limits: int) -> Script:
    """Return a script whose server knows bodies, and so does its peer."""
    script = Script(name, "server", features=BODY, **limits)
    greeting = Hello(features=BODY)
    return script.peer(PREFACE, greeting).hears(greeting).sends(welcome(BODY))


def client(name: str) -> Script:
    """Return a script whose client has asked on stream 1."""
    script = Script(name, "client", features=BODY).sends_bytes(PREFACE).sends(hello(BODY))
    greeting = Welcome(features=BODY)
    return script.peer(greeting).hears(greeting).app(request()).sends(request())


def body_scripts() -> list[Script]:
    """Return all scripts about bodies."""
    return [*_received(), *_sent(), *_refused(), *_given_up(), *_out_of_order(), *_answers()]


def _received() -> list[Script]:
    ping = Ping(payload=b"12345678")
    return [
        server("body: a request whose tensors follow it")
        .peer(asked(*LENGTHS), *ALL)
        .hears(request(inputs=ARRAYS))
        .sends(),
        server("body: other frames come between its parts")
        .peer(asked(*LENGTHS), ALL[0], ping, request(stream=2), *ALL[1:])
        .hears(request(stream=2), request(inputs=ARRAYS))
        .sends(Pong(payload=ping.payload)),
        server("body: two at once")
        .peer(asked(*LENGTHS), asked(*LENGTHS, stream=3), ALL[0])
        .peer(*[data(d.segment, bytes(d.payload), last=d.last, stream=3) for d in ALL], *ALL[1:])
        .hears(request(stream=3, inputs=ARRAYS), request(inputs=ARRAYS))
        .sends(),
        server("body: segments without bytes")
        .peer(asked(0, inputs={"none": tensor("U8", [0], 0)}), data(0, b"", last=True))
        .hears(request(inputs={"none": np.zeros(0, np.uint8)}))
        .sends(),
    ]


def _sent() -> list[Script]:
    """Return how a message leaves that the peer would not take as one frame."""
    large = np.arange(4100, dtype=np.uint16).astype(np.uint8)
    payload, inputs = large.tobytes(), {"x": tensor("U8", [4100], 0)}
    greeting = Welcome(features=BODY, limits={"frame_bytes": 4096})
    script = Script("body: a request that is larger than a frame", "client", features=BODY)
    return [
        script.sends_bytes(PREFACE)
        .sends(hello(BODY))
        .peer(greeting)
        .hears(greeting)
        .app(request(inputs={"x": large}))
        .sends_bytes(asked(4100, inputs=inputs))
        .sends(data(0, payload[:4096]), data(0, payload[4096:], last=True)),
    ]


def _refused() -> list[Script]:
    return [
        server("body: refused on its size, and thrown away", message_bytes=19)
        .peer(asked(*LENGTHS))
        .sends(failure(1, ErrorCode.TOO_LARGE))
        .peer(*ALL, request(stream=2))
        .hears(request(stream=2)),
        server("body: as large as is allowed", message_bytes=20)
        .peer(asked(*LENGTHS), *ALL)
        .hears(request(inputs=ARRAYS)),
        server("body: refused, and not sent to its end", message_bytes=19)
        .peer(asked(*LENGTHS), ALL[0])
        .sends(failure(1, ErrorCode.TOO_LARGE))
        .peer(data(0, b"", last=True), request(stream=2))
        .hears(request(stream=2)),
        server("body: cancelled in the middle")
        .peer(asked(*LENGTHS), ALL[0], Cancel(stream=1))
        .sends(failure(1, ErrorCode.CANCELLED))
        .peer(data(0, b"", last=True), request(stream=2))
        .hears(request(stream=2)),
        server("body: given up in the middle, for want of time")
        .peer(asked(*LENGTHS), Cancel(stream=1, reason="deadline"))
        .sends(failure(1, ErrorCode.DEADLINE))
        .peer(data(0, b"", last=True))
        .open(),
        server("body: a shape that its segment does not have")
        .peer(asked(11, inputs={"x": tensor("I16", [6], 0)}), data(0, bytes(11), last=True))
        .sends(failure(1, ErrorCode.BAD_TENSOR))
        .open(),
    ]


def _given_up() -> list[Script]:
    goaway = tagged(Goaway(code=int(ErrorCode.FLOOD), last_stream=1))
    stopped = server("body: what was on its way is thrown away, more is a flood", fault_burst=3)
    return [
        stopped.peer(asked(*LENGTHS), Cancel(stream=1))
        .sends(failure(1, ErrorCode.CANCELLED))
        .peer(*[data(0, bytes(10))] * 2, *[data(0, b"x")] * 2)
        .open()
        .peer(data(0, b"x"))
        .hears()
        .fails(ErrorCode.FLOOD, goaway),
        server("body: DATA without bytes is not free after CANCEL", fault_burst=2)
        .peer(asked(*LENGTHS), Cancel(stream=1), data(0, b""))
        .sends(failure(1, ErrorCode.CANCELLED))
        .peer(data(0, b""))
        .fails(ErrorCode.FLOOD, goaway),
    ]


def _out_of_order() -> list[Script]:
    start, (first, second, third) = asked(*LENGTHS), ALL
    wrong: dict[str, tuple[Any, ...]] = {
        "no body at all": (data(0, b"x", last=True),),
        "of another stream": (start, data(0, b"x", stream=2)),
        "a segment too early": (start, third),
        "a segment without bytes": (start, first, second, data(1, b"")),
        "across two segments": (start, data(0, bytes(20), last=True)),
        "an end too early": (start, data(0, bytes(12), last=True)),
        "no end": (start, first, second, data(2, Y.tobytes())),
        "without bytes": (start, data(0, b"")),
    }
    scripts = [
        server(f"data out of order: {name}").peer(*parts).fails(SEQUENCE)
        for name, parts in wrong.items()
    ]
    behind = server("data out of order: behind the end").peer(start, *ALL, third)
    scripts.append(behind.hears(request(inputs=ARRAYS)).fails(SEQUENCE))
    none = server("body: without segments").peer(head(Kind.REQ, splice(fields_of())))
    return [*scripts, none.fails(FRAMING)]


def _answers() -> list[Script]:
    start = head(Kind.RES, splice([DESCRIPTORS]), *LENGTHS)
    return [
        client("body: an answer whose tensors follow it")
        .peer(start, *ALL)
        .hears(Result(stream=1, outputs=ARRAYS))
        .open(),
        client("body: an answer on a stream that is not open")
        .peer(head(Kind.RES, splice([DESCRIPTORS]), *LENGTHS, stream=2))
        .fails(SEQUENCE),
        client("body: an answer ends too early")
        .peer(start, data(0, bytes(12), last=True))
        .fails(SEQUENCE),
        client("body: another end before the answer is here")
        .peer(start, end(1, []))
        .hears()
        .fails(SEQUENCE),
        client("body: an error before the answer is here")
        .peer(start, Failure(stream=1, code=int(ErrorCode.INTERNAL), message=""))
        .hears()
        .fails(SEQUENCE),
        client("body: DATA without an answer").peer(data(0, b"x", last=True)).fails(SEQUENCE),
        client("body: an answer without segments").peer(head(Kind.RES, pack([{}]))).fails(FRAMING),
        client("body: an answer whose meta is none")
        .peer(head(Kind.RES, pack(7), 3), data(0, b"abc", last=True))
        .fails(FRAMING),
    ]
