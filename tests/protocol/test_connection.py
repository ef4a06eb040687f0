"""The state machine of a connection: who may send what, when, and what follows a violation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tensorwire_protocol.codec import decode
from tensorwire_protocol.connection import (
    FEATURE_CREDIT,
    FEATURE_PASSIVE,
    FEATURE_RESUME,
    NOT_OURS,
    Connection,
)
from tensorwire_protocol.errors import (
    BadFraming,
    BadMeta,
    BadPreface,
    BadTensor,
    BadVersion,
    Busy,
    ConnectionLost,
    ErrorCode,
    Executed,
    Flood,
    FrameTooLarge,
    HandshakeTimeout,
    OutputTooLarge,
    PeerSilent,
    SequenceError,
    TensorwireError,
    TooLarge,
    UnknownKind,
)
from tensorwire_protocol.frames import HEADER, PREFACE, Flag, Frame, build_frame
from tensorwire_protocol.limits import MIN_FRAME_BYTES, Limits
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
    Hello,
    Kind,
    Message,
    Ping,
    Pong,
    Request,
    Result,
    Resume,
    Submit,
    Welcome,
)
from tensorwire_protocol.roles import ACCEPTS, OPENERS, PEER, Role, State

from .samples import EXAMPLES, KEY, cut, end, event, plain, request, wire

BY_KIND = {int(m.KIND): m for m in EXAMPLES}


def output(connection: Connection) -> bytes:
    return b"".join(connection.take_output())


def last_words(connection: Connection) -> TensorwireError:
    """Return the error in the last frame that the connection sent."""
    *_, frame = cut(output(connection))
    assert (frame.kind, frame.stream) == (Kind.ERR, 0)
    failure = _decode(frame)
    assert isinstance(failure, Failure)
    return failure.to_error()


def _decode(frame: Frame) -> Message:
    return decode(frame, Limits())


def sent(connection: Connection) -> list[Message]:
    """Return the messages that the connection has sent."""
    return [_decode(frame) for frame in cut(output(connection))]


def open_pair(
    role: Role = Role.CLIENT, *, near: Limits | None = None, far: Limits | None = None
) -> tuple[Connection, Connection]:
    """Return a connection of an opening role and its peer, both greeted."""
    opener, answerer = Connection(role, limits=near), Connection(PEER[role], limits=far)
    answerer.feed(output(opener))
    opener.feed(output(answerer))
    assert opener.state is answerer.state is State.OPEN
    return opener, answerer


def open_end(role: Role, limits: Limits | None = None) -> Connection:
    """Return one greeted end."""
    if role in OPENERS:
        return open_pair(role, near=limits)[0]
    return open_pair(PEER[role], far=limits)[1]


# -- greeting -------------------------------------------------------------------------------------


def test_a_client_begins_with_the_preface_and_hello() -> None:
    assert output(Connection(Role.CLIENT)).hex() == (
        "945457310d0a1a0a06000000 01 00 0000 00000000 06000000 95 01 90 80 a0 c0".replace(" ", "")
    )


def test_a_server_is_silent_until_it_is_greeted() -> None:
    server = Connection(Role.SERVER)
    assert (server.state, output(server)) == (State.PREFACE, b"")
    server.feed(PREFACE)
    assert (server.state, output(server)) == (State.HANDSHAKE, b"")
    server.feed(wire(Hello()))
    assert [type(m) for m in sent(server)] == [Welcome]


@pytest.mark.parametrize("opener", sorted(OPENERS, key=str))
@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_both_ends_learn_of_each_other(opener: Role, piece: int) -> None:
    near = Connection(opener, software="near/1", features=("a", "b"), limits=Limits(streams=3))
    far = Connection(PEER[opener], software="far/2", features=("b", "c"), session=b"s")
    greeting = output(near)
    heard = [
        m for at in range(0, len(greeting), piece) for m in far.feed(greeting[at : at + piece])
    ]
    (welcome,) = near.feed(output(far))
    assert [type(m) for m in heard] == [Hello]
    assert isinstance(welcome, Welcome)
    assert (welcome.features, welcome.session, welcome.software) == (("b",), b"s", "far/2")
    assert (near.peer_features, far.peer_features) == (("b",), ("a", "b"))
    assert (near.peer_software, far.peer_software) == ("far/2", "near/1")
    assert near.peer_limits == far.limits
    assert far.peer_limits == near.limits


def test_that_an_end_was_greeted_is_known_after_it_is_closed() -> None:
    opener, answerer = open_pair()
    unheard = Connection(Role.CLIENT)
    for one in (opener, answerer, unheard):
        one.close()
    assert (opener.was_greeted, answerer.was_greeted, unheard.was_greeted) == (True, True, False)


def test_requests_may_follow_hello_at_once_and_are_answered_after_welcome() -> None:
    client, server = Connection(Role.CLIENT), Connection(Role.SERVER)
    client.send(request(1))
    heard = server.feed(output(client))
    assert [type(m) for m in heard] == [Hello, Request]
    server.send(Result(stream=1))
    assert [type(m) for m in client.feed(output(server))] == [Welcome, Result]


def test_a_large_request_may_follow_hello_at_once() -> None:
    client, server = Connection(Role.CLIENT), Connection(Role.SERVER)
    client.send(request(1, inputs={"x": np.zeros(100_000, np.uint8)}))
    data = output(client)
    heard = server.feed(data[:60]) + server.feed(data[60:])
    assert [type(m) for m in heard] == [Hello, Request]


def test_what_a_server_sends_before_it_is_greeted_leaves_behind_its_welcome() -> None:
    client, server = Connection(Role.CLIENT), Connection(Role.SERVER)
    server.send(Goaway(code=ErrorCode.DRAINING))
    assert (output(server), server.pending_bytes) == (b"", 0)
    server.feed(output(client))
    assert [type(m) for m in client.feed(output(server))] == [Welcome, Goaway]


STRANGERS = {
    "HTTP": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "TLS": bytes.fromhex("1603010200010001fc0303"),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9\r\n",
    "another major version": b"\x94TW2\r\n\x1a\n",
    "newlines mangled": b"\x94TW1\n\x1a\n\0",
    "zeros": bytes(8),
    "the last byte is wrong": PREFACE[:-1] + b"\r",
    "a frame without a preface": wire(Hello()),
}


@pytest.mark.parametrize("data", STRANGERS.values(), ids=STRANGERS)
@pytest.mark.parametrize("piece", [1, 2, 5, 1000])
@pytest.mark.parametrize("role", [Role.SERVER, Role.WORKER])
def test_a_stranger_gets_one_line_of_text_and_nothing_else(
    data: bytes, piece: int, role: Role
) -> None:
    server = Connection(role)
    for at in range(0, len(data), piece):
        assert server.feed(data[at : at + piece]) == []
    assert output(server) == NOT_OURS
    assert NOT_OURS.isascii()
    assert NOT_OURS.count(b"\n") == 1
    assert server.is_closed
    assert isinstance(server.error, BadPreface)
    assert server.feed(PREFACE + wire(Hello())) == []
    assert output(server) == b""


@pytest.mark.parametrize("version", [0, 2, 2**32 - 1])
def test_another_version_is_refused(version: int) -> None:
    server = Connection(Role.SERVER)
    assert server.feed(PREFACE + wire(Hello(version=version))) == []
    assert isinstance(last_words(server), BadVersion)
    assert server.is_closed


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("kind", [*Kind, 0x7F, 0x80, 0xFF])
def test_nothing_but_the_greeting_or_a_farewell_is_heard_first(role: Role, kind: int) -> None:
    connection = Connection(role)
    output(connection)
    opening = b"" if role in OPENERS else PREFACE
    message = BY_KIND.get(kind)
    frame = wire(message) if message else build_frame(kind, 0, b"")
    heard = connection.feed(opening + frame)
    greeting = Kind.WELCOME if role in OPENERS else Kind.HELLO
    if kind == greeting:
        assert [m.KIND for m in heard] == [greeting]
        assert connection.state is State.OPEN
    else:
        assert heard == []
        assert isinstance(last_words(connection), SequenceError | UnknownKind)
        assert connection.is_closed


@pytest.mark.parametrize("role", [Role.SERVER, Role.CLIENT])
def test_a_second_greeting_is_a_violation(role: Role) -> None:
    connection = open_end(role)
    connection.feed(wire(Welcome() if role is Role.CLIENT else Hello()))
    assert isinstance(connection.error, SequenceError)


@pytest.mark.parametrize(("size", "fits"), [(4095, True), (4096, True), (4097, False)])
def test_hello_is_small(size: int, fits: bool) -> None:
    server = Connection(Role.SERVER)
    hello = wire(Hello(software="x" * 4000))
    hello = wire(Hello(software="x" * (4000 + size + 16 - len(hello))))
    assert len(hello) - 16 == size
    server.feed(PREFACE + hello)
    assert (server.error is None) == fits
    if not fits:
        assert isinstance(last_words(server), FrameTooLarge)


@pytest.mark.parametrize(
    ("limits", "fits"),
    [
        ({"frame_bytes": MIN_FRAME_BYTES}, True),
        ({"frame_bytes": MIN_FRAME_BYTES - 1}, False),
        ({"server_meta_bytes": MIN_FRAME_BYTES - 1}, False),
        ({"frame_bytes": 0}, False),
        ({"streams": 0, "unknown": [1], "frame_bytes": "many"}, True),
    ],
)
def test_a_peer_must_accept_enough_for_an_error_to_reach_it(limits: Any, fits: bool) -> None:
    server = Connection(Role.SERVER)
    server.feed(PREFACE + wire(Hello(limits=limits)))
    assert (server.state is State.OPEN) == fits
    assert fits or isinstance(last_words(server), BadFraming)


# -- RESUME ---------------------------------------------------------------------------------------


def resuming_pair() -> tuple[Connection, Connection]:
    client = Connection(Role.CLIENT, features=(FEATURE_RESUME,))
    server = Connection(Role.SERVER, features=(FEATURE_RESUME, "other"))
    server.feed(output(client))
    client.feed(output(server))
    assert client.can_resume
    assert server.can_resume
    return client, server


def test_resume_opens_a_stream_whose_events_go_on_at_its_index() -> None:
    client, server = resuming_pair()
    client.send(Resume(stream=1, key=KEY, next_index=7, next_char=9))
    (heard,) = server.feed(output(client))
    assert isinstance(heard, Resume)
    assert (heard.key, heard.next_index, heard.next_char) == (KEY, 7, 9)
    assert server.is_open(1)
    server.send(Event(stream=1, index=7, tokens=[3], text="x"))
    server.send(End(stream=1, finish=Finish.STOP, count=8, checksum=0))
    assert [type(m) for m in client.feed(output(server))] == [Event, End]
    assert (client.num_streams, server.num_streams) == (0, 0)


@pytest.mark.parametrize("index", [0, 6, 8])
def test_a_resumed_stream_may_not_repeat_nor_skip_tokens(index: int) -> None:
    client, server = resuming_pair()
    client.send(Resume(stream=1, key=KEY, next_index=7))
    server.feed(output(client))
    server.send(Event(stream=1, index=index, tokens=[3], text="x"))
    client.feed(output(server))
    assert isinstance(client.error, SequenceError)


@pytest.mark.parametrize("side", ["client", "server"])
def test_resume_is_refused_where_one_side_does_not_know_it(side: str) -> None:
    features = {"client": (), "server": ()} | {side: (FEATURE_RESUME,)}
    client = Connection(Role.CLIENT, features=features["client"])
    server = Connection(Role.SERVER, features=features["server"])
    server.feed(output(client))
    client.feed(output(server))
    assert (client.can_resume, server.can_resume) == (False, False)
    server.feed(wire(Resume(stream=1, key=KEY, next_index=0)))
    assert isinstance(last_words(server), UnknownKind)


# -- CREDIT ---------------------------------------------------------------------------------------


def test_credit_reaches_the_driver_while_its_stream_is_open() -> None:
    client = Connection(Role.CLIENT, features=(FEATURE_CREDIT,))
    server = Connection(Role.SERVER, features=(FEATURE_CREDIT,))
    server.feed(output(client))
    client.feed(output(server))
    assert client.has_credit
    assert server.has_credit
    client.send(request(1, credit=2))
    client.send(Credit(stream=1, amount=3))
    asked, credit = server.feed(output(client))
    assert isinstance(asked, Request)
    assert isinstance(credit, Credit)
    assert (asked.credit, credit.amount) == (2, 3)
    assert server.feed(wire(Credit(stream=2, amount=3)) + wire(Credit(stream=0, amount=3))) == []
    server.send(Result(stream=1))
    client.send(Credit(stream=1, amount=3))  # crosses the result
    assert server.feed(output(client)) == []
    assert not server.is_closed


@pytest.mark.parametrize("side", ["client", "server"])
def test_credit_is_refused_where_one_side_does_not_know_it(side: str) -> None:
    features = {"client": (), "server": ()} | {side: (FEATURE_CREDIT,)}
    client = Connection(Role.CLIENT, features=features["client"])
    server = Connection(Role.SERVER, features=features["server"])
    server.feed(output(client))
    client.feed(output(server))
    client.send(request(1))
    server.feed(output(client) + wire(Credit(stream=1, amount=1)))
    assert isinstance(last_words(server), UnknownKind)


# -- who may send what ----------------------------------------------------------------------------

NOT_NEGOTIATED = {Kind.DATA, Kind.CREDIT, Kind.AUTH, Kind.RESUME, Kind.LOAD, Kind.SHM}


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("kind", [*Kind, 0x00, 0x08, 0x7F])
def test_a_kind_is_heard_by_its_roles_only(role: Role, kind: int) -> None:
    connection = open_end(role)
    if role in OPENERS:  # so that answers have something to answer
        opening = (
            request(1) if role is Role.CLIENT else Submit(stream=1, op="x", key=KEY, attempt=1)
        )
        connection.send(opening)
        output(connection)
    message = BY_KIND.get(kind)
    heard = connection.feed(wire(message) if message else build_frame(kind, 0, b"\xc0"))
    if kind not in ACCEPTS[role] or kind in NOT_NEGOTIATED:
        assert heard == []
        assert isinstance(last_words(connection), UnknownKind)
        assert connection.is_closed
    elif kind in (Kind.HELLO, Kind.WELCOME) or (kind == Kind.ERR and role not in OPENERS):
        assert isinstance(connection.error, SequenceError)
    elif kind in (Kind.PING, Kind.PONG, Kind.CANCEL):
        assert (heard, connection.is_closed) == ([], False)
    else:
        assert [m.KIND for m in heard] == [kind]
        assert not connection.is_closed


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("kind", Kind)
def test_a_role_cannot_send_what_its_peer_would_refuse(role: Role, kind: Kind) -> None:
    connection = open_end(role)
    if kind not in ACCEPTS[PEER[role]]:
        with pytest.raises(AssertionError, match="may not send"):
            connection.send(BY_KIND[kind])
        assert output(connection) == b""


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("kind", [0x80, 0xA5, 0xFF])
def test_kinds_of_later_versions_are_skipped(role: Role, kind: int) -> None:
    connection = open_end(role)
    strange = HEADER.pack(5, kind, 0xFF, 9, 3, 2) + b"other"
    assert connection.feed(strange + strange) == []
    assert (connection.is_closed, output(connection)) == (False, b"")


@pytest.mark.parametrize("message", [Ping(), Pong(), Goaway(), Hello()], ids=repr)
def test_what_speaks_of_the_connection_stands_on_stream_0(message: Message) -> None:
    server = open_end(Role.SERVER)
    frame = bytearray(wire(message))
    frame[8] = 5
    server.feed(bytes(frame))
    assert isinstance(last_words(server), BadFraming)


# -- violations end the connection ----------------------------------------------------------------

VIOLATIONS: dict[str, tuple[bytes, type[TensorwireError]]] = {
    "a frame of 4 GiB": (HEADER.pack(2**32 - 1, Kind.REQ, 0, 0, 1, 0), FrameTooLarge),
    "garbage": (b"\xde\xad\xbe\xef" * 8, FrameTooLarge),
    "zeros": (bytes(16), UnknownKind),
    "a meta that is no msgpack": (build_frame(Kind.CANCEL, 1, b"\xc1"), BadFraming),
    "a meta of the wrong shape": (build_frame(Kind.CANCEL, 1, b"\x90"), BadFraming),
    "reserved flags": (build_frame(Kind.PING, 0, b"\xc0", flags=2), BadFraming),
    "a request on stream 0": (wire(request(0)), SequenceError),
    "an answer to nothing": (wire(end(1, 0)), UnknownKind),
    "an error about a stream": (wire(Failure(stream=1, code=1, message="")), SequenceError),
    "a large meta": (wire(Cancel(stream=1, reason="x" * 17_000)), BadFraming),
}


@pytest.mark.parametrize(("data", "error"), VIOLATIONS.values(), ids=VIOLATIONS)
@pytest.mark.parametrize("piece", [1, 16, 100_000])
def test_a_violation_ends_the_connection_with_one_error(
    data: bytes, error: type[TensorwireError], piece: int
) -> None:
    server = open_end(Role.SERVER)
    for at in range(0, len(data), piece):
        assert server.feed(data[at : at + piece]) == []
    assert type(server.error) is error
    assert type(last_words(server)) is error
    assert server.is_closed
    assert len(server.get_buffer()) > 0  # a loop may read once more before it closes the socket
    assert server.feed(wire(request(1))) == []
    with pytest.raises(error):
        server.send(Pong())


def test_what_came_before_a_violation_is_still_heard() -> None:
    server = open_end(Role.SERVER)
    heard = server.feed(wire(request(1)) + wire(request(1)) + wire(request(2)))
    assert [plain(m) for m in heard] == [plain(request(1))]
    assert isinstance(server.error, SequenceError)


def test_half_a_frame_is_noticed_at_the_end() -> None:
    server = open_end(Role.SERVER)
    server.feed(wire(request(1))[:-1])
    assert server.is_mid_frame
    assert server.num_streams == 0


def test_an_error_about_the_connection_ends_it() -> None:
    client = open_end(Role.CLIENT)
    (failure,) = client.feed(wire(Failure(stream=0, code=ErrorCode.FLOOD, message="enough")))
    assert isinstance(failure, Failure)
    assert isinstance(client.error, Flood)
    assert (client.is_closed, output(client)) == (True, b"")


def test_an_error_about_the_connection_keeps_its_number_and_meaning() -> None:
    client = Connection(Role.CLIENT)
    client.feed(wire(Failure(stream=0, code=ErrorCode.BUSY, message="full", retryable=True)))
    assert isinstance(client.error, Busy)
    assert client.error.retryable


def test_a_closed_connection_keeps_nothing_that_came_behind_the_last_word() -> None:
    client, _ = open_pair()
    client.feed(wire(Failure(stream=0, code=ErrorCode.BUSY, message="m")) + b"half a frame")
    stranger = Connection(Role.SERVER)
    stranger.feed(b"GET / HTTP/1.1")
    for closed in (client, stranger):
        assert closed.is_closed
        assert not closed.is_mid_frame


def test_nothing_is_sent_on_a_closed_connection() -> None:
    client = open_end(Role.CLIENT)
    client.close()
    with pytest.raises(ConnectionLost) as caught:
        client.send(request(1))
    assert caught.value.executed is Executed.NO
    assert (output(client), client.num_streams) == (b"", 0)
    client.fail(SequenceError("too late"))
    assert (output(client), client.error) == (b"", None)


# -- streams --------------------------------------------------------------------------------------


def test_streams_may_skip_numbers_but_not_fall() -> None:
    server = open_end(Role.SERVER)
    assert len(server.feed(wire(request(5)) + wire(request(6)) + wire(request(900)))) == 3
    assert (server.open_streams(), server.last_stream) == ([5, 6, 900], 900)
    server.feed(wire(request(7)))
    assert isinstance(server.error, SequenceError)


@pytest.mark.parametrize("stream", [4, 5])
def test_a_stream_number_is_not_used_again_even_after_its_end(stream: int) -> None:
    server = open_end(Role.SERVER)
    server.feed(wire(request(5)))
    server.send(end(5, 0))
    server.feed(wire(request(stream)))
    assert isinstance(server.error, SequenceError)


def bad_request(stream: int, meta: bytes, *, flags: int = 0, aux: int = 0) -> bytes:
    return build_frame(Kind.REQ, stream, meta, flags=flags, aux=aux)


GOOD_META = bytes(cut(wire(request(1)))[0].meta)
BAD_REQUESTS: dict[str, tuple[bytes, ErrorCode]] = {
    "no msgpack": (bad_request(1, b"\xc1"), ErrorCode.BAD_META),
    "no fields": (bad_request(1, b"\x90"), ErrorCode.BAD_META),
    "an empty meta": (bad_request(1, b""), ErrorCode.BAD_META),
    "a short key": (wire(request(1, key=b"short")), ErrorCode.BAD_META),
    "an ext type": (bad_request(1, b"\xd4\x05\x00"), ErrorCode.BAD_TENSOR),
    "a body that was not negotiated": (
        HEADER.pack(8 + len(GOOD_META), Kind.REQ, Flag.BODY, 1, 1, len(GOOD_META))
        + bytes(8)
        + GOOD_META,
        ErrorCode.UNSUPPORTED,
    ),
    "a meta above the limit": (
        wire(request(1, inputs={"prompt": "x" * 16 * 1024})),
        ErrorCode.TOO_LARGE,
    ),
}


@pytest.mark.parametrize(("data", "code"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_a_bad_request_is_answered_on_its_stream_and_the_connection_lives(
    data: bytes, code: ErrorCode
) -> None:
    server = open_end(Role.SERVER)
    heard = server.feed(data + wire(request(2)))
    assert [plain(m) for m in heard] == [plain(request(2))]
    assert server.open_streams() == [2]
    (failure,) = sent(server)
    assert isinstance(failure, Failure)
    assert (failure.stream, failure.code, failure.executed) == (1, code, Executed.NO)
    assert not server.is_closed


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_streams_above_the_limit_are_busy_until_one_ends(limit: int) -> None:
    client, server = open_pair(far=Limits(streams=limit))
    for _ in range(limit + 1):
        client.send(request(client.next_stream()))
    assert len(server.feed(output(client))) == limit
    (busy,) = client.feed(output(server))
    assert isinstance(busy, Failure)
    error = busy.to_error()
    assert isinstance(error, Busy)
    assert (busy.stream, error.retryable, error.executed) == (limit + 1, True, Executed.NO)
    server.send(end(1, 0))
    client.feed(output(server))
    client.send(request(client.next_stream()))
    assert len(server.feed(output(client))) == 1
    assert client.num_streams == server.num_streams == limit


def streaming_client() -> Connection:
    """Return a client whose streams 1 to 3 are open."""
    client = open_end(Role.CLIENT)
    for stream in (1, 2, 3):
        client.send(request(stream))
    output(client)
    return client


def batch(streams: list[int], firsts: list[int], counts: list[int] | None = None) -> EventBatch:
    num_tokens = len(streams) if counts is None else sum(counts)
    return EventBatch(
        streams=streams,
        first_indexes=firsts,
        counts=counts,
        tokens=[7] * num_tokens,
        texts=["a"] * len(streams),
    )


def test_tokens_are_counted_through_events_and_batches_up_to_the_end() -> None:
    client = streaming_client()
    messages: list[Message] = [
        Ack(stream=1, prompt_tokens=3),
        event(1, 0, [4, 5]),
        batch([1, 2], [2, 0]),
        batch([2, 1], [1, 3], [2, 0]),
        event(1, 3, []),
        end(1, 3),
        end(2, 3),
        end(3, 0),
    ]
    for message in messages:
        assert [plain(m) for m in client.feed(wire(message))] == [plain(message)]
    assert (client.num_streams, client.error) == (0, None)


WRONG_ANSWERS: dict[str, list[Message]] = {
    "a gap at the start": [event(1, 1, [4])],
    "a gap": [event(1, 0, [4]), event(1, 2, [4])],
    "a repeat": [event(1, 0, [4]), event(1, 0, [4])],
    "a step back": [event(1, 0, [4, 4]), event(1, 1, [4])],
    "a gap in a batch": [batch([1, 2], [0, 1])],
    "a stream twice in a batch at one index": [batch([1, 1], [0, 0])],
    "an event for a stream that was never opened": [event(9, 0, [4])],
    "an event for stream 0": [event(0, 0, [4])],
    "an event after the end": [end(1, 0), event(1, 0, [4])],
    "a batch for a stream that ended": [end(1, 0), batch([1], [0])],
    "an end that counts too few": [event(1, 0, [4, 4]), end(1, 1)],
    "an end that counts too many": [event(1, 0, [4, 4]), end(1, 3)],
    "two ends": [end(1, 0), end(1, 0)],
    "an end and a result": [end(1, 0), Result(stream=1)],
    "a result and an error": [Result(stream=1), Failure(stream=1, code=0x0407, message="")],
    "an acknowledgement of nothing": [Ack(stream=9)],
    "an acknowledgement after the end": [Result(stream=1), Ack(stream=1)],
    "an end of stream 0": [end(0, 0)],
}


@pytest.mark.parametrize("messages", WRONG_ANSWERS.values(), ids=WRONG_ANSWERS)
def test_an_answer_out_of_sequence_ends_the_connection(messages: list[Message]) -> None:
    client = streaming_client()
    *before, wrong = messages
    for message in before:
        assert len(client.feed(wire(message))) == 1
    assert client.feed(wire(wrong)) == []
    assert isinstance(client.error, SequenceError)
    assert client.error.executed is Executed.MAYBE


def test_a_stream_twice_in_a_batch_goes_on_where_it_was() -> None:
    client = streaming_client()
    assert len(client.feed(wire(batch([1, 1], [0, 1])))) == 1


def test_a_dispatcher_drops_the_end_of_an_attempt_it_gave_up() -> None:
    dispatcher = open_end(Role.DISPATCHER)
    assert dispatcher.feed(wire(end(77, 3))) == []
    assert not dispatcher.is_closed


def test_cancels_of_streams_that_are_not_open_are_ignored() -> None:
    server = open_end(Role.SERVER)
    server.feed(wire(request(1)))
    assert server.feed(wire(Cancel(stream=2)) + wire(Cancel(stream=0))) == []
    (cancel,) = server.feed(wire(Cancel(stream=1)))
    assert isinstance(cancel, Cancel)
    server.send(end(1, 0, Finish.CANCELLED))
    assert server.feed(wire(Cancel(stream=1))) == []
    assert not server.is_closed


def test_a_cancelled_stream_is_open_until_its_end_comes() -> None:
    client = streaming_client()
    client.send(Cancel(stream=1))
    assert client.is_open(1)
    assert len(client.feed(wire(event(1, 0, [4])) + wire(end(1, 1, Finish.CANCELLED)))) == 2
    assert not client.is_open(1)


def test_goaway_is_remembered_and_what_runs_goes_on() -> None:
    client, server = open_pair()
    client.send(request(1))
    server.feed(output(client))
    server.send(Goaway(code=ErrorCode.DRAINING, last_stream=1, grace_ms=100))
    (goaway,) = client.feed(output(server))
    assert isinstance(goaway, Goaway)
    assert (client.peer_is_leaving, client.is_closed) == (True, False)
    server.send(end(1, 0))
    assert [type(m) for m in client.feed(output(server))] == [End]


def test_a_worker_link_goes_on_from_the_tokens_so_far() -> None:
    dispatcher, worker = open_pair(Role.DISPATCHER)
    submit = Submit(stream=1, op="generate", key=KEY, attempt=2, so_far=[5, 6])
    dispatcher.send(submit)
    assert [plain(m) for m in worker.feed(output(dispatcher))] == [plain(submit)]
    worker.send(end(1, 4))
    assert [type(m) for m in dispatcher.feed(output(worker))] == [End]


# -- sending --------------------------------------------------------------------------------------


def test_a_request_on_a_used_stream_is_our_own_mistake() -> None:
    client = open_end(Role.CLIENT)
    client.send(request(client.next_stream()))
    with pytest.raises(AssertionError, match="must rise"):
        client.send(request(1))


@pytest.mark.parametrize("message", [end(1, 0), Result(stream=1)], ids=repr)
def test_an_answer_to_nothing_is_our_own_mistake(message: Message) -> None:
    server = open_end(Role.SERVER)
    with pytest.raises(AssertionError, match="not open"):
        server.send(message)


def prompt_of(meta_bytes: int) -> Request:
    """Return a request whose meta has exactly this size."""
    extra = meta_bytes - len(cut(wire(request(1, inputs={"prompt": "x" * 1000})))[0].meta)
    return request(1, inputs={"prompt": "x" * (1000 + extra)})


@pytest.mark.parametrize("size", [16383, 16384, 16385])
def test_both_ends_agree_on_the_largest_meta(size: int) -> None:
    client, server = open_pair()
    assert len(cut(wire(prompt_of(size)))[0].meta) == size
    if size <= 16384:
        client.send(prompt_of(size))
        assert len(server.feed(output(client))) == 1
    else:
        with pytest.raises(TooLarge, match=r"16385 bytes .* accepts 16384"):
            client.send(prompt_of(size))


def test_the_table_of_segments_does_not_count_as_meta() -> None:
    client, server = open_pair()
    arrays = {str(i): np.zeros(1025, np.uint8) for i in range(64)}
    size = len(cut(wire(request(1, inputs=arrays)))[0].meta)
    filled = request(1, inputs={**arrays, "pad": "x" * (16384 - size - 4 - 3)})
    assert len(cut(wire(filled))[0].meta) == 16384
    client.send(filled)
    assert len(server.feed(output(client))) == 1


@pytest.mark.parametrize("excess", [-1, 0, 1])
def test_both_ends_agree_on_the_largest_frame(excess: int) -> None:
    client, server = open_pair(far=Limits(frame_bytes=100_000))
    body = len(wire(request(1, inputs={"x": np.zeros(90_000, np.uint8)}))) - 16
    array = np.zeros(90_000 + 100_000 - body + excess, np.uint8)
    if excess <= 0:
        client.send(request(1, inputs={"x": array}))
        assert len(server.feed(output(client))) == 1
        server.send(Result(stream=1, outputs={"x": array}))
        assert len(client.feed(output(server))) == 1
    else:
        with pytest.raises(TooLarge, match=r"100001 bytes; the peer accepts 100000"):
            client.send(request(1, inputs={"x": array}))


@pytest.mark.parametrize(
    "message",
    [
        request(1, inputs={"x": np.zeros(2 * 2**20, np.uint8)}),
        request(1, inputs={"prompt": "x" * 17_000}),
        request(1, params={"x": {1, 2}}),
        request(1, inputs={"x": np.array(["text"])}),
    ],
    ids=["a large array", "a long text", "a set", "an array of texts"],
)
def test_a_request_that_cannot_be_sent_changes_nothing(message: Request) -> None:
    client, server = open_pair()
    with pytest.raises((TooLarge, BadMeta, BadTensor)) as caught:
        client.send(message)
    assert caught.value.executed is Executed.NO
    assert (client.num_streams, client.next_stream(), client.pending_bytes) == (0, 1, 0)
    client.send(request(1))
    assert len(server.feed(output(client))) == 1


@pytest.mark.parametrize(
    "message",
    [
        Result(stream=1, outputs={"x": np.zeros(2 * 2**20, np.uint8)}),
        Result(stream=1, outputs={"text": "x" * 257 * 1024}),
        event(1, 0, [5] * 4097),
        EventBatch(streams=[1], first_indexes=[0], counts=[4097], tokens=[5] * 4097, texts=[""]),
    ],
    ids=["a large array", "a long text", "many tokens", "many tokens in a batch"],
)
def test_an_answer_that_the_client_would_refuse_is_not_sent(message: Message) -> None:
    client, server = open_pair()
    client.send(request(1))
    server.feed(output(client))
    with pytest.raises(OutputTooLarge) as caught:
        server.send(message)
    assert (server.is_open(1), server.pending_bytes) == (True, 0)
    server.send(Failure.of(1, caught.value))
    (failure,) = client.feed(output(server))
    assert isinstance(failure, Failure)
    assert isinstance(failure.to_error(), OutputTooLarge)
    assert not client.is_closed


def test_the_largest_event_that_may_be_sent_is_heard() -> None:
    client, server = open_pair()
    client.send(request(1))
    server.feed(output(client))
    server.send(event(1, 0, [5] * 4096))
    (heard,) = client.feed(output(server))
    assert isinstance(heard, Event)
    assert len(heard.tokens) == 4096


def test_small_frames_leave_joined_and_in_order_large_ones_as_they_are() -> None:
    client = open_end(Role.CLIENT)
    large = np.arange(200_000, dtype=np.uint8)
    messages: list[Message] = [
        request(1),
        request(2, inputs={"x": large}),
        request(3),
        Cancel(stream=3),
        request(4, inputs={"x": np.zeros(100_000, np.uint8)}),
    ]
    for message in messages:
        client.send(message)
    expected = b"".join(map(wire, messages))
    assert client.pending_bytes == len(expected)
    buffers = client.take_output()
    assert [len(b) > 128 * 1024 for b in buffers] == [False, True, False]
    assert b"".join(buffers) == expected
    assert np.shares_memory(np.frombuffer(buffers[1], np.uint8), large)
    assert (client.take_output(), client.pending_bytes) == ([], 0)


# -- time -----------------------------------------------------------------------------------------


def test_a_ping_is_answered_with_its_bytes() -> None:
    server = open_end(Role.SERVER)
    assert server.feed(wire(Ping(payload=b"abcdefgh"))) == []
    assert [plain(m) for m in sent(server)] == [plain(Pong(payload=b"abcdefgh"))]


def test_a_burst_of_pings_is_answered_and_a_flood_is_cut() -> None:
    server = open_end(Role.SERVER)
    burst = server.limits.ping_burst
    server.feed(wire(Ping()) * burst, now=100.0)
    assert len(sent(server)) == burst
    server.feed(wire(Ping()), now=100.9)
    assert isinstance(server.error, Flood)
    assert isinstance(last_words(server), Flood)


def test_a_ping_a_second_goes_on_for_ever() -> None:
    server = open_end(Role.SERVER)
    for second in range(100):
        server.feed(wire(Ping()), now=float(second))
    assert len(sent(server)) == 100


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("born", [0.0, 1e6])
def test_a_peer_that_does_not_greet_in_time_is_cut(role: Role, born: float) -> None:
    connection = Connection(role)
    output(connection)
    connection.on_timer(born)
    connection.on_timer(born + 4.999)
    assert not connection.is_closed
    connection.on_timer(born + 5.0)
    assert isinstance(connection.error, HandshakeTimeout)
    assert isinstance(last_words(connection), HandshakeTimeout)


def test_bytes_that_trickle_do_not_extend_the_handshake() -> None:
    server = Connection(Role.SERVER)
    server.on_timer(0.0)
    for second, byte in enumerate(PREFACE[:5]):
        server.feed(bytes([byte]), now=float(second))
    server.on_timer(5.0)
    assert isinstance(server.error, HandshakeTimeout)


@pytest.mark.parametrize("role", Role)
def test_a_silent_peer_is_pinged_and_at_last_given_up(role: Role) -> None:
    connection = open_end(role)
    connection.feed(wire(Pong()), now=1000.0)
    pings = []
    for second in range(1001, 1060):
        connection.on_timer(float(second))
        pings += [second for m in sent(connection) if isinstance(m, Ping)]
    assert pings == [1020, 1040]
    connection.on_timer(1060.0)
    assert isinstance(connection.error, PeerSilent)
    assert isinstance(last_words(connection), PeerSilent)


def test_any_byte_ends_the_silence() -> None:
    server = open_end(Role.SERVER)
    server.on_timer(0.0)
    server.feed(wire(request(1))[:3], now=59.0)
    server.on_timer(60.0)
    server.feed(wire(request(1))[3:], now=69.0)
    server.on_timer(128.9)
    assert not server.is_closed
    server.on_timer(129.0)
    assert isinstance(server.error, PeerSilent)


def test_two_honest_ends_stay_connected_for_a_day_of_silence() -> None:
    client, server = open_pair()
    for now in range(0, 86_400, 7):
        client.on_timer(float(now))
        server.on_timer(float(now))
        server.feed(output(client), now=float(now))
        client.feed(output(server), now=float(now))
    assert not client.is_closed
    assert not server.is_closed


def test_a_peer_that_reads_only_now_and_then_is_not_pinged() -> None:
    client, server = Connection(Role.CLIENT, features=(FEATURE_PASSIVE,)), Connection(Role.SERVER)
    server.feed(output(client))
    output(server)
    server.on_timer(0.0)
    server.on_timer(10_000.0)
    assert (server.is_closed, output(server)) == (False, b"")


def test_time_does_nothing_to_a_closed_connection() -> None:
    server = Connection(Role.SERVER)
    server.on_timer(0.0)
    server.close()
    server.on_timer(1000.0)
    assert (output(server), server.error) == (b"", None)
