"""Sends what is due when it is due. Clock and sleep are arguments: it also runs in virtual time.

The open loop never waits for an answer. When it is late it sends at once, and the request's latency
still counts from the time it was planned for: what the delay did to a real user is not left out.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    Clock = Callable[[], float]
    Sleep = Callable[[float], Awaitable[None]]
    Perform = Callable[[int, float], Awaitable[None]]  # index, planned seconds after the start

_YIELD_EVERY = 32  # sends without a pause: answers must be read, however late the sends are


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Which of the requests one process sends: every `of`-th, from `number` on."""

    number: int = 0
    of: int = 1


async def drive_open(
    offsets: Iterable[float],
    perform: Perform,
    *,
    start: float,
    clock: Clock,
    sleep: Sleep,
    share: Share = Share(),
    max_open: int = 100_000,
    on_unsent: Callable[[float], None] | None = None,
    drain_s: float = 60.0,
) -> int:
    """Call `perform` for each planned time, never waiting for what it called before.

    Args:
        offsets: planned times in seconds after `start`, rising.
        perform: sends a request and waits for its end; whatever it raises ends the run.
        start: on `clock`.
        clock: monotonic seconds.
        sleep: waits so many seconds of that clock.
        share: which of the offsets are ours; the index given to `perform` counts all of them.
        max_open: so many at once are performed, what is due beyond is told to `on_unsent`.
        on_unsent: takes the offset of what was not sent.
        drain_s: so long what is open may take after the last send; then it is cancelled.

    Returns:
        How many were cancelled in the end.
    """
    is_open: set[asyncio.Task[None]] = set()
    failed: list[asyncio.Task[None]] = []

    def on_done(task: asyncio.Task[None]) -> None:
        is_open.discard(task)
        if not task.cancelled() and task.exception() is not None:
            failed.append(task)

    num_at_once = 0
    for index, offset in itertools.islice(enumerate(offsets), share.number, None, share.of):
        wait_s = start + offset - clock()
        if wait_s > 0:
            await sleep(wait_s)
            num_at_once = 0
        elif (num_at_once := num_at_once + 1) % _YIELD_EVERY == 0:
            await sleep(0)
        if len(is_open) >= max_open:
            if on_unsent is not None:
                on_unsent(offset)
            continue
        task = asyncio.ensure_future(perform(index, offset))
        is_open.add(task)
        task.add_done_callback(on_done)
        if failed:
            break
    return await _drain(is_open.union(failed), drain_s)


async def drive_closed(
    users: int,
    perform: Perform,
    *,
    start: float,
    duration_s: float,
    clock: Clock,
    share: Share = Share(),
    drain_s: float = 60.0,
) -> int:
    """Let users call `perform` one after the other, from `start` on `clock` for `duration_s`.

    Each process has its share of the users. A request is planned for when its user is ready for it.

    Returns:
        How many requests were cancelled in the end.
    """
    indexes = itertools.count(share.number, share.of)

    async def use() -> None:
        while (passed_s := clock() - start) < duration_s:
            await perform(next(indexes), passed_s)

    mine = range(share.number, users, share.of)
    tasks = {asyncio.ensure_future(use()) for _ in mine}
    if tasks:
        timeout_s = max(start + duration_s - clock(), 0)
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
    return await _drain(tasks, drain_s)


async def _drain(tasks: set[asyncio.Task[None]], drain_s: float) -> int:
    """Wait for what is open, then cancel it; raise what any of it raised: a fault of ours."""
    if not tasks:
        return 0
    done, late = await asyncio.wait(
        tuple(tasks), timeout=drain_s, return_when=asyncio.FIRST_EXCEPTION
    )
    broken = any(task.exception() is not None for task in done if not task.cancelled())
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    if broken:
        await asyncio.gather(*done)
    return len(late)
