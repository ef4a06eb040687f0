"""Keeps a replica connected to a worker that runs elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorwire_server.routing.replica import Replica

_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 5.0
_CONNECT_S = 5.0
_FIRST_BEAT_S = 5.0  # a worker says how it is as soon as it is greeted


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
    backoff_s = _FIRST_BACKOFF_S
    while True:
        await _connect_once(replica, host, port)
        # Only a worker that was there and went is sought again at once.
        backoff_s = _FIRST_BACKOFF_S if replica.has_beaten else backoff_s
        await asyncio.sleep(backoff_s)
        backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)


async def _connect_once(replica: Replica, host: str, port: int) -> None:
    """Connect and wait for the end of the connection."""
    loop = asyncio.get_running_loop()
    lost = asyncio.Event()
    try:
        async with asyncio.timeout(_CONNECT_S):
            build = partial(replica.build_transport, lost.set)
            await loop.create_connection(build, host, port)
    except (OSError, TimeoutError):
        replica.disconnected(f"no worker answers at {host}:{port}")
        return
    with contextlib.suppress(TimeoutError):
        # Not wait_for: until Python 3.12 it can swallow a cancellation.
        async with asyncio.timeout(_FIRST_BEAT_S):
            await lost.wait()
    if not replica.has_beaten:
        replica.close()
        replica.disconnected(f"what answers at {host}:{port} is no worker")
        return
    await lost.wait()
