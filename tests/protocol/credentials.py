"""A token to log in with, somebody else's, and a server's memory of the first."""

from __future__ import annotations

from tensorwire_protocol.auth import (
    TOKEN_RANDOM_BYTES,
    Principal,
    Right,
    find_key_id,
    hmac_key,
    make_token,
    token_hash,
)
from tensorwire_protocol.login import HmacLogin

TOKEN = make_token(bytes(range(TOKEN_RANDOM_BYTES)))
OTHER = make_token(bytes(range(1, TOKEN_RANDOM_BYTES + 1)))
KEY_ID = find_key_id(TOKEN) or ""
ALICE = Principal(name="alice", rights=frozenset({Right.INFER}))
CLIENT_NONCE, SERVER_NONCE = b"c" * 32, b"s" * 32


class Knows:
    """An authenticator that knows one token."""

    def __init__(self, *methods: str) -> None:
        self.methods = methods or ("token", "hmac")

    def check_token(self, token: str) -> Principal | None:
        return ALICE if token_hash(token) == token_hash(TOKEN) else None

    def hmac_key(self, key_id: str) -> tuple[bytes, Principal | None]:
        return (hmac_key(TOKEN), ALICE) if key_id == KEY_ID else (b"d" * 32, None)


def by_hmac(token: str = TOKEN, nonce: bytes = CLIENT_NONCE) -> HmacLogin:
    return HmacLogin(key_id=find_key_id(token) or "", key=hmac_key(token), nonce=nonce)
