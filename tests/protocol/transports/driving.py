"""Drivers for transports: record what comes, and wait for it without sleeping."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tensorwire_protocol.errors import TensorwireError
    from tensorwire_protocol.messages import Message

PATIENCE_S = 5.0  # what a test waits for comes at once, or the test has failed


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
