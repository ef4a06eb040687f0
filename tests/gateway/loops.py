"""A loop with a clock that only moves when nothing else can happen."""

from __future__ import annotations

import asyncio
import selectors
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

_START = 1000.0


class _Selector(selectors.DefaultSelector):
    """Never waits: when no socket is ready, the time that was to be waited has passed."""

    now = _START

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0)
        if not events:
            assert timeout is not None, "nothing can happen any more, and something waits for it"
            self.now += max(timeout, 0.0)
        return events


class FakeClockLoop(asyncio.SelectorEventLoop):
    """Sockets are real as long as both ends are on this loop; hours pass in no time."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        """Return the fake time."""
        return self._clock.now


async def pass_time(seconds: float = 0.001) -> None:
    """Let everything happen that can, then let the time pass; only for `FakeClockLoop`."""
    assert isinstance(asyncio.get_running_loop(), FakeClockLoop)
    await asyncio.sleep(seconds)


def run_on(
    factory: Callable[[], asyncio.AbstractEventLoop], test: Callable[[], Coroutine[Any, Any, None]]
) -> None:
    """Run a test; errors that the loop would only log fail it."""
    unhandled: list[Mapping[str, Any]] = []
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.get_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        runner.run(test())
    assert unhandled == []
