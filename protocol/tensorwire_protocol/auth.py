"""Who a peer is and what it may do: tokens, proofs and rights.

A token is `tw_<key id>_<secret>`: 8 characters that name the entry, so that nobody searches, and
43 that are 32 random bytes. A server keeps two hashes of it and never the token:

    token_hash   compared when the token itself was sent
    hmac_key     the shared key when it was not: both sides prove that they have it

Chance comes in from the caller; nothing here makes any.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from tensorwire_protocol.errors import BadParams

ID_BYTES, SECRET_BYTES = 5, 32
TOKEN_RANDOM_BYTES = ID_BYTES + SECRET_BYTES
NONCE_BYTES = 32
TOKEN, HMAC = "token", "hmac"  # the login methods; "mtls" is reserved

_TOKEN = re.compile(r"tw_([a-z2-7]{8})_[A-Za-z0-9_-]{43}")
_HMAC_LABEL = b"tensorwire hmac"
# A proof says who made it: one that is sent back to its maker proves nothing.
_CLIENT_LABEL, _SERVER_LABEL = b"tensorwire client proof\0", b"tensorwire server proof\0"


class Right(Enum):
    """What an operation demands of the peer that asks for it."""

    INFER = "infer"
    ADMIN = "admin"
    UPLOAD = "upload"


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """A peer that is known, and its rights."""

    name: str
    rights: frozenset[Right]


# Who comes over loopback to a server that asks nobody.
LOCAL = Principal(name="local", rights=frozenset(Right))


class Authenticator(Protocol):
    """Who knows the credentials: decides about the logins of one connection."""

    @property
    def methods(self) -> tuple[str, ...]:
        """The login methods that this connection may use."""

    def check_token(self, token: str) -> Principal | None:
        """Return whose token it is; as slow for a wrong one as for a right one."""

    def hmac_key(self, key_id: str) -> tuple[bytes, Principal | None]:
        """Return the key under `key_id` and whose it is; some key and None if there is none."""


def make_token(random: bytes) -> str:
    """Return the token of `TOKEN_RANDOM_BYTES` random bytes."""
    if len(random) != TOKEN_RANDOM_BYTES:
        raise AssertionError(f"a token is made of {TOKEN_RANDOM_BYTES} bytes, not {len(random)}")
    key_id = base64.b32encode(random[:ID_BYTES]).decode().lower()
    secret = base64.urlsafe_b64encode(random[ID_BYTES:]).decode().rstrip("=")
    return f"tw_{key_id}_{secret}"


def find_key_id(token: str) -> str | None:
    """Return the key id in a token, or None if it has not the form of one."""
    found = _TOKEN.fullmatch(token)
    return found[1] if found else None


def key_id_of(token: str) -> str:
    """Return the key id in a token.

    Raises:
        BadParams: it has not the form of a token. The message does not repeat it.
    """
    key_id = find_key_id(token)
    if key_id is None:
        raise BadParams("the token has not the form tw_<8 characters>_<43 characters>")
    return key_id


def token_hash(token: str) -> bytes:
    """Return what a server keeps to recognise a token: 32 bytes."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def hmac_key(token: str) -> bytes:
    """Return the key that both sides make of a token: 32 bytes."""
    return hashlib.sha256(_HMAC_LABEL + token.encode("utf-8", "surrogatepass")).digest()


def is_same(a: bytes, b: bytes) -> bool:
    """Compare in a time that does not tell where they differ."""
    return hmac.compare_digest(a, b)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """What both sides have seen of the greeting; frames are whole, header included.

    Its parts need no lengths in between: frames carry theirs, the rest is of fixed size.
    """

    preface: bytes
    hello: bytes
    welcome: bytes
    client_nonce: bytes
    server_nonce: bytes

    def client_proof(self, key: bytes) -> bytes:
        """Return what only a client with the key can say here."""
        return self._proof(key, _CLIENT_LABEL)

    def server_proof(self, key: bytes) -> bytes:
        """Return what only a server with the key can say here."""
        return self._proof(key, _SERVER_LABEL)

    def _proof(self, key: bytes, label: bytes) -> bytes:
        parts = (self.preface, self.hello, self.welcome, self.client_nonce, self.server_nonce)
        return hmac.digest(key, label + b"".join(parts), "sha256")
