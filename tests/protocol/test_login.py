"""Logins over a connection: who gets in, how little the others may do, and who proves what."""

from __future__ import annotations

from typing import Any

import pytest
from tensorwire_protocol.auth import (
    LOCAL,
    Principal,
    hmac_key,
)
from tensorwire_protocol.codec import encode
from tensorwire_protocol.connection import Connection
from tensorwire_protocol.errors import (
    ErrorCode,
    Flood,
    FrameTooLarge,
    HandshakeTimeout,
    SequenceError,
    Unauthenticated,
)
from tensorwire_protocol.frames import PREFACE, build_frame
from tensorwire_protocol.limits import CLIENT_LINK, Limits
from tensorwire_protocol.login import Login, TokenLogin
from tensorwire_protocol.messages import (
    Auth,
    Cancel,
    Failure,
    Goaway,
    Hello,
    Message,
    Ping,
    Request,
    Result,
    Welcome,
)
from tensorwire_protocol.roles import Role, State

from .credentials import ALICE, KEY_ID, OTHER, SERVER_NONCE, TOKEN, Knows, by_hmac

WRONG = TOKEN[:12] + OTHER[12:]  # a known key id, another secret


def server_with(
    *methods: str, nonce: bytes = SERVER_NONCE, limits: Limits | None = None
) -> Connection:
    return Connection(Role.SERVER, limits=limits, authenticator=Knows(*methods), nonce=nonce)


def client_with(login: Login | None = None) -> Connection:
    return Connection(Role.CLIENT, login=login)


def output(connection: Connection) -> bytes:
    return b"".join(connection.take_output())


def talk(client: Connection, server: Connection) -> tuple[list[Message], list[Message]]:
    """Move bytes both ways until nobody has any; return what the client and the server got."""
    got: tuple[list[Message], list[Message]] = ([], [])
    while client.pending_bytes or server.pending_bytes:
        got[1].extend(server.feed(output(client)))
        got[0].extend(client.feed(output(server)))
    return got


def ask(stream: int = 1, **fields: Any) -> Request:
    return Request(stream=stream, op="health", key=bytes(16), **fields)


def sent(message: Message) -> bytes:
    return b"".join(encode(message, CLIENT_LINK))


def raw_hello(auth: Any = None) -> bytes:
    return PREFACE + sent(Hello(auth=auth))


# -- tokens --------------------------------------------------------------------------------------


def test_a_server_without_an_authenticator_asks_nobody() -> None:
    client, server = client_with(), Connection(Role.SERVER)
    talk(client, server)
    assert server.principal is LOCAL
    assert client.state is server.state is State.OPEN


def test_a_token_lets_in_and_requests_may_follow_it_at_once() -> None:
    client, server = client_with(TokenLogin(token=TOKEN)), server_with()
    client.send(ask())
    _, requests = talk(client, server)
    assert server.principal is ALICE
    assert [type(m) for m in requests] == [Hello, Request]
    assert client.state is server.state is State.OPEN


def test_a_token_goes_no_further_than_the_connection() -> None:
    (hello,) = server_with().feed(output(client_with(TokenLogin(token=TOKEN))))
    assert isinstance(hello, Hello)
    assert hello.auth is None
    for login in (TokenLogin(token=TOKEN), by_hmac()):
        assert TOKEN[12:] not in repr(login)
        assert repr(hmac_key(TOKEN)) not in repr(login)


@pytest.mark.parametrize("token", [WRONG, OTHER, "", "tw_", "x" * 1000, TOKEN + " "])
def test_all_wrong_tokens_get_the_same_answer_and_the_end(token: str) -> None:
    client, server = client_with(TokenLogin(token=token)), server_with()
    client.send(ask())
    got, requests = talk(client, server)
    assert requests == []
    assert server.principal is None
    assert server.is_closed
    assert isinstance(client.error, Unauthenticated)
    assert client.error.message == "the server does not accept these credentials"
    assert [type(m) for m in got] == [Failure]


@pytest.mark.parametrize(
    "auth",
    [
        {"method": None}, {"method": "none"}, {"method": "mtls"}, {"method": "token"},
        {"method": "token", "token": 1}, {"method": "token", "token": b"x"}, {"method": ["token"]},
        {"method": "hmac"}, {"method": "hmac", "id": KEY_ID, "nonce": b"short"},
        {"method": "hmac", "id": KEY_ID, "nonce": "c" * 32},
    ],
)  # fmt: skip
def test_a_login_that_makes_no_sense_is_refused(auth: Any) -> None:
    server = server_with()
    server.feed(raw_hello(auth))
    assert isinstance(server.error, Unauthenticated)
    assert server.principal is None


