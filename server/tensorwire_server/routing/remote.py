"""Keeps a replica connected to a worker that runs elsewhere."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorwire_server.routing.replica import Replica

log = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 5.0
_CONNECT_S = 5.0


class RemoteAddressError(ValueError):
    """Not HOST:PORT; the message is one sentence for a person."""


def parse_address(text: str) -> tuple[str, int]:
    """Split HOST:PORT, or [HOST]:PORT for IPv6.

    Raises:
        RemoteAddressError: it is something else.
    """
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise RemoteAddressError(f"a remote worker is given as HOST:PORT, not {text!r}")
    return host, int(port)


async def keep_connected(replica: Replica, host: str, port: int) -> None:
    """Connect, and connect again whenever the connection is lost, until cancelled."""
    loop = asyncio.get_running_loop()
    backoff_s = _FIRST_BACKOFF_S
    while True:
        lost = asyncio.Event()
        try:
            async with asyncio.timeout(_CONNECT_S):
                build = partial(replica.build_transport, lost.set)
                await loop.create_connection(build, host, port)
        except (OSError, TimeoutError) as error:
            replica.disconnected(f"no worker answers at {host}:{port}")
            log.info("remote_unreachable address=%s:%d reason=%s", host, port, error)
        else:
            await lost.wait()
            backoff_s = _FIRST_BACKOFF_S
        await asyncio.sleep(backoff_s)
        backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
