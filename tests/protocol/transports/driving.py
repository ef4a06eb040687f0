"""Drivers for transports: record what comes, and wait for it without sleeping."""

from __future__ import annotations

import asyncio
import select
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tensorwire_protocol.errors import TensorwireError
    from tensorwire_protocol.messages import Message

PATIENCE_S = 5.0  # what a test waits for comes at once, or the test has failed


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a TCP connection, which unlike a Unix one can be reset."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return near, far


def reset(near: socket.socket, far: socket.socket) -> None:
    """Reset a connection from its far end, and wait until the kernel knows at the near one."""
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    far.close()
    poll = select.poll()
    poll.register(near, 0)  # nothing but the end
    assert poll.poll(PATIENCE_S * 1000)


class Recorder:
    """A driver that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.num_writable = 0
        self.lost: list[TensorwireError | None] = []
        self._changed = asyncio.Event()

    def on_messages(self, messages: Sequence[Message]) -> None:
        self.messages += messages
        self._changed.set()

    def on_writable(self) -> None:
        self.num_writable += 1
        self._changed.set()

    def on_lost(self, error: TensorwireError | None) -> None:
        self.lost.append(error)
        self._changed.set()

    async def until(self, condition: Callable[[Recorder], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition(self):
                self._changed.clear()
                await self._changed.wait()

    async def until_lost(self) -> TensorwireError | None:
        await self.until(lambda r: bool(r.lost))
        (error,) = self.lost  # told once
        return error
