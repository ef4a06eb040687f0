"""The two ends of a login, as parts of a connection's greeting.

    token   HELLO {method, token}                 server: WELCOME, or ERR and the end
    hmac    HELLO {method, id, nonce}             server: WELCOME {methods, nonce}
            client: AUTH {proof}                  server: AUTH {proof}, or ERR and the end

Over hmac each side has proven that it knows the key before the first request is sent. A refusal
never says what was wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tensorwire_protocol.auth import HMAC, NONCE_BYTES, TOKEN, Transcript, is_same
from tensorwire_protocol.errors import SequenceError, Unauthenticated
from tensorwire_protocol.frames import PREFACE
from tensorwire_protocol.messages import Auth

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tensorwire_protocol.auth import Authenticator, Principal


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogin:
    """Sends the token itself: only where nobody else can read it."""

    token: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class HmacLogin:
    """Proves to have the key, and asks the server for the same."""

    key_id: str
    key: bytes = field(repr=False)
    nonce: bytes  # 32 fresh random bytes for each connection


Login = TokenLogin | HmacLogin


class ClientLogin:
    """The asking end's part."""

    def __init__(self, login: Login | None) -> None:
        self._login = login
        self._hello = b""
        self._transcript: Transcript | None = None

    @property
    def is_mutual(self) -> bool:
        """Say if the server has to prove itself before it gets any request."""
        return isinstance(self._login, HmacLogin)

    def hello_auth(self) -> dict[str, Any] | None:
        """Return what HELLO says of the login."""
        match self._login:
            case TokenLogin(token=token):
                return {"method": TOKEN, "token": token}
            case HmacLogin(key_id=key_id, nonce=nonce):
                return {"method": HMAC, "id": key_id, "nonce": nonce}
        return None

    def note_hello(self, frame: bytes) -> None:
        """Remember the HELLO that was sent, where a proof will be about it."""
        if self.is_mutual:
            self._hello = frame

    def answer(self, auth: Mapping[str, Any] | None, welcome: bytes) -> Auth | None:
        """Return what must follow on WELCOME; None if the login is done.

        Raises:
            Unauthenticated: the server wants more than this side has, or proves less.
        """
        login = self._login
        if not isinstance(login, HmacLogin):
            if auth is not None and login is None:
                raise Unauthenticated("the server asks for a token, and none was given")
            return None
        nonce = _field(auth, "nonce", bytes)
        methods = _field(auth, "methods", list) or []
        if HMAC not in methods or nonce is None or len(nonce) != NONCE_BYTES:
            # Going on without would let anybody in between ask for less.
            raise Unauthenticated(
                "the server does not offer the login by hmac, and without TLS the token is sent"
                " over loopback only"
            )
        self._transcript = Transcript(
            preface=PREFACE,
            hello=self._hello,
            welcome=welcome,
            client_nonce=login.nonce,
            server_nonce=nonce,
        )
        return Auth(payload={"proof": self._transcript.client_proof(login.key)})

    def confirm(self, auth: Auth) -> None:
        """Take the server's proof.

        Raises:
            Unauthenticated: it does not have the key.
        """
        login, transcript = self._login, self._transcript
        assert isinstance(login, HmacLogin)
        assert transcript is not None
        proof = _field(auth.payload, "proof", bytes) or b""
        if not is_same(proof, transcript.server_proof(login.key)):
            raise Unauthenticated("the server could not prove that it knows this token")


class ServerLogin:
    """The answering end's part.

    Args:
        nonce: 32 fresh random bytes.
    """

    def __init__(self, authenticator: Authenticator, nonce: bytes) -> None:
        if len(nonce) != NONCE_BYTES:
            raise AssertionError(f"a nonce has {NONCE_BYTES} bytes, not {len(nonce)}")
        self._authenticator = authenticator
        self._nonce = nonce
        self._hello = b""
        self._welcome = b""
        self._client_nonce = b""
        self._key_id: str | None = None  # of a login by hmac that has begun

    def greet(self, auth: Mapping[str, Any] | None, hello: bytes) -> Principal | None:
        """Return who the peer is; None if it has not said so yet.

        Raises:
            Unauthenticated: it is not who it says, or may not say it here.
        """
        if auth is None:
            return None
        method = auth.get("method")
        offered = self._authenticator.methods
        if method not in offered:
            if method == TOKEN:
                raise Unauthenticated(
                    "a token is not taken over a connection that others can read: use TLS"
                )
            raise Unauthenticated(f"this login is not offered here; offered are {_list(offered)}")
        if method == TOKEN:
            principal = self._authenticator.check_token(_field(auth, "token", str) or "")
            if principal is None:
                raise _refusal()
            return principal
        nonce = _field(auth, "nonce", bytes)
        if nonce is None or len(nonce) != NONCE_BYTES:
            raise _refusal()
        self._client_nonce, self._hello = nonce, hello
        self._key_id = _field(auth, "id", str) or ""
        return None

    def welcome_auth(self) -> dict[str, Any]:
        """Return what WELCOME says of the login."""
        return {"methods": list(self._authenticator.methods), "nonce": self._nonce}

    def note_welcome(self, frame: bytes) -> None:
        """Remember the WELCOME that was sent."""
        self._welcome = frame

    def prove(self, auth: Auth) -> tuple[Principal, Auth]:
        """Take the client's proof; return who it is, and this side's own.

        Raises:
            Unauthenticated: it does not have the key.
            SequenceError: it has not begun such a login.
        """
        if self._key_id is None:
            raise SequenceError("AUTH came, and HELLO had begun no login that it goes on with")
        transcript = Transcript(
            preface=PREFACE,
            hello=self._hello,
            welcome=self._welcome,
            client_nonce=self._client_nonce,
            server_nonce=self._nonce,
        )
        key, principal = self._authenticator.hmac_key(self._key_id)
        proof = _field(auth.payload, "proof", bytes) or b""
        is_right = is_same(proof, transcript.client_proof(key))
        if principal is None or not is_right:
            raise _refusal()
        return principal, Auth(payload={"proof": transcript.server_proof(key)})


def _refusal() -> Unauthenticated:
    return Unauthenticated("the server does not accept these credentials")


def _field(auth: Mapping[str, Any] | None, name: str, kind: type) -> Any:
    """Return a field of a peer's map, or None if it is not of its type."""
    value = None if auth is None else auth.get(name)
    return value if type(value) is kind else None


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names)
