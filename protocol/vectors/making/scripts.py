"""The golden exchanges: what one end of a connection does, step by step, as README.md describes."""

from __future__ import annotations

from typing import Any

from tensorwire_protocol.codec import encode
from tensorwire_protocol.connection import NOT_OURS
from tensorwire_protocol.errors import ErrorCode
from tensorwire_protocol.frames import PREFACE
from tensorwire_protocol.limits import WORKER_LINK
from tensorwire_protocol.messages import (
    Ack,
    Cancel,
    Credit,
    End,
    Event,
    EventBatch,
    Failure,
    Finish,
    Goaway,
    Heartbeat,
    Hello,
    Kind,
    Message,
    Ping,
    Pong,
    Result,
    Resume,
    Step,
    Submit,
    Welcome,
)
from tensorwire_protocol.tensors import ids_checksum
from vectors.making.building import KEY, fields_of, frame, pack, request
from vectors.tagged import tagged

ANY = {"$any": True}
PING_META = pack(bytes(8))
ASKS = {"kind": "PING", "payload": ANY}  # whoever sends one chooses the bytes


class Script:
    """Steps around one end under test; the script plays its peer, its application, its clock."""

    def __init__(
        self, name: str, role: str, *, features: tuple[str, ...] = (), **limits: Any
    ) -> None:
        self._head: dict[str, Any] = {"name": name, "role": role}
        if features:
            self._head["features"] = list(features)
        if limits:
            self._head["limits"] = limits
        self._steps: list[dict[str, Any]] = []

    def peer(self, *parts: Message | bytes) -> Script:
        """The peer's bytes arrive."""
        data = b"".join(
            p if isinstance(p, bytes) else b"".join(encode(p, WORKER_LINK)) for p in parts
        )
        return self._step("peer", data.hex())

    def app(self, *messages: Message) -> Script:
        """The application behind this end sends."""
        for message in messages:
            self._step("app", tagged(message))
        return self

    def hears(self, *messages: Message) -> Script:
        """Exactly this has reached the application since the last such step."""
        return self._step("hears", [tagged(m) for m in messages])

    def sends(self, *messages: Any) -> Script:
        """Exactly these frames have left since the last such step."""
        return self._step("sends", [m if isinstance(m, dict) else tagged(m) for m in messages])

    def sends_bytes(self, data: bytes) -> Script:
        """Exactly these bytes have left, which are no frames."""
        return self._step("sends_bytes", data.hex())

    def wait(self, seconds: float) -> Script:
        """The clock goes on, and the timers are looked at."""
        return self._step("wait_s", seconds)

    def open(self) -> Script:
        """The connection is not closed."""
        return self._step("closed", False)

    def closed(self, code: ErrorCode | None) -> Script:
        """The connection is closed, for this reason."""
        return self._step("closed", {"code": None if code is None else int(code)})

    def fails(self, code: ErrorCode, *before: Any) -> Script:
        """The last frame that leaves is ERR on stream 0, and the connection is closed."""
        return self.sends(*before, failure(0, code)).closed(code)

    def _step(self, what: str, value: Any) -> Script:
        self._steps.append({what: value})
        return self

    def vector(self) -> dict[str, Any]:
        """Return the script as a line of the file."""
        return {**self._head, "steps": self._steps}


def failure(stream: int, code: ErrorCode) -> dict[str, Any]:
    """Return an ERR of which only the number is prescribed."""
    pattern: dict[str, Any] = tagged(Failure(stream=stream, code=int(code), message=""))
    free = ("message", "retryable", "executed", "retry_after_ms", "log_id", "detail")
    return pattern | dict.fromkeys(free, ANY)


