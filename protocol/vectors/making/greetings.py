"""Golden frames of the greeting and of the connection itself."""

from __future__ import annotations

from tensorwire_protocol.codec import encode
from tensorwire_protocol.errors import ErrorCode
from tensorwire_protocol.limits import WORKER_LINK
from tensorwire_protocol.messages import (
    Auth,
    Credit,
    Goaway,
    Hello,
    Kind,
    Ping,
    Pong,
    Welcome,
)
from vectors.making.building import (
    CONNECTION,
    DOWN,
    FROM_WORKER,
    KEY,
    TO_WORKER,
    UP,
    Raw,
    Vector,
    bad,
    frame,
    framing,
    good,
    pack,
    splice,
)

LIMITS_SAID = {"frame_bytes": 65536, "streams": 8, "handshake_s": 2.5}


def greetings() -> list[Vector]:
    full = Hello(
        version=1,
        features=("passive", "resume"),
        limits=LIMITS_SAID,
        software="someone/1.0",
        auth={"method": "token", "token": b"secret"},
    )
    welcome = Welcome(
        version=1,
        features=("passive",),
        limits=LIMITS_SAID,
        software="server/2.0",
        session=KEY,
        auth={"method": "none"},
    )
    return [
        good("hello: the smallest", UP, Hello()),
        good("hello: everything", UP, full),
        good("hello: on a worker link", TO_WORKER, Hello(software="gateway")),
        good("hello: two fields are enough", UP, Hello(), frame(Kind.HELLO, pack([1, []]))),
        good(
            "hello: nil is absent",
            UP,
            Hello(),
            frame(Kind.HELLO, pack([1, [], None, None, None])),
        ),
        good(
            "hello: fields of a later version are skipped",
            UP,
            Hello(software="s"),
            frame(Kind.HELLO, pack([1, [], {}, "s", None, "new", {"a": [1]}])),
        ),
        good("hello: another version is readable", UP, Hello(version=2)),
        good(
            "hello: the largest before it is accepted",
            UP,
            Hello(software="x" * 51),
            preauth_bytes=58,
        ),
        bad(
            "hello: larger than allowed before it is accepted",
            UP,
            b"".join(encode(Hello(software="x" * 52), WORKER_LINK)),
            ErrorCode.FRAME_TOO_LARGE,
            CONNECTION,
            preauth_bytes=58,
        ),
        framing("hello: one field", UP, frame(Kind.HELLO, pack([1]))),
        framing("hello: a map", UP, frame(Kind.HELLO, pack({"v": 1}))),
        framing("hello: the version is text", UP, frame(Kind.HELLO, pack(["1", []]))),
        framing("hello: the version is negative", UP, frame(Kind.HELLO, pack([-1, []]))),
        framing("hello: the version is true", UP, frame(Kind.HELLO, pack([True, []]))),
        framing("hello: features are a map", UP, frame(Kind.HELLO, pack([1, {}]))),
        framing("hello: a feature is a number", UP, frame(Kind.HELLO, pack([1, ["a", 1]]))),
        framing("hello: limits are a list", UP, frame(Kind.HELLO, pack([1, [], []]))),
        framing("hello: software is bytes", UP, frame(Kind.HELLO, pack([1, [], {}, b"s"]))),
        framing(
            "hello: a limit twice",
            UP,
            frame(Kind.HELLO, splice([1, [], Raw(b"\x82\xa1a\x01\xa1a\x02")])),
        ),
        framing("hello: on a stream", UP, frame(Kind.HELLO, pack([1, []]), stream=1)),
        framing("hello: bytes behind the meta", UP, frame(Kind.HELLO, pack([1, []]), rest=b"\0")),
        framing(
            "hello: a second object in the meta", UP, frame(Kind.HELLO, pack([1, []]) + b"\xc0")
        ),
        good("welcome: the smallest", DOWN, Welcome()),
        good("welcome: everything", DOWN, welcome),
        good("welcome: from a worker", FROM_WORKER, Welcome(software="worker", session=b"s")),
        good("welcome: two fields are enough", DOWN, Welcome(), frame(Kind.WELCOME, pack([1, []]))),
        framing(
            "welcome: the session is text", DOWN, frame(Kind.WELCOME, pack([1, [], {}, "", "s"]))
        ),
        framing("welcome: no features", DOWN, frame(Kind.WELCOME, pack([1]))),
    ]


def of_the_connection() -> list[Vector]:
    return [
        good("ping", UP, Ping(payload=b"abcdefgh")),
        good("ping: from a server", DOWN, Ping(payload=bytes(8))),
        good("pong", DOWN, Pong(payload=b"\xff" * 8)),
        good("pong: on a worker link", FROM_WORKER, Pong(payload=KEY[:8])),
        framing("ping: seven bytes", UP, frame(Kind.PING, pack(bytes(7)))),
        framing("ping: nine bytes", UP, frame(Kind.PING, pack(bytes(9)))),
        framing("ping: text", UP, frame(Kind.PING, pack("abcdefgh"))),
        framing("ping: no meta", UP, frame(Kind.PING, b"")),
        framing("ping: on a stream", UP, frame(Kind.PING, pack(bytes(8)), stream=5)),
        framing("pong: in an array", UP, frame(Kind.PONG, pack([bytes(8)]))),
        good("goaway: the smallest", DOWN, Goaway(), frame(Kind.GOAWAY, pack([0]))),
        good(
            "goaway: draining",
            DOWN,
            Goaway(
                code=ErrorCode.DRAINING,
                last_stream=2**32 - 1,
                grace_ms=5000,
                alternatives=("a:1", "b:2"),
            ),
        ),
        good("goaway: from a client", UP, Goaway(code=0, last_stream=0, grace_ms=0)),
        framing("goaway: no last stream", DOWN, frame(Kind.GOAWAY, pack([]))),
        framing("goaway: a last stream of 33 bits", DOWN, frame(Kind.GOAWAY, pack([2**32]))),
        framing("goaway: an alternative is a number", DOWN, frame(Kind.GOAWAY, pack([0, 0, [1]]))),
        framing("goaway: on a stream", DOWN, frame(Kind.GOAWAY, pack([0]), stream=1)),
        good("credit: events", UP, Credit(stream=7, amount=1)),
        good("credit: upload bytes", DOWN, Credit(stream=7, amount=2**32 - 1)),
        good("credit: for the connection", UP, Credit(stream=0, amount=300)),
        framing("credit: none", UP, frame(Kind.CREDIT, pack(0), stream=7)),
        framing("credit: 33 bits", UP, frame(Kind.CREDIT, pack(2**32), stream=7)),
        framing("credit: a float", UP, frame(Kind.CREDIT, pack(1.0), stream=7)),
        framing("credit: in an array", UP, frame(Kind.CREDIT, pack([1]), stream=7)),
        good("auth: a step up", UP, Auth(payload={"proof": KEY})),
        good("auth: a step down", DOWN, Auth(payload={"nonce": KEY, "rounds": 2})),
        framing("auth: no fields", UP, frame(Kind.AUTH, pack([]))),
        framing("auth: a list", UP, frame(Kind.AUTH, pack([[1]]))),
    ]
