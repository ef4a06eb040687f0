"""Calls of every kind, drawn by chance; each checks what it gets.

A call fails with an AssertionError if what came is wrong, else with the client's own error.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from system.serving import assert_oracle, expected
from tensorwire import AsyncClient, Client, ConnectionLost, DeadlineExceeded

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from random import Random
    from typing import Any

    from numpy.typing import NDArray
    from tensorwire import Generation

ENDLESS_TOKENS = 400  # of what is not read to its end
LARGEST_BYTES = 10**6.4


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text to ask for, whose tokens are known beforehand."""

    prompt: str
    seed: int
    num_tokens: int

    def arguments(self) -> dict[str, Any]:
        """Return what `generate` and `stream` are called with."""
        return {"prompt": self.prompt, "seed": self.seed, "max_new_tokens": self.num_tokens}

    def check(self, generation: Generation, read: list[int] | None = None) -> None:
        """Fail unless all of it came, also in the pieces that were read, if any."""
        assert_oracle(generation, self.prompt, self.seed, self.num_tokens)
        assert read is None or read == generation.token_ids, "the stream differs from its text"

    def check_beginning(self, read: list[int]) -> None:
        """Fail unless what was read is how the text begins."""
        right = expected(self.prompt, self.seed, self.num_tokens)
        assert read == right[: len(read)], "the stream begins otherwise"


def text_of(chance: Random, num_tokens: int | None = None) -> Text:
    """Return a text of some tokens, or of so many."""
    prompt = "".join(chance.choices("abcdefgh ", k=chance.randrange(1, 200)))
    return Text(
        prompt=prompt,
        seed=chance.randrange(2**31),
        num_tokens=num_tokens or chance.randrange(1, 60),
    )


def _array(chance: Random) -> NDArray[np.uint8]:
    size = int(LARGEST_BYTES ** chance.random())  # small ones are as frequent as large ones
    return np.frombuffer(chance.randbytes(size), np.uint8)


def _check_same(answer: object, array: NDArray[np.uint8]) -> None:
    assert isinstance(answer, np.ndarray), "no array"
    assert np.array_equal(answer, array), "another array"


def _pause_s(chance: Random) -> float:
    """Return how long to leave a stream unread: mostly not at all."""
    return chance.random() * 0.02 if chance.random() < 0.05 else 0.0


def generate(client: Client, chance: Random) -> None:
    """Ask for a whole text."""
    text = text_of(chance)
    text.check(client.generate("oracle", **text.arguments()))


def stream(client: Client, chance: Random) -> None:
    """Read a text as it comes, now and then slowly."""
    text, read = text_of(chance), list[int]()
    deltas = client.stream("oracle", **text.arguments())
    for delta in deltas:
        read += delta.token_ids
        time.sleep(_pause_s(chance))
    text.check(deltas.generation, read)


def leave(client: Client, chance: Random) -> None:
    """Read the beginning of a stream; close it, or only forget it."""
    text, read = text_of(chance, ENDLESS_TOKENS), list[int]()
    enough = chance.randrange(30)
    deltas = client.stream("oracle", **text.arguments())
    for delta in deltas:
        read += delta.token_ids
        if len(read) >= enough:
            break
    text.check_beginning(read)
    if chance.random() < 0.5:
        deltas.close()


def infer(client: Client, chance: Random) -> None:
    """Have an array sent back."""
    array = _array(chance)
    _check_same(client.infer("echo", {"x": array})["x"], array)


def hurry(client: Client, chance: Random) -> None:
    """Leave less time than the text may need, and than a lost connection may."""
    text = text_of(chance, 100)
    with suppress(DeadlineExceeded, ConnectionLost):
        timeout_s = chance.uniform(0.002, 0.2)
        text.check(client.generate("oracle", **text.arguments(), timeout=timeout_s))


async def generate_async(client: AsyncClient, chance: Random) -> None:
    """Ask for a whole text."""
    text = text_of(chance)
    text.check(await client.generate("oracle", **text.arguments()))


async def stream_async(client: AsyncClient, chance: Random) -> None:
    """Read a text as it comes, now and then slowly."""
    text, read = text_of(chance), list[int]()
    deltas = client.stream("oracle", **text.arguments())
    async for delta in deltas:
        read += delta.token_ids
        await asyncio.sleep(_pause_s(chance))
    text.check(deltas.generation, read)


async def cancel_async(client: AsyncClient, chance: Random) -> None:
    """Cancel the task that waits for a text."""
    text = text_of(chance, ENDLESS_TOKENS)
    with suppress(TimeoutError):
        async with asyncio.timeout(chance.random() * 0.05):
            text.check(await client.generate("oracle", **text.arguments()))


async def infer_async(client: AsyncClient, chance: Random) -> None:
    """Have an array sent back."""
    array = _array(chance)
    answer = await client.infer("echo", {"x": array})
    _check_same(answer["x"], array)


# How many of a hundred calls are of each kind.
CALLS: dict[Callable[[Client, Random], None], int] = {
    generate: 25, stream: 20, leave: 15, infer: 30, hurry: 10,
}  # fmt: skip
ASYNC_CALLS: dict[Callable[[AsyncClient, Random], Awaitable[None]], int] = {
    generate_async: 30, stream_async: 20, cancel_async: 15, infer_async: 35,
}  # fmt: skip