def test_a_token_over_a_connection_that_others_can_read_is_not_taken() -> None:
    client, server = client_with(TokenLogin(token=TOKEN)), server_with("hmac")
    talk(client, server)
    assert isinstance(server.error, Unauthenticated)
    assert "use TLS" in server.error.message


def test_a_client_without_a_token_says_so_where_one_is_asked_for() -> None:
    client, server = client_with(), server_with()
    talk(client, server)
    assert isinstance(client.error, Unauthenticated)
    assert client.error.message == "the server asks for a token, and none was given"


# -- before the login ----------------------------------------------------------------------------


def test_a_request_before_the_login_is_refused_on_its_own_stream() -> None:
    server, reader = server_with(), client_with()
    talk(reader, Connection(Role.SERVER))
    assert [type(m) for m in server.feed(raw_hello())] == [Hello]
    welcome = output(server)
    assert b"methods" in welcome
    assert server.state is State.AUTHENTICATING
    assert server.feed(sent(ask(1)) + sent(Cancel(stream=1)) + sent(ask(2))) == []
    assert not server.is_closed
    assert server.num_streams == 0
    reader.send(ask(1))
    reader.send(ask(2))
    failures = reader.feed(output(server))
    assert [(m.stream, m.code) for m in failures if isinstance(m, Failure)] == [
        (1, ErrorCode.UNAUTHENTICATED),
        (2, ErrorCode.UNAUTHENTICATED),
    ]


@pytest.mark.parametrize("message", [Ping(), Hello(), Goaway()])
def test_nothing_else_may_come_before_the_login(message: Message) -> None:
    server = server_with()
    server.feed(raw_hello() + sent(message))
    assert isinstance(server.error, SequenceError)


def test_a_proof_of_a_login_that_was_not_begun_is_refused() -> None:
    server = server_with()
    server.feed(raw_hello() + sent(Auth(payload={"proof": bytes(32)})))
    assert isinstance(server.error, SequenceError)


