"""Who may do what: the rights of a principal, and the credentials that make one of a peer.

The file of credentials is TOML, one `[[credential]]` for each token, written by `tensorwire token
new`. It holds hashes only, but with `hmac_key` one can log in: nobody else may read the file.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tensorwire_protocol.auth import (
    HMAC,
    TOKEN,
    TOKEN_RANDOM_BYTES,
    Principal,
    Right,
    find_key_id,
    hmac_key,
    is_same,
    key_id_of,
    make_token,
    token_hash,
)
from tensorwire_protocol.errors import Forbidden, Unauthenticated

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from tensorwire_protocol.operations import Operation

_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_KEY_ID = re.compile(r"[a-z2-7]{8}")
_HASH_BYTES = 32
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
HOW_TO_BEGIN = "make one with `tensorwire token new --name NAME --file FILE`"


class CredentialsError(ValueError):
    """The credentials cannot be used; the message is one sentence for a person, without secrets."""


def check_right(principal: Principal | None, operation: Operation) -> None:
    """Let `principal` do `operation`, or raise.

    Raises:
        Unauthenticated, Forbidden: nothing was executed.
    """
    if principal is None:
        raise Unauthenticated("this server serves nobody without a login: give a token")
    if operation.right not in principal.rights:
        raise Forbidden(
            f"{operation.name} needs the right {operation.right.value!r}, which this token has not"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """What the server keeps of one token."""

    key_id: str
    principal: Principal
    token_sha256: bytes = field(repr=False)
    hmac_key: bytes = field(repr=False)

    @classmethod
    def of(cls, token: str, name: str, rights: Iterable[Right]) -> Credential:
        """Return what to keep of a token."""
        return cls(
            key_id=key_id_of(token),
            principal=Principal(name=name, rights=frozenset(rights)),
            token_sha256=token_hash(token),
            hmac_key=hmac_key(token),
        )


class Credentials:
    """All tokens of a server, by key id.

    Args:
        decoy: 32 random bytes: what a key id that does not exist is compared with, so that it
            takes the same time and the same path.
    """

    def __init__(self, credentials: Iterable[Credential], decoy: bytes) -> None:
        self._by_id = {credential.key_id: credential for credential in credentials}
        self._decoy = decoy

    def __len__(self) -> int:
        return len(self._by_id)

    def over(self, *, is_private: bool) -> Door:
        """Return who decides about the logins of one connection.

        Args:
            is_private: nobody else can read it: TLS, loopback or a Unix socket.
        """
        return Door(self, (TOKEN, HMAC) if is_private else (HMAC,))

    def check_token(self, token: str) -> Principal | None:
        """Return whose token it is."""
        credential = self._by_id.get(find_key_id(token) or "")
        kept = self._decoy if credential is None else credential.token_sha256
        is_right = is_same(token_hash(token), kept)
        return credential.principal if credential is not None and is_right else None

    def hmac_key(self, key_id: str) -> tuple[bytes, Principal | None]:
        """Return the key under `key_id` and whose it is."""
        credential = self._by_id.get(key_id)
        if credential is None:
            return self._decoy, None
        return credential.hmac_key, credential.principal


class Door:
    """The authenticator of one connection."""

    def __init__(self, credentials: Credentials, methods: tuple[str, ...]) -> None:
        self.methods = methods
        self.check_token = credentials.check_token
        self.hmac_key = credentials.hmac_key


# -- the file ------------------------------------------------------------------------------------


def load_credentials(file: Path) -> Credentials:
    """Return the credentials in a file that only its owner can read.

    Raises:
        CredentialsError: it cannot be read, others can read it, or it makes no sense.
    """
    credentials = _read(file)
    if not credentials:
        raise CredentialsError(f"{str(file)!r} has no credentials; {HOW_TO_BEGIN}")
    return Credentials(credentials, os.urandom(_HASH_BYTES))


def add_credential(file: Path, name: str, rights: Iterable[str]) -> str:
    """Append a new token's entry to a file, made where it is missing; return the token.

    Raises:
        CredentialsError: a name or right that is not allowed, or a file that cannot be used.
    """
    if not _NAME.fullmatch(name):
        raise CredentialsError(
            f"a name has 1 to 64 letters, digits and . _ @ -, which {name!r} has not"
        )
    granted = [_right(right) for right in rights]
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "r+b") as opened:
            _check_mode(file, opened.fileno())
            taken = {credential.key_id for credential in _parse(file, opened.read())}
            token = make_token(os.urandom(TOKEN_RANDOM_BYTES))
            while key_id_of(token) in taken:
                token = make_token(os.urandom(TOKEN_RANDOM_BYTES))
            opened.write(_entry(Credential.of(token, name, granted)).encode())
    except OSError as error:
        raise CredentialsError(f"{str(file)!r} cannot be written: {error.strerror}") from error
    return token


def _entry(credential: Credential) -> str:
    rights = ", ".join(f'"{r.value}"' for r in Right if r in credential.principal.rights)
    return (
        f'\n[[credential]]\nid = "{credential.key_id}"\nname = "{credential.principal.name}"\n'
        f'rights = [{rights}]\ntoken_sha256 = "{credential.token_sha256.hex()}"\n'
        f'hmac_key = "{credential.hmac_key.hex()}"\n'
    )


def _read(file: Path) -> list[Credential]:
    try:
        with file.open("rb") as opened:
            _check_mode(file, opened.fileno())
            content = opened.read()
    except OSError as error:
        raise CredentialsError(
            f"the credentials {str(file)!r} cannot be read: {error.strerror}; {HOW_TO_BEGIN}"
        ) from error
    return _parse(file, content)


def _check_mode(file: Path, descriptor: int) -> None:
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    if mode & _OTHERS:
        raise CredentialsError(
            f"others than its owner may use {str(file)!r} (its mode is {mode:04o}): chmod 600 it"
        )


def _parse(file: Path, content: bytes) -> list[Credential]:
    try:
        tree = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        # What is wrong is quoted in the error, and may be a secret.
        raise CredentialsError(f"{str(file)!r} is not TOML") from None
    entries = tree.pop("credential", [])
    if tree or type(entries) is not list:
        raise CredentialsError(f"{str(file)!r} may hold [[credential]] entries only")
    credentials = [_credential(file, i, entry) for i, entry in enumerate(entries, start=1)]
    ids = [credential.key_id for credential in credentials]
    for key_id in ids:
        if ids.count(key_id) > 1:
            raise CredentialsError(f"{str(file)!r} has two entries with the id {key_id!r}")
    return credentials


_FIELDS = frozenset({"id", "name", "rights", "token_sha256", "hmac_key"})


def _credential(file: Path, number: int, entry: Mapping[str, Any]) -> Credential:
    where = f"entry {number} of {str(file)!r}"
    if type(entry) is not dict or set(entry) != _FIELDS:
        raise CredentialsError(f"{where} must have exactly {', '.join(sorted(_FIELDS))}")
    key_id, name, rights = entry["id"], entry["name"], entry["rights"]
    if type(key_id) is not str or not _KEY_ID.fullmatch(key_id):
        raise CredentialsError(f"the id in {where} must have 8 characters from a-z and 2-7")
    if type(name) is not str or not _NAME.fullmatch(name):
        raise CredentialsError(f"the name in {where} must have 1 to 64 letters, digits, . _ @ -")
    if type(rights) is not list:
        raise CredentialsError(f"the rights in {where} must be a list")
    return Credential(
        key_id=key_id,
        principal=Principal(name=name, rights=frozenset(_right(r) for r in rights)),
        token_sha256=_hash(entry["token_sha256"], f"token_sha256 in {where}"),
        hmac_key=_hash(entry["hmac_key"], f"hmac_key in {where}"),
    )


def _right(value: object) -> Right:
    try:
        return Right(value)
    except ValueError:
        known = ", ".join(right.value for right in Right)
        raise CredentialsError(f"there is no right {value!r}; known are {known}") from None


def _hash(value: object, what: str) -> bytes:
    try:
        found = bytes.fromhex(value) if isinstance(value, str) else b""
    except ValueError:
        found = b""
    if len(found) != _HASH_BYTES:
        raise CredentialsError(f"{what} must be {2 * _HASH_BYTES} hexadecimal digits")
    return found
