"""What a load tester does to the client that its public face rightly does not offer."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any

from tensorwire.retrying import Again

if TYPE_CHECKING:
    from tensorwire.aio import AsyncClient
    from tensorwire.client import Client

_WORDS = {Again.REQUEST: "retries", Again.ANEW: "retries", Again.RESUME: "resumes"}


def again(client: AsyncClient | Client) -> Counter[str]:
    """Return how often a client sent something again, as `retries` and `resumes`."""
    made = client._link.budget.made
    counts: Counter[str] = Counter()
    for how, count in made.items():
        counts[_WORDS[how]] += count
    return counts


def cut(client: AsyncClient) -> None:
    """Break the connection as a lost network would: the server gets a reset, and no word."""
    socket = _socket(client)
    if socket is not None:
        socket.abort()


async def stop_reading(client: AsyncClient, seconds: float) -> None:
    """Leave what the server sends in the kernel for a while."""
    socket = _socket(client)
    if socket is None or socket.is_closing():
        return
    socket.pause_reading()
    try:
        await asyncio.sleep(seconds)
    finally:
        if not socket.is_closing():
            socket.resume_reading()


def _socket(client: AsyncClient) -> Any:
    lanes = client._link.pool.lanes
    return lanes[0].transport._transport if lanes else None
