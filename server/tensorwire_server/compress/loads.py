"""What is asked of both servers to compare their speed.

A load is a kind of work in whole units, so that it can be made as large as a measurement needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

# Of a prompt whose answer is measured: short, so that next to nothing of the time goes on it.
_DECODE_PROMPT_TOKENS = 8
_PREFILL_TOKENS = 512
_PREFILL_PROMPTS = 8  # at once at most


class Server(Protocol):
    """What a load needs of a server."""

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> None:
        """Continue all prompts at once by exactly so many tokens."""

    def embed(self, texts: Sequence[str]) -> None:
        """Embed texts in one request."""


class Load(Protocol):
    """One kind of work."""

    @property
    def name(self) -> str:
        """What it is called in a report."""

    @property
    def unit(self) -> str:
        """In what its speed is told."""

    @property
    def most(self) -> int:
        """The largest amount that may be asked for at once."""

    def run(self, server: Server, amount: int, chance: random.Random) -> int:
        """Have it done; return how many units that were.

        Args:
            amount: how much of it, from 1 to `most`.
            chance: decides on what it is done; the same state gives the same work.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """Answers of `amount` tokens, so many streams at once; their short prompts count as time."""

    streams: int
    context_tokens: int
    vocab_size: int
    unit: str = "tokens/s"

    @property
    def name(self) -> str:
        """What it is called in a report."""
        return f"decode, {self.streams} {'stream' if self.streams == 1 else 'streams'}"

    @property
    def most(self) -> int:
        """The longest answer: what the context leaves, and no more than is usual."""
        return min(self.context_tokens - _DECODE_PROMPT_TOKENS, 256)

    def run(self, server: Server, amount: int, chance: random.Random) -> int:
        """Have prompts continued; return the number of new tokens."""
        prompts = _prompts(self.streams, _DECODE_PROMPT_TOKENS, self.vocab_size, chance)
        server.generate(prompts, amount)
        return self.streams * amount


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """Long prompts with one token for an answer, `amount` of them, all at once."""

    context_tokens: int
    vocab_size: int
    unit: str = "tokens/s"

    @property
    def prompt_tokens(self) -> int:
        """The length of a prompt."""
        return min(self.context_tokens - 1, _PREFILL_TOKENS)

    @property
    def name(self) -> str:
        """What it is called in a report."""
        return f"prefill, prompts of {self.prompt_tokens}"

    @property
    def most(self) -> int:
        """The largest number of prompts."""
        return _PREFILL_PROMPTS

    def run(self, server: Server, amount: int, chance: random.Random) -> int:
        """Have prompts read; return the number of their tokens."""
        # Never the same twice: a server computes the beginnings that prompts share only once.
        server.generate(_prompts(amount, self.prompt_tokens, self.vocab_size, chance), 1)
        return amount * self.prompt_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Embed:
    """`amount` requests of so many texts, one after the other."""

    texts_at_once: int
    texts: Sequence[str]
    unit: str = "texts/s"

    @property
    def name(self) -> str:
        """What it is called in a report."""
        return f"embed, {self.texts_at_once} {'text' if self.texts_at_once == 1 else 'texts'}"

    @property
    def most(self) -> int:
        """The largest number of requests."""
        return 1000

    def run(self, server: Server, amount: int, chance: random.Random) -> int:
        """Have texts embedded; return their number."""
        for _ in range(amount):
            server.embed(chance.choices(self.texts, k=self.texts_at_once))
        return amount * self.texts_at_once


def _prompts(
    count: int, num_tokens: int, vocab_size: int, chance: random.Random
) -> list[list[int]]:
    return [[chance.randrange(vocab_size) for _ in range(num_tokens)] for _ in range(count)]
