"""One prompt being continued: what was asked, what is in the cache, what came out."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorwire_server.scheduling.work import Sampling


class SequenceState(Enum):
    """WAITING -> RUNNING -> FINISHED; a cancel or an expiry may skip RUNNING."""

    WAITING = "waiting"  # no pages yet
    RUNNING = "running"  # has all pages it can ever need
    FINISHED = "finished"  # holds nothing


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """A request as the scheduler sees it; only the scheduler writes to it after `submit`.

    `so_far` are tokens an earlier attempt already emitted: they are fed like the prompt, they count
    towards `max_new_tokens`, and the next token's index is their number.
    """

    id: int
    prompt_ids: tuple[int, ...]  # at least one
    max_new_tokens: int  # so_far included
    sampling: Sampling
    so_far: tuple[int, ...] = ()
    stop_ids: frozenset[int] = frozenset()  # the model's EOS ids and the client's own
    deadline: float | None = None  # monotonic s
    priority: int = 0  # the higher goes first
    arrived_at: float = 0.0  # monotonic s

    state: SequenceState = SequenceState.WAITING
    pages: tuple[int, ...] = ()
    num_cached: int = 0  # tokens of `tokens` whose keys and values are in the cache
    tokens: list[int] = field(init=False)  # prompt, so_far, then what was sampled
    num_tokens_at_most: int = field(init=False)  # how long these may become

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("a sequence needs at least one prompt token")
        if self.max_new_tokens <= len(self.so_far):
            raise ValueError(
                f"nothing left to generate: {len(self.so_far)} tokens so far, "
                f"max_new_tokens is {self.max_new_tokens}"
            )
        self.tokens = [*self.prompt_ids, *self.so_far]
        self.num_tokens_at_most = len(self.prompt_ids) + self.max_new_tokens

    @property
    def num_new(self) -> int:
        """Tokens after the prompt, earlier attempts' included."""
        return len(self.tokens) - len(self.prompt_ids)

    @property
    def new_tokens(self) -> list[int]:
        """The tokens after the prompt, earlier attempts' included; a copy."""
        return self.tokens[len(self.prompt_ids) :]

    @property
    def num_to_feed(self) -> int:
        """Tokens not in the cache yet: 1 while decoding, more while the prompt is being read."""
        return len(self.tokens) - self.num_cached

    def is_expired(self, now: float) -> bool:
        """Whether the deadline has passed at `now` (monotonic s)."""
        return self.deadline is not None and self.deadline <= now
