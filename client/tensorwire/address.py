"""Where the server is: `host:port`, `[::1]:port`, optionally after `tensorwire://`.

`tensorwires://` means TLS.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from tensorwire_protocol.errors import BadParams

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8947
VARIABLE = "TENSORWIRE_ADDRESS"


@dataclass(frozen=True, slots=True)
class Address:
    """A server's host (name or IP address) and TCP port."""

    host: str
    port: int
    is_tls: bool = False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str | None) -> Address:
    """Return the address in `text`, or in TENSORWIRE_ADDRESS, or 127.0.0.1:8947.

    Raises:
        BadParams: it is not of the form host:port.
    """
    given = text or os.environ.get(VARIABLE) or f"{DEFAULT_HOST}:{DEFAULT_PORT}"
    is_tls = given.startswith("tensorwires://")
    rest = given.removeprefix("tensorwires://" if is_tls else "tensorwire://").removesuffix("/")
    host, colon, port = rest.rpartition(":")
    if not colon or (":" in rest and rest.endswith("]")):
        host, port = rest, str(DEFAULT_PORT)
    is_bracketed = host.startswith("[") and host.endswith("]")
    if is_bracketed:
        host = host[1:-1]
    wrong_host = not host or "/" in host or (":" in host and not is_bracketed)
    if wrong_host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise BadParams(
            "an address must be host:port or [ipv6]:port, with a port from 1 to 65535,"
            f" not {given!r}"
        )
    return Address(host, int(port), is_tls)
