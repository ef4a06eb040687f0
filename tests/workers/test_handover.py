"""What a thread hands over arrives in order, all of it, in few calls."""

from __future__ import annotations

import asyncio
import threading

from tensorwire_server.workers.handover import Handover


def test_what_gathers_while_the_loop_is_busy_arrives_in_one_call() -> None:
    async def test() -> list[list[int]]:
        calls: list[list[int]] = []
        handover = Handover(asyncio.get_running_loop(), calls.append)
        for value in (1, 2, 3):
            handover.put(value)
        await asyncio.sleep(0)
        handover.put(4)
        await asyncio.sleep(0)
        return calls

    assert asyncio.run(test()) == [[1, 2, 3], [4]]


def put_all(handover: Handover[int], count: int) -> None:
    for value in range(count):
        handover.put(value)


def test_nothing_is_lost_between_a_thread_and_a_loop_that_run_at_once() -> None:
    count = 20_000

    async def test() -> list[int]:
        taken: list[int] = []
        done = asyncio.Event()

        def take(values: list[int]) -> None:
            taken.extend(values)
            if len(taken) >= count:
                done.set()

        handover = Handover(asyncio.get_running_loop(), take)
        thread = threading.Thread(target=put_all, args=(handover, count))
        thread.start()
        async with asyncio.timeout(20):
            await done.wait()
        thread.join()
        return taken

    assert asyncio.run(test()) == list(range(count))