@pytest.mark.parametrize("num_frames", [3, 4, 5])
def test_a_peer_without_a_login_has_four_frames(num_frames: int) -> None:
    server = server_with()
    server.feed(raw_hello() + b"".join(sent(ask(i)) for i in range(1, num_frames)))
    assert server.is_closed == (num_frames > 4)
    assert isinstance(server.error, Flood) == (num_frames > 4)


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_a_peer_without_a_login_has_four_kib_in_all(more: int) -> None:
    hello = sent(Hello())
    left = 4096 - (len(hello) - 16)
    second = build_frame(0x10, 1, bytes(left // 2))
    third = build_frame(0x10, 2, bytes(left - left // 2 + more))
    server = server_with()
    server.feed(PREFACE + hello + second)
    assert not server.is_closed
    server.feed(third[:16])  # refused on what it announces
    assert isinstance(server.error, FrameTooLarge) == (more > 0)


@pytest.mark.parametrize("preauth_frames", [4, 1000])
def test_a_peer_without_a_login_gets_one_kib_at_most(preauth_frames: int) -> None:
    limits = Limits(preauth_frames=preauth_frames)
    server = Connection(Role.SERVER, limits=limits, authenticator=Knows(), nonce=SERVER_NONCE)
    server.feed(raw_hello())
    output(server)  # WELCOME does not count
    server.feed(b"".join(sent(ask(i)) for i in range(1, 100)))
    assert isinstance(server.error, Flood)
    assert server.pending_bytes <= 1024 + 256  # the answer too many, and the last words


def test_after_the_login_the_small_allowance_is_over() -> None:
    server = server_with()
    server.feed(raw_hello({"method": "token", "token": TOKEN}))
    for i in range(1, 20):
        assert server.feed(sent(ask(i, params={"x": "y" * 8000})))
    assert not server.is_closed


def test_a_login_that_takes_too_long_ends() -> None:
    server = server_with()
    server.on_timer(0.0)
    server.feed(raw_hello(), 4.0)
    server.on_timer(4.9)
    assert not server.is_closed
    server.on_timer(5.0)
    assert isinstance(server.error, HandshakeTimeout)


# -- hmac ----------------------------------------------------------------------------------------


def test_by_hmac_both_sides_prove_themselves_and_the_token_never_leaves() -> None:
    client, server = client_with(by_hmac()), server_with("hmac")
    client.send(ask())
    hello = output(client)
    assert sent(ask()) not in hello  # a request waits until the server has proven itself
    server.feed(hello)
    welcome = output(server)
    assert [type(m) for m in client.feed(welcome)] == [Welcome]
    proof = output(client)
    assert {client.state, server.state} == {State.AUTHENTICATING}
    assert server.feed(proof) == []
    server_proof = output(server)
    client.feed(server_proof)
    assert client.state is State.OPEN
    (request,) = server.feed(output(client))
    assert isinstance(request, Request)
    assert server.principal is ALICE
    for said in (hello, welcome, proof, server_proof):
        assert TOKEN[12:].encode() not in said
        assert hmac_key(TOKEN) not in said


def test_the_order_of_what_waits_for_the_proof_is_kept() -> None:
    client, server = client_with(by_hmac()), server_with()
    for stream in (1, 2):
        client.send(ask(stream))
    client.send(Cancel(stream=1))
    _, got = talk(client, server)
    assert [type(m) for m in got] == [Hello, Request, Request, Cancel]


def test_what_the_server_sends_too_early_waits_for_the_login() -> None:
    client, server = client_with(by_hmac()), server_with()
    server.feed(output(client))
    server.send(Goaway())
    got, _ = talk(client, server)
    assert [type(m) for m in got] == [Welcome, Goaway]


@pytest.mark.parametrize("token", [WRONG, OTHER])
def test_a_wrong_secret_and_an_unknown_id_are_refused_alike(token: str) -> None:
    client, server = client_with(by_hmac(token)), server_with()
    client.send(ask())
    _, got = talk(client, server)
    assert [type(m) for m in got] == [Hello]
    assert server.principal is None
    assert isinstance(client.error, Unauthenticated)
    assert client.error.message == "the server does not accept these credentials"


def test_even_the_right_proof_of_an_unknown_id_is_refused() -> None:
    class Guessed(Knows):
        def hmac_key(self, key_id: str) -> tuple[bytes, Principal | None]:
            return hmac_key(TOKEN), None

    server = Connection(Role.SERVER, authenticator=Guessed(), nonce=SERVER_NONCE)
    client = client_with(by_hmac())
    talk(client, server)
    assert isinstance(server.error, Unauthenticated)


def test_a_recorded_login_is_worth_nothing() -> None:
    client, server = client_with(by_hmac()), server_with()
    hello = output(client)
    server.feed(hello)
    client.feed(output(server))
    proof = output(client)
    server.feed(proof)
    assert server.principal is ALICE
    again = server_with(nonce=b"t" * 32)
    again.feed(hello)
    again.take_output()
    again.feed(proof)
    assert again.principal is None
    assert isinstance(again.error, Unauthenticated)


def _proven_by(answer: Any) -> Connection:
    """Return a client whose server answers its proof with `answer` (a function of the proof)."""
    client, server = client_with(by_hmac()), server_with()
    client.send(ask())
    server.feed(output(client))
    client.feed(output(server))
    proof = output(client)
    client.feed(answer(proof))
    return client


@pytest.mark.parametrize("payload", [{}, {"proof": bytes(32)}, {"proof": "x"}, {"proof": b""}])
def test_a_server_that_cannot_prove_itself_gets_no_request(payload: Any) -> None:
    client = _proven_by(lambda _: sent(Auth(payload=payload)))
    assert isinstance(client.error, Unauthenticated)
    assert "could not prove" in client.error.message
    assert sent(ask()) not in output(client)


def test_the_client_s_own_proof_sent_back_proves_nothing() -> None:
    client = _proven_by(lambda proof: proof)
    assert isinstance(client.error, Unauthenticated)


def test_a_server_may_not_leave_its_proof_out() -> None:
    client = _proven_by(lambda _: sent(Result(stream=1)))
    assert isinstance(client.error, SequenceError)


@pytest.mark.parametrize(
    "auth",
    [
        None, {}, {"methods": ["token"], "nonce": SERVER_NONCE}, {"methods": ["hmac"]},
        {"methods": ["hmac"], "nonce": b"short"}, {"methods": "hmac", "nonce": SERVER_NONCE},
    ],
)  # fmt: skip
def test_a_client_that_wants_proof_is_not_talked_into_less(auth: Any) -> None:
    client = client_with(by_hmac())
    client.send(ask())
    client.feed(sent(Welcome(auth=auth)))
    assert isinstance(client.error, Unauthenticated)
    assert sent(ask()) not in output(client)


def test_a_changed_greeting_breaks_the_proof() -> None:
    client, server = client_with(by_hmac()), server_with()
    hello = output(client)
    server.feed(hello)
    welcome = output(server)
    at = welcome.index(b"frame_bytes") + len(b"frame_bytes") + 4
    changed = welcome[:at] + bytes([welcome[at] ^ 1]) + welcome[at + 1 :]
    client.feed(changed)
    server.feed(output(client))
    assert isinstance(server.error, Unauthenticated)


def test_a_nonce_must_have_its_length() -> None:
    with pytest.raises(AssertionError, match="32"):
        Connection(Role.SERVER, authenticator=Knows(), nonce=b"")