def welcome(features: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a WELCOME of which only version and features are prescribed."""
    pattern: dict[str, Any] = tagged(Welcome(features=features))
    return pattern | {"limits": ANY, "software": ANY, "session": ANY, "auth": ANY}


def hello(features: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a HELLO of which only version and features are prescribed."""
    pattern: dict[str, Any] = tagged(Hello(features=features))
    return pattern | {"limits": ANY, "software": ANY, "auth": ANY}


def greeted_server(name: str, **limits: Any) -> Script:
    """Return a script whose server has said WELCOME."""
    script = Script(name, "server", **limits)
    return script.peer(PREFACE, Hello()).hears(Hello()).sends(welcome())


def greeted_client(name: str, **limits: Any) -> Script:
    """Return a script whose client has heard WELCOME."""
    script = Script(name, "client", **limits)
    script.sends_bytes(PREFACE).sends(hello())
    return script.peer(Welcome()).hears(Welcome())


def asking_client(name: str, num_streams: int = 1) -> Script:
    """Return a script whose client has asked on streams 1 to `num_streams`."""
    asked = [request(stream=i) for i in range(1, num_streams + 1)]
    return greeted_client(name).app(*asked).sends(*asked)


def event(stream: int, index: int, tokens: list[int]) -> Event:
    return Event(stream=stream, index=index, tokens=tokens, text="t")


def end(stream: int, tokens: list[int], finish: Finish = Finish.STOP) -> End:
    return End(stream=stream, finish=finish, count=len(tokens), checksum=ids_checksum(tokens))


def batch(streams: list[int], firsts: list[int], counts: list[int] | None = None) -> EventBatch:
    num_tokens = len(streams) if counts is None else sum(counts)
    return EventBatch(
        streams=streams,
        first_indexes=firsts,
        counts=counts,
        tokens=[7] * num_tokens,
        texts=["t"] * len(streams),
    )


SEQUENCE, FRAMING = ErrorCode.SEQUENCE, ErrorCode.FRAMING
UNKNOWN_KIND, VERSION = ErrorCode.UNKNOWN_KIND, ErrorCode.VERSION


def greeting() -> list[Script]:
    strangers = {
        "HTTP": b"GET / HTTP/1.1\r\n\r\n",
        "TLS": bytes.fromhex("1603010200010001fc0303"),
        "another major version": b"\x94TW2\r\n\x1a\n",
        "newlines mangled": b"\x94TW1\n\x1a\n\0",
        "only its last byte wrong": PREFACE[:-1] + b"\r",
        "HELLO without a preface": b"".join(encode(Hello(), WORKER_LINK)),
    }
    features = ("b", "a", "x")
    return [
        Script("a server is silent until HELLO", "server")
        .sends()
        .peer(PREFACE)
        .sends()
        .peer(Hello())
        .hears(Hello())
        .sends(welcome())
        .open(),
        Script(
            "features are what both sides have, in the opener's order",
            "server",
            features=("a", "b"),
        )
        .peer(PREFACE, Hello(features=features))
        .hears(Hello(features=features))
        .sends(welcome(("b", "a"))),
        Script("a client opens with preface and HELLO", "client", features=("a",))
        .sends_bytes(PREFACE)
        .sends(hello(("a",)))
        .peer(Welcome(features=("a",)))
        .hears(Welcome(features=("a",)))
        .open(),
        Script("a request may follow HELLO at once", "server")
        .peer(PREFACE, Hello(), request())
        .hears(Hello(), request())
        .sends(welcome())
        .app(Result(stream=1))
        .sends(Result(stream=1)),
        Script("a client may ask before WELCOME", "client")
        .app(request())
        .sends_bytes(PREFACE)
        .sends(hello(), request())
        .peer(Welcome(), Result(stream=1))
        .hears(Welcome(), Result(stream=1)),
        Script("a GOAWAY during the handshake leaves behind WELCOME", "server")
        .app(Goaway(code=int(ErrorCode.DRAINING)))
        .sends()
        .peer(PREFACE, Hello())
        .hears(Hello())
        .sends(welcome(), Goaway(code=int(ErrorCode.DRAINING))),
        *[
            Script(f"a stranger gets one line of text: {name}", "server")
            .peer(data)
            .hears()
            .sends_bytes(NOT_OURS)
            .closed(ErrorCode.BAD_PREFACE)
            .peer(PREFACE, Hello())
            .hears()
            .sends()
            for name, data in strangers.items()
        ],
        *[
            Script(f"a HELLO of version {version}", "server")
            .peer(PREFACE, Hello(version=version))
            .hears()
            .fails(VERSION)
            for version in (0, 2)
        ],
        Script("a WELCOME of another version", "client")
        .sends_bytes(PREFACE)
        .sends(hello())
        .peer(Welcome(version=2))
        .hears()
        .fails(VERSION),
        Script("a request before HELLO", "server").peer(PREFACE, request()).hears().fails(SEQUENCE),
        Script("a ping before HELLO", "server").peer(PREFACE, Ping()).hears().fails(SEQUENCE),
        Script("an optional kind before HELLO", "server")
        .peer(PREFACE, frame(0x80, b""))
        .hears()
        .fails(UNKNOWN_KIND),
        Script("an answer before WELCOME", "client")
        .app(request())
        .sends_bytes(PREFACE)
        .sends(hello(), request())
        .peer(Result(stream=1))
        .hears()
        .fails(SEQUENCE),
        Script("a second HELLO", "server")
        .peer(PREFACE, Hello(), Hello())
        .hears(Hello())
        .fails(SEQUENCE, welcome()),
        greeted_client("a second WELCOME").peer(Welcome()).hears().fails(SEQUENCE),
        Script("a refusal instead of WELCOME keeps its number", "client")
        .sends_bytes(PREFACE)
        .sends(hello())
        .peer(Failure(stream=0, code=int(ErrorCode.BUSY), message="full", retryable=True))
        .hears(Failure(stream=0, code=int(ErrorCode.BUSY), message="full", retryable=True))
        .sends()
        .closed(ErrorCode.BUSY),
        *[
            Script(f"a peer that accepts no more than {size} bytes in {name}", "server")
            .peer(PREFACE, Hello(limits={name: size}))
            .hears()
            .fails(FRAMING)
            for name, size in (("frame_bytes", 4095), ("server_meta_bytes", 4095))
        ],
        Script("a peer that accepts just enough", "server")
        .peer(
            PREFACE,
            Hello(
                limits={
                    "frame_bytes": 4096,
                    "server_meta_bytes": 4096,
                    "unknown": [1],
                    "streams": "many",
                }
            ),
        )
        .hears(
            Hello(
                limits={
                    "frame_bytes": 4096,
                    "server_meta_bytes": 4096,
                    "unknown": [1],
                    "streams": "many",
                }
            )
        )
        .sends(welcome())
        .open(),
        *[
            Script(f"a server that accepts no more than {size} bytes in {name}", "client")
            .sends_bytes(PREFACE)
            .sends(hello())
            .peer(Welcome(limits={name: size}))
            .hears()
            .fails(FRAMING)
            for name, size in (("frame_bytes", 4095), ("client_meta_bytes", 4095))
        ],
        *[
            Script(f"a client that is told in text: {name}", "client")
            .sends_bytes(PREFACE)
            .sends(hello())
            .peer(text)
            .hears()
            .sends()
            .closed(ErrorCode.BAD_PREFACE)
            for name, text in (
                ("another version", NOT_OURS.replace(b"version 1", b"version 2")),
                ("HTTP", b"HTTP/1.1 400 Bad Request\r\n\r\n"),
            )
        ],
        Script("other text is a frame that is too large", "client")
        .sends_bytes(PREFACE)
        .sends(hello())
        .peer(b"HTTPS is spoken here\r\n")
        .hears()
        .fails(ErrorCode.FRAME_TOO_LARGE),
        *[
            Script(f"{kind.name} before HELLO, whose feature is not known yet", "server")
            .peer(PREFACE, frame(kind, b"\xc0", stream=1))
            .hears()
            .fails(SEQUENCE)
            for kind in (Kind.RESUME, Kind.CREDIT)
        ],
        Script("a feature that nobody offered does not hold", "client", features=("a",))
        .sends_bytes(PREFACE)
        .sends(hello(("a",)))
        .peer(Welcome(features=("a", "body")), frame(Kind.DATA, b"", stream=1))
        .hears(Welcome(features=("a", "body")))
        .fails(UNKNOWN_KIND),
        Script("no greeting in time", "server")
        .wait(4.999)
        .open()
        .wait(0.002)
        .fails(ErrorCode.HANDSHAKE_TIMEOUT),
        Script("half a preface does not buy time", "server")
        .peer(PREFACE[:5])
        .wait(4.999)
        .peer(PREFACE[5:])
        .open()
        .wait(0.002)
        .fails(ErrorCode.HANDSHAKE_TIMEOUT),
        Script("no WELCOME in time", "client")
        .sends_bytes(PREFACE)
        .sends(hello())
        .wait(5.001)
        .fails(ErrorCode.HANDSHAKE_TIMEOUT),
    ]


def streams() -> list[Script]:
    bad = frame(Kind.REQ, pack(fields_of(key=b"short")), stream=1)
    return [
        greeted_server("streams may skip numbers")
        .peer(request(stream=5), request(stream=900))
        .hears(request(stream=5), request(stream=900))
        .open(),
        greeted_server("streams may not fall")
        .peer(request(stream=5), request(stream=4))
        .hears(request(stream=5))
        .fails(SEQUENCE),
        greeted_server("a stream's number is not used again")
        .peer(request())
        .hears(request())
        .app(Result(stream=1))
        .sends(Result(stream=1))
        .peer(request())
        .hears()
        .fails(SEQUENCE),
        greeted_server("a number that was refused is used up too")
        .peer(bad)
        .hears()
        .sends(failure(1, ErrorCode.BAD_META))
        .peer(request())
        .hears()
        .fails(SEQUENCE),
        greeted_server("a bad request fails alone")
        .peer(bad, request(stream=2))
        .hears(request(stream=2))
        .sends(failure(1, ErrorCode.BAD_META))
        .open(),
        greeted_server("what came before a violation is heard, what comes after is not")
        .peer(request(), frame(0x7F, b""), request(stream=2))
        .hears(request())
        .fails(UNKNOWN_KIND)
        .peer(request(stream=3))
        .hears()
        .sends(),
        greeted_server("one stream more than the limit is busy", streams=2)
        .peer(request(), request(stream=2), request(stream=3))
        .hears(request(), request(stream=2))
        .sends(failure(3, ErrorCode.BUSY))
        .app(Result(stream=1))
        .sends(Result(stream=1))
        .peer(request(stream=4))
        .hears(request(stream=4))
        .open(),
        greeted_server("a cancel reaches an open stream only")
        .peer(request(), Cancel(stream=1))
        .hears(request(), Cancel(stream=1))
        .app(end(1, [], Finish.CANCELLED))
        .sends(end(1, [], Finish.CANCELLED))
        .peer(Cancel(stream=1), Cancel(stream=2), Cancel(stream=0))
        .hears()
        .open(),
        greeted_server("an error for a stream does not come from a client")
        .peer(request(), Failure(stream=1, code=1, message=""))
        .hears(request())
        .fails(SEQUENCE),
        greeted_server("an error of the connection ends it")
        .peer(Failure(stream=0, code=int(FRAMING), message="m"))
        .hears(Failure(stream=0, code=int(FRAMING), message="m"))
        .sends()
        .closed(FRAMING),
        greeted_server("whoever asks may say goodbye").peer(Goaway()).hears(Goaway()).open(),
    ]


def farewells() -> list[Script]:
    """Return what a client does with the end of everything."""
    flood = Failure(stream=0, code=int(ErrorCode.FLOOD), message="enough")
    half = b"".join(encode(Ack(stream=1), WORKER_LINK))[:-1]
    unknown = Failure(stream=1, code=0x03FF, message="", retryable=True)
    return [
        asking_client("an error of the connection ends all that runs", 2)
        .peer(flood, Result(stream=1))
        .hears(flood)
        .sends()
        .closed(ErrorCode.FLOOD),
        asking_client("half a frame is no frame").peer(half).hears().open(),
        asking_client("an error of an unknown number ends its stream alone")
        .peer(unknown)
        .hears(unknown)
        .open()
        .peer(event(1, 0, [4]))
        .hears()
        .fails(SEQUENCE),
        asking_client("kinds of a later version are skipped")
        .peer(frame(0xA5, b"anything", stream=1, flags=0xFF, aux=7), Result(stream=1))
        .hears(Result(stream=1))
        .open(),
        asking_client("what a client may not hear ends the connection")
        .peer(request(stream=2))
        .hears()
        .fails(UNKNOWN_KIND),
    ]


def answers() -> list[Script]:
    def wrong(name: str, *messages: Message) -> Script:
        """Return a script whose last message is the violation."""
        *before, last = messages
        script = asking_client(name, 2)
        if before:
            script.peer(*before).hears(*before).open()
        return script.peer(last).hears().fails(SEQUENCE)

    generation: list[Message] = [
        Ack(stream=1, prompt_tokens=3),
        event(1, 0, [4, 5]),
        batch([1, 2], [2, 0]),
        batch([2, 1], [1, 3], [2, 0]),
        end(1, [4, 5, 7]),
        end(2, [7, 7, 7]),
    ]
    gone = Goaway(code=int(ErrorCode.DRAINING), last_stream=2)
    cancelled = end(1, [4], Finish.CANCELLED)
    return [
        asking_client("events, batches and ends", 2).peer(*generation).hears(*generation).open(),
        asking_client("a stream twice in one batch goes on where it was")
        .peer(batch([1, 1], [0, 1]))
        .hears(batch([1, 1], [0, 1]))
        .open(),
        asking_client("a cancelled stream is open until its end")
        .app(Cancel(stream=1))
        .sends(Cancel(stream=1))
        .peer(event(1, 0, [4]), cancelled)
        .hears(event(1, 0, [4]), cancelled)
        .open(),
        asking_client("what runs goes on after GOAWAY", 2)
        .peer(gone, Result(stream=1))
        .hears(gone, Result(stream=1))
        .open(),
        asking_client("an error ends one stream", 2)
        .peer(Failure(stream=1, code=int(ErrorCode.BUSY), message=""))
        .hears(Failure(stream=1, code=int(ErrorCode.BUSY), message=""))
        .open()
        .peer(Result(stream=2))
        .hears(Result(stream=2))
        .open(),
        wrong("a gap at the start", event(1, 1, [4])),
        wrong("a gap", event(1, 0, [4]), event(1, 2, [4])),
        wrong("a repeat", event(1, 0, [4]), event(1, 0, [4])),
        wrong("a gap in a batch", batch([1, 2], [0, 1])),
        wrong("a stream twice in a batch at one index", batch([1, 1], [0, 0])),
        wrong("an event for a stream that was never opened", event(9, 0, [4])),
        wrong("an event for stream 0", event(0, 0, [4])),
        wrong("an event after the end", end(1, []), event(1, 0, [4])),
        wrong("a batch for a stream that has ended", Result(stream=1), batch([1], [0])),
        wrong("an end that counts too few", event(1, 0, [4, 4]), end(1, [4])),
        wrong("an end that counts too many", event(1, 0, [4, 4]), end(1, [4, 4, 4])),
        wrong("two ends", end(1, []), end(1, [])),
        wrong("an end and a result", end(1, []), Result(stream=1)),
        wrong(
            "a result and an error", Result(stream=1), Failure(stream=1, code=0x0407, message="")
        ),
        wrong("an acknowledgement of nothing", Ack(stream=9)),
        wrong("an acknowledgement after the end", Result(stream=1), Ack(stream=1)),
        wrong("an end of stream 0", end(0, [])),
    ]


def time() -> list[Script]:
    ping = Ping(payload=b"abcdefgh")
    many = [frame(Kind.PING, PING_META)] * 8
    pongs = [Pong()] * 8
    return [
        greeted_server("a ping is answered with its bytes")
        .peer(ping)
        .hears()
        .sends(Pong(payload=b"abcdefgh"))
        .open(),
        greeted_server("a burst of pings is answered, one more is a flood")
        .peer(*many)
        .sends(*pongs)
        .open()
        .wait(0.9)
        .peer(Ping())
        .hears()
        .fails(ErrorCode.FLOOD, tagged(Goaway(code=int(ErrorCode.FLOOD)))),
        greeted_server("the allowance of pings grows with time")
        .peer(*many)
        .sends(*pongs)
        .wait(1)
        .peer(Ping())
        .sends(Pong())
        .wait(1)
        .peer(Ping())
        .sends(Pong())
        .open(),
        greeted_client("a client answers pings, too")
        .peer(ping)
        .hears()
        .sends(Pong(payload=b"abcdefgh")),
        greeted_client("a server's pings can be a flood, too")
        .peer(*many)
        .sends(*pongs)
        .peer(Ping())
        .hears()
        .fails(ErrorCode.FLOOD),
        greeted_server("a pong that nobody asked for is ignored")
        .peer(Pong())
        .hears()
        .sends()
        .open(),
        greeted_server("a silent peer is asked, then given up")
        .wait(19.9)
        .sends()
        .wait(0.2)
        .sends(ASKS)
        .wait(10)
        .sends()
        .wait(10.1)
        .sends(ASKS)
        .wait(19.7)
        .open()
        .wait(0.2)
        .fails(ErrorCode.PEER_SILENT),
        greeted_client("a silent server is asked, then given up")
        .wait(20.1)
        .sends(ASKS)
        .wait(20.1)
        .sends(ASKS)
        .wait(20.1)
        .fails(ErrorCode.PEER_SILENT),
        greeted_server("any byte ends the silence")
        .wait(59)
        .sends(ASKS)
        .peer(b"\x06")
        .wait(9.9)
        .open(),
        Script("credit reaches an open stream only", "server", features=("credit",))
        .peer(PREFACE, Hello(features=("credit",)))
        .hears(Hello(features=("credit",)))
        .sends(welcome(("credit",)))
        .peer(Credit(stream=1, amount=1))
        .hears()
        .peer(request(), Credit(stream=1, amount=2**32 - 1), Credit(stream=0, amount=3))
        .hears(request(), Credit(stream=1, amount=2**32 - 1))
        .app(Result(stream=1))
        .sends(Result(stream=1))
        .peer(Credit(stream=1, amount=1))
        .hears()
        .open(),
        greeted_server("credit is an unknown kind where nobody counts")
        .peer(request(), Credit(stream=1, amount=1))
        .hears(request())
        .fails(ErrorCode.UNKNOWN_KIND),
        Script("a passive peer is not asked and not given up", "server", features=("passive",))
        .peer(PREFACE, Hello(features=("passive",)))
        .hears(Hello(features=("passive",)))
        .sends(welcome(("passive",)))
        .wait(10_000)
        .sends()
        .open(),
    ]


def floods() -> list[Script]:
    """Return what a server does about a peer that makes it work for nothing."""
    bad = [frame(Kind.REQ, pack(fields_of(key=b"short")), stream=i) for i in range(1, 5)]
    refused = [failure(i, ErrorCode.BAD_META) for i in range(1, 5)]
    half = frame(Kind.REQ, bytes(2 * 64 - 16), stream=1)[:-1]  # two seconds

    def gone(last_stream: int) -> dict[str, Any]:
        said: dict[str, Any] = tagged(Goaway(code=int(ErrorCode.FLOOD), last_stream=last_stream))
        return said

    def server(name: str) -> Script:
        return greeted_server(name, fault_burst=3, faults_per_s=2.0)

    def slow_server(name: str) -> Script:
        return greeted_server(name, frame_bytes_per_s=64)

    return [
        server("cancels of nothing are a flood at last")
        .peer(*[Cancel(stream=i) for i in range(3)])
        .open()
        .peer(Cancel(stream=1))
        .hears()
        .fails(ErrorCode.FLOOD, gone(0)),
        server("cancels of open streams count like others")
        .peer(request(), *[Cancel(stream=1)] * 3)
        .hears(request(), *[Cancel(stream=1)] * 3)
        .open()
        .peer(Cancel(stream=1))
        .hears()
        .fails(ErrorCode.FLOOD, gone(1)),
        server("requests that fail are answered, one too many is a flood")
        .peer(*bad)
        .hears()
        .fails(ErrorCode.FLOOD, *refused, gone(4)),
        server("requests that turn out to be wrong later count, too")
        .peer(*[request(stream=i) for i in range(1, 6)])
        .hears(*[request(stream=i) for i in range(1, 6)])
        .app(*[Failure(stream=i, code=int(ErrorCode.BAD_PARAMS), message="") for i in range(1, 5)])
        .fails(ErrorCode.FLOOD, *[failure(i, ErrorCode.BAD_PARAMS) for i in range(1, 5)], gone(5)),
        server("what is not the peer's doing does not count")
        .peer(*[request(stream=i) for i in range(1, 6)])
        .hears(*[request(stream=i) for i in range(1, 6)])
        .app(*[Failure(stream=i, code=int(ErrorCode.WORKER_LOST), message="") for i in range(1, 6)])
        .sends(*[failure(i, ErrorCode.WORKER_LOST) for i in range(1, 6)])
        .open(),
        server("the allowance of faults grows with time")
        .peer(*bad[:3])
        .sends(*refused[:3])
        .wait(0.5)
        .peer(bad[3])
        .sends(refused[3])
        .open()
        .peer(Pong())
        .fails(ErrorCode.FLOOD, gone(4)),
        greeted_server("one request too many at once is a fault", fault_burst=1, streams=1)
        .peer(request(), request(stream=2))
        .hears(request())
        .sends(failure(2, ErrorCode.BUSY))
        .peer(request(stream=3))
        .fails(ErrorCode.FLOOD, failure(3, ErrorCode.BUSY), gone(3)),
        greeted_server("a header may take as long as the grace")
        .peer(b"\x06")
        .wait(9.99)
        .open()
        .wait(0.02)
        .fails(ErrorCode.FLOOD, gone(0)),
        slow_server("a frame may take longer the more it has")
        .peer(half)
        .wait(11.99)
        .open()
        .wait(0.02)
        .fails(ErrorCode.FLOOD, gone(0)),
        slow_server("each frame has its own time")
        .peer(half)
        .wait(11)
        .peer(b"\0" + half)
        .sends(failure(1, ErrorCode.BAD_META))
        .wait(11)
        .open()
        .wait(1.01)
        .fails(ErrorCode.FLOOD, gone(1)),
        asking_client("a client is patient with what trickles").peer(half[:1]).wait(19.9).open(),
    ]


def resumed() -> list[Script]:
    """Return what RESUME opens, and what it may not."""
    features = ("resume",)

    def resume(stream: int) -> Resume:
        return Resume(stream=stream, key=KEY, next_index=2)

    def server(name: str, **limits: Any) -> Script:
        script = Script(name, "server", features=features, **limits)
        greeting = Hello(features=features)
        return script.peer(PREFACE, greeting).hears(greeting).sends(welcome(features))

    def client(name: str) -> Script:
        script = Script(name, "client", features=features).sends_bytes(PREFACE)
        greeting = Welcome(features=features)
        script.sends(hello(features)).peer(greeting).hears(greeting)
        return script.app(resume(1)).sends(resume(1))

    bad = frame(Kind.RESUME, pack([b"short", 0]), stream=1)
    whole = end(1, [4, 5, 6])
    return [
        client("a resumed answer goes on where its client was")
        .peer(Ack(stream=1), event(1, 2, [6]), whole)
        .hears(Ack(stream=1), event(1, 2, [6]), whole)
        .open(),
        client("a resumed answer does not begin again")
        .peer(event(1, 0, [4]))
        .hears()
        .fails(SEQUENCE),
        client("a resumed answer counts the whole").peer(end(1, [6])).hears().fails(SEQUENCE),
        server("a bad RESUME fails alone")
        .peer(bad, resume(2))
        .hears(resume(2))
        .sends(failure(1, ErrorCode.BAD_META))
        .open(),
        server("RESUME takes a number like any request")
        .peer(request(stream=2), resume(2))
        .hears(request(stream=2))
        .fails(SEQUENCE),
        server("RESUME is busy like any request", streams=1)
        .peer(request(), resume(2))
        .hears(request())
        .sends(failure(2, ErrorCode.BUSY))
        .open(),
        greeted_server("RESUME without the feature").peer(resume(1)).hears().fails(UNKNOWN_KIND),
    ]


def workers() -> list[Script]:
    submit = Submit(stream=1, op="generate", key=KEY, attempt=2, so_far=[5, 6])
    step = Step(streams=[1], attempts=[2], first_indexes=[2], counts=None, tokens=[7], texts=["t"])
    ready = Heartbeat(state="ready", card={"tasks": ["generate"]})
    return [
        Script("a worker is greeted, says it is ready and works", "worker")
        .peer(PREFACE, Hello())
        .hears(Hello())
        .sends(welcome())
        .app(ready)
        .sends(ready)
        .peer(submit)
        .hears(submit)
        .app(Ack(stream=1), step, end(1, [5, 6, 7]))
        .sends(Ack(stream=1), step, end(1, [5, 6, 7]))
        .open(),
        Script("a worker fails one bad submit", "worker")
        .peer(PREFACE, Hello(), frame(Kind.SUBMIT, pack(["x", KEY, 0]), stream=1))
        .hears(Hello())
        .sends(welcome(), failure(1, ErrorCode.BAD_META))
        .open(),
        Script("a request on a worker link", "worker")
        .peer(PREFACE, Hello(), request())
        .hears(Hello())
        .fails(UNKNOWN_KIND, welcome()),
        Script("a gateway hears steps, and drops the end of what it gave up", "dispatcher")
        .sends_bytes(PREFACE)
        .sends(hello())
        .peer(Welcome(), ready)
        .hears(Welcome(), ready)
        .app(submit)
        .sends(submit)
        .peer(step, end(77, []))
        .hears(step)
        .open()
        .peer(end(1, [5, 6, 7]))
        .hears(end(1, [5, 6, 7]))
        .open(),
    ]


def script_vectors() -> list[dict[str, Any]]:
    """Return all golden exchanges, in the order of the file."""
    scripts = [
        *greeting(), *streams(), *answers(), *farewells(), *resumed(), *time(), *floods(),
        *workers(),
    ]  # fmt: skip
    vectors = [script.vector() for script in scripts]
    names = [vector["name"] for vector in vectors]
    assert len(set(names)) == len(names), sorted(n for n in set(names) if names.count(n) > 1)
    return vectors
