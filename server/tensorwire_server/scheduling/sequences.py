"""One prompt being continued: what was asked, what is in the cache, what came out."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from tensorwire_server.scheduling.work import Sampling  # noqa: TC001 (the compiled form asks)


class SequenceState(Enum):
    """WAITING -> RUNNING -> FINISHED; preempted back to WAITING; an end may skip RUNNING."""

    WAITING = "waiting"  # no pages
    RUNNING = "running"  # has pages for all its tokens, and gets more as it grows
    FINISHED = "finished"  # holds nothing


@dataclass(kw_only=True, eq=False)
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
    tenant: str = ""  # whose prefixes it may share

    state: SequenceState = SequenceState.WAITING
    order: tuple[float, int] = (0.0, 0)  # who goes first, and who is preempted last
    pages: list[int] = field(default_factory=list)  # its own; the i-th is for the i-th page_tokens
    num_cached: int = 0  # tokens of `tokens` whose keys and values are in the cache
    is_reading: bool = False  # what was known when it was admitted is not all in the cache
    has_run: bool = False
    num_lost: int = 0  # tokens that were in the cache when it was preempted
    num_held_back: int = 0  # times it waited for another one to compute its prefix
    digests: list[bytes] = field(default_factory=list)  # names of its full pages, as far as needed
    end_digest: bytes | None = None  # of what stands behind these, but for the last token
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
