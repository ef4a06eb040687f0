"""Long prompts, shared beginnings, short memory and 10,000 requests, through the whole server.

The scripts beside this one do the same to scheduler and engine alone, in CPU time. Here it is what
a client sees on its clock, so the machine has to be quiet.

Usage: PYTHONPATH=benchmarks python -m engine.through_server [--model m2] [--only long shared ...]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from bisect import bisect
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.models import SHAPES, model_folder
from serving import serving
from tensorwire import AsyncClient, Client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

STREAMS, LONG_PROMPT, UNDISTURBED = 8, 4096, 60
PREFIX, OWN, ROUNDS = 1024, 8, 5
REQUESTS, ROOM_FOR = 100, 10
MIXED = ((16, 64), (64, 64), (128, 128), (256, 256), (512, 128), (64, 512))
ENDURED, AT_ONCE = 10_000, 32
_PAGE_TOKENS = 16

_random = random.Random(3)


def _ids(number: int) -> list[int]:
    return _random.choices(range(300, 2000), k=number)


class Followed:
    """A stream, and when each of its tokens came."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._wanted = 0
        self._is_reached = asyncio.Event()

    async def follow(self, client: AsyncClient) -> None:
        """Read until cancelled."""
        async with client.stream("m", _ids(128), max_new_tokens=3000, temperature=0.0) as stream:
            async for delta in stream:
                self.times += [time.perf_counter()] * len(delta.token_ids)
                if len(self.times) >= self._wanted:
                    self._is_reached.set()

    def num_tokens(self, at: float) -> int:
        """Return how many there were at this time."""
        return bisect(self.times, at)

    async def has_more(self, num_tokens: int) -> None:
        """Wait for so many tokens from now on."""
        self._wanted = len(self.times) + num_tokens
        self._is_reached.clear()
        await self._is_reached.wait()


@asynccontextmanager
async def _following(client: AsyncClient) -> AsyncIterator[list[Followed]]:
    streams = [Followed() for _ in range(STREAMS)]
    tasks = [asyncio.create_task(stream.follow(client)) for stream in streams]
    yield streams
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _all_have(streams: list[Followed], num_more: int) -> float:
    """Wait until all have so many tokens more; returns when that was."""
    await asyncio.gather(*(stream.has_more(num_more) for stream in streams))
    return time.perf_counter()


def long_prompt(model: str) -> None:
    """A prompt arrives beside streams that decode: how long do these wait for their tokens?

    The streams grow while it is read, and the time of a step with them. What is the prompt's doing
    is seen from other streams, which make the same tokens, by number, without it.
    """

    async def run(address: str) -> None:
        async with AsyncClient(address, timeout=600) as client:
            async with _following(client) as streams:
                since = await _all_have(streams, 20)  # prompts are read
                began = await _all_have(streams, UNDISTURBED)
                await client.generate("m", _ids(LONG_PROMPT), max_new_tokens=1, temperature=0.0)
                ended = time.perf_counter()
                before, beside = _gaps(streams, since, began), _gaps(streams, began, ended)
                first, last = (min(s.num_tokens(at) for s in streams) for at in (began, ended))
            async with _following(client) as streams:
                grown_since = await _all_have(streams, first)
                grown = _gaps(streams, grown_since, await _all_have(streams, last - first))
        print(
            f"{model}: a prompt of {LONG_PROMPT} tokens was read in {ended - began:.2f} s", end=""
        )
        print(f" beside {STREAMS} streams, which made tokens {first} to {last}")
        for name, alone in (("before the prompt", before), ("of these tokens, alone", grown)):
            median = statistics.median(alone)
            print(
                f"  gap {name}: median {median * 1e3:.1f} ms, p99 {_p99(alone) / median:.2f}x;"
                f" beside the prompt: median {statistics.median(beside) / median:.2f}x,"
                f" p99 {_p99(beside) / median:.2f}x, worst {max(beside) / median:.2f}x",
                flush=True,
            )

    with serving(f"--model=m={model_folder(model)}") as served:
        asyncio.run(run(served.address))


def _gaps(streams: list[Followed], since: float, until: float) -> list[float]:
    return [b - a for s in streams for a, b in pairwise(s.times) if since <= b <= until]


def _p99(gaps: list[float]) -> float:
    return statistics.quantiles(gaps, n=100)[98]


