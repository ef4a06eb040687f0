"""Clients of every kind on connections that break: each answer is right, and nothing stays behind.

    python -m soak.chaos --minutes 10

Sync clients on threads and asyncio clients share a server; two of three are behind a proxy that
resets their first connection somewhere. Fails if a call is lost or answered wrongly, or if the
server holds anything at the end that it did not hold before. The seed decides what is asked and
where it is cut; when that happens, and so how many calls there are, is the machine's.

Server and proxy are those of the system's tests (`tests` is on the path too): these know what a
server has to give back.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import threading
import time
import traceback
from collections import Counter
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from soak.calls import ASYNC_CALLS, CALLS, ENDLESS_TOKENS, LARGEST_BYTES, text_of
from soak.ground import allow_descriptors
from system.proxy import Proxy
from system.serving import RunningServer
from tensorwire import AsyncClient, Client
from tensorwire.loadtest.insides import again

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random
    from typing import Any

C = TypeVar("C")

_NUM_THREADS, _NUM_LOOPS = 8, 2
_MOST_CALLS, _MOST_TASKS = 60, 20  # of one client; of one asyncio client at the same time
_TIMEOUT_S = 30.0
_PATIENCE_S = 2 * _TIMEOUT_S  # for the last calls to end
_LATEST_CUT_BYTES = 10**6.5
_PROBLEMS_SHOWN = 5


class Chaos:
    """The clients, and what became of their calls."""

    def __init__(self, address: str, seed: int) -> None:
        self.calls: Counter[str] = Counter()
        self.again: Counter[str] = Counter()
        self.num_reconnects = 0
        self.problems: list[str] = []
        self._address = address
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        runs = [self._run] * _NUM_THREADS + [self._run_loop] * _NUM_LOOPS
        self._threads = [
            threading.Thread(target=run, args=(random.Random(f"{seed} {i}"),), daemon=True)
            for i, run in enumerate(runs)
        ]

    def last(self, seconds: float) -> None:
        """Let the clients call for so long, and wait for their last calls."""
        for thread in self._threads:
            thread.start()
        time.sleep(seconds)
        self._is_over.set()
        until = time.monotonic() + _PATIENCE_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        num_hanging = sum(thread.is_alive() for thread in self._threads)
        if num_hanging:
            self.problems.append(f"{num_hanging} threads wait for answers that do not come")

    def _run(self, chance: Random) -> None:
        while not self._is_over.is_set():
            with (
                self._judging("client"),
                self._way(chance) as address,
                Client(address, timeout=_TIMEOUT_S) as client,
            ):
                for call in self._choose(CALLS, chance):
                    with self._judging(call.__name__):
                        call(client, chance)
                self._note_again(client)
                # The client is closed with this one under way.
                unread = client.stream("oracle", **text_of(chance, ENDLESS_TOKENS).arguments())
                next(unread)

    def _run_loop(self, chance: Random) -> None:
        while not self._is_over.is_set():
            with self._judging("client"), self._way(chance) as address:
                asyncio.run(self._run_tasks(address, chance))

    async def _run_tasks(self, address: str, chance: Random) -> None:
        chances = [random.Random(chance.random()) for _ in range(chance.randrange(1, _MOST_TASKS))]
        async with AsyncClient(address, timeout=_TIMEOUT_S) as client:
            await asyncio.gather(*(self._run_task(client, each) for each in chances))
            self._note_again(client)

    async def _run_task(self, client: AsyncClient, chance: Random) -> None:
        for call in self._choose(ASYNC_CALLS, chance):
            with self._judging(call.__name__):
                await call(client, chance)

    def _choose(self, calls: dict[C, int], chance: Random) -> Iterator[C]:
        count = chance.randrange(1, _MOST_CALLS)
        for call in chance.choices(list(calls), list(calls.values()), k=count):
            if self._is_over.is_set():
                return
            yield call

    @contextmanager
    def _way(self, chance: Random) -> Iterator[str]:
        """Yield the server's address, or one where the first connection does not last."""
        if chance.random() < 1 / 3:
            yield self._address
            return
        num_bytes = int(_LATEST_CUT_BYTES ** chance.random())
        cut = (num_bytes, None) if chance.random() < 0.5 else (None, num_bytes)
        with Proxy(self._address, [cut]) as proxy:
            yield proxy.address
            with self._lock:
                self.num_reconnects += max(0, proxy.num_connections - 1)

    @contextmanager
    def _judging(self, what: str) -> Iterator[None]:
        """Count what is done, and take everything else for a failure."""
        try:
            yield
        except Exception:
            with self._lock:
                self.problems.append(f"{what}: {traceback.format_exc()}")
        else:
            with self._lock:
                self.calls[what] += 1

    def _note_again(self, client: Client | AsyncClient) -> None:
        with self._lock:
            self.again += again(client)


def _warm(server: RunningServer) -> None:
    """Have everything that is made at the first call and stays."""
    with server.client() as client:
        client.generate("oracle", "warm", max_new_tokens=3)
        client.infer("echo", {"x": np.zeros(int(LARGEST_BYTES), np.uint8)})
        client.tokenize("oracle", "x" * 1000)


def _left_behind(server: RunningServer, before: dict[str, dict[str, Any]]) -> list[str]:
    """Return what the server still holds though nobody asks for anything."""
    with suppress(AssertionError):
        server.assert_back_at(before)
        return []
    return [
        f"{place}.{name}={before[place].get(name)}->{count}"
        for place, counts in server.held().items()
        for name, count in counts.items()
        if count != before[place].get(name)
    ]


def soak(server: RunningServer, minutes: float, seed: int) -> bool:
    """Let the clients loose; print and judge what they got, and what is left of them."""
    _warm(server)
    before = server.held()
    chaos = Chaos(server.address, seed)
    chaos.last(minutes * 60)
    left = _left_behind(server, before)
    num_clients = chaos.calls.pop("client", 0)
    print(
        f"chaos minutes={minutes:g} seed={seed} clients={num_clients}"
        f" calls={chaos.calls.total()} failed={len(chaos.problems)} left={len(left)}"
        f" reconnects={chaos.num_reconnects} {_words(chaos.again)}"
    )
    print(f"calls {_words(chaos.calls)}")
    print(f"outcomes {_words(server.stats()['gateway']['outcomes'])}")
    for problem in chaos.problems[:_PROBLEMS_SHOWN]:
        print(f"failed: {problem}")
    for held in left:
        print(f"left: {held}")
    return bool(num_clients) and not chaos.problems and not left


def _words(counts: dict[str, int]) -> str:
    return " ".join(f"{name}={count}" for name, count in sorted(counts.items()))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    allow_descriptors(4096)
    with RunningServer("oracle:step_ms=1", "echo:") as server:
        sys.exit(0 if soak(server.ready(), given.minutes, given.seed) else 1)


if __name__ == "__main__":
    main()
