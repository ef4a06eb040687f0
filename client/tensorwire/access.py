"""How a client gets in: its token, and the TLS that it wants."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from tensorwire_protocol.auth import NONCE_BYTES, hmac_key, key_id_of
from tensorwire_protocol.errors import BadParams
from tensorwire_protocol.login import HmacLogin, Login, TokenLogin

if TYPE_CHECKING:
    import ssl

    from tensorwire.address import Address

VARIABLE = "TENSORWIRE_TOKEN"


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """A client's token and TLS; the defaults are neither."""

    token: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = None
    server_name: str | None = None  # in the certificate, where it is not the address's host

    def login(self, address: Address) -> Login | None:
        """Return how to log in at `address`, for one connection.

        The token itself goes where nobody else can read it. Elsewhere both sides prove that they
        know it; a server that will not is refused.
        """
        if self.token is None:
            return None
        if self.tls is not None or _is_loopback(address.host):
            return TokenLogin(token=self.token)
        return HmacLogin(
            key_id=key_id_of(self.token),
            key=hmac_key(self.token),
            nonce=os.urandom(NONCE_BYTES),
        )

    def server_name_at(self, address: Address) -> str | None:
        """Return whose certificate the server must have; None without TLS."""
        if self.tls is None:
            return None
        return self.server_name or address.host


def make_access(
    address: Address,
    token: str | None,
    *,
    tls: bool | None,
    ca: str | os.PathLike[str] | None,
    server_name: str | None,
) -> tuple[Address, Access]:
    """Return the address and the access that a client's arguments mean.

    Raises:
        BadParams: they contradict each other, or cannot be used. No message repeats a token.
    """
    token = token or os.environ.get(VARIABLE) or None
    if token is not None:
        key_id_of(token)
    if tls is False and address.is_tls:
        raise BadParams(f"tls=False contradicts the address tensorwires://{address}")
    is_tls = address.is_tls or bool(tls)
    if not is_tls and (ca is not None or server_name is not None):
        raise BadParams(f"ca and server_name are for TLS: use tensorwires://{address} or tls=True")
    context = _context(ca) if is_tls else None
    access = Access(token=token, tls=context, server_name=server_name)
    return replace(address, is_tls=is_tls), access


def _context(ca: str | os.PathLike[str] | None) -> ssl.SSLContext:
    import ssl  # only who uses it pays for it

    path = None if ca is None else os.fspath(ca)
    try:
        context = ssl.create_default_context(cafile=path)
    except ssl.SSLError as error:
        raise BadParams(f"{path!r} holds no certificates in PEM form") from error
    except OSError as error:
        raise BadParams(f"{path!r} cannot be read: {error.strerror}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _is_loopback(host: str) -> bool:
    import ipaddress  # only who has a token pays for it

    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name may lead anywhere