def shared_prefix(model: str) -> None:
    """Time to a first token behind a beginning that nobody had, and that somebody had."""
    times: dict[str, list[float]] = {"miss": [], "hit": []}
    with serving(f"--model=m={model_folder(model)}") as served, Client(served.address) as client:
        client.generate("m", _ids(64), max_new_tokens=4)
        for _ in range(ROUNDS):
            prefix = _ids(PREFIX)
            for kind in ("miss", "hit"):
                prompt = prefix + _ids(OWN)
                began = time.perf_counter()
                client.generate("m", prompt, max_new_tokens=1, temperature=0.0, timeout=600)
                times[kind].append(time.perf_counter() - began)
    ratios = [miss / hit for miss, hit in zip(times["miss"], times["hit"], strict=True)]
    print(
        f"{model}: {PREFIX} tokens in common: miss {statistics.median(times['miss']) * 1e3:.0f} ms,"
        f" hit {statistics.median(times['hit']) * 1e3:.1f} ms; {statistics.median(ratios):.1f}x"
        f" ({min(ratios):.1f} to {max(ratios):.1f})",
        flush=True,
    )


def short_memory(model: str) -> None:
    """Requests of mixed length with room for a tenth of them, all at once."""
    folder = model_folder(model)
    shapes = [MIXED[i % len(MIXED)] for i in range(REQUESTS)]
    num_tokens = sum(prompt + new for prompt, new in shapes)
    config = SHAPES[model]()
    head_size = config.hidden_size // config.num_attention_heads
    token_bytes = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * head_size
    memory = int(token_bytes * num_tokens / REQUESTS * ROOM_FOR)

    async def run(address: str) -> list[Any]:
        async with AsyncClient(address, timeout=900) as client:
            return await asyncio.gather(
                *(
                    client.generate("m", _ids(prompt), max_new_tokens=new, ignore_eos=True)
                    for prompt, new in shapes
                ),
                return_exceptions=True,
            )

    with serving(f"--model=m={folder}", f"--kv-memory={memory}") as served:
        made = asyncio.run(run(served.address))
        with Client(served.address) as client:
            (counts,) = client.stats()["workers"].values()
    wanted = [new for _, new in shapes]
    whole = [
        getattr(one, "usage", None) is not None and one.usage.completion_tokens == new
        for one, new in zip(made, wanted, strict=True)
    ]
    print(
        f"{model}: {counts['pages_total'] * _PAGE_TOKENS} tokens of room, {num_tokens} asked for:"
        f" {sum(whole)} of {REQUESTS} whole, {counts['preemptions']} preemptions,"
        f" {counts['recomputed_tokens'] / num_tokens:.1%} of tokens computed again",
        flush=True,
    )


def endurance(_: str) -> None:
    """So many small requests: does any process of the server grow?"""

    async def ask(client: AsyncClient, numbers: Any, texts: list[list[int]]) -> None:
        for number in numbers:
            prompt = texts[number % len(texts)][: number % 65] + _ids(1 + number % 39)
            await client.generate("m", prompt, max_new_tokens=1 + number % 29, seed=number)

    async def run(served: Any) -> None:
        texts = [_ids(64) for _ in range(50)]
        async with AsyncClient(served.address, timeout=120) as client:
            for tenth in range(10):
                numbers = iter(range(tenth * ENDURED // 10, (tenth + 1) * ENDURED // 10))
                await asyncio.gather(*(ask(client, numbers, texts) for _ in range(AT_ONCE)))
                mib = ", ".join(f"{name} {mib:.1f}" for name, mib in _resident(served.pid).items())
                print(f"{(tenth + 1) * ENDURED // 10:6d} {mib} MiB", flush=True)

    # Outcomes are kept for whoever asks again, a KiB each: as many as there are after a tenth.
    kept = f"--set=outcomes.keys={ENDURED // 10}"
    with serving(f"--model=m={model_folder('tiny')}", "--kv-memory=8MiB", kept) as served:
        asyncio.run(run(served))


def _resident(gateway: int) -> dict[str, float]:
    children = Path(f"/proc/{gateway}/task/{gateway}/children").read_text().split()
    names = {"gateway": gateway} | {f"worker {i}": int(pid) for i, pid in enumerate(children)}
    found = {}
    for name, pid in names.items():
        (line,) = [
            line
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("RssAnon:")
        ]
        found[name] = int(line.split()[1]) / 1024
    return found


WHAT: dict[str, Callable[[str], None]] = {
    "long": long_prompt,
    "shared": shared_prefix,
    "short": short_memory,
    "endurance": endurance,
}


def main() -> None:
    """Run what was asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=[*SHAPES], default="m2")
    parser.add_argument("--only", nargs="+", choices=[*WHAT], default=[*WHAT])
    args = parser.parse_args()
    for what in args.only:
        WHAT[what](args.model)


if __name__ == "__main__":
    main()
