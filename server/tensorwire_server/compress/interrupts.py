"""Ctrl-C kept waiting for moments: where half of a step would leave something behind."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held_interrupts() -> Iterator[None]:
    """Have what SIGINT and SIGTERM call wait until the block has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    arrived: list[int] = []

    def keep(number: int, _: FrameType | None) -> None:
        arrived.append(number)

    # A signal that calls nothing either is ignored or ends the process at once.
    held = {number: call for number in _NUMBERS if callable(call := signal.getsignal(number))}
    for number in held:
        signal.signal(number, keep)
    try:
        yield
    finally:
        for number, call in held.items():
            signal.signal(number, call)
        for late in arrived:
            signal.raise_signal(late)
