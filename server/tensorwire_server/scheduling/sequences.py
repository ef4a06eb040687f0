"""One prompt being continued: what was asked, what is in the cache, what came out."""

from __future__ import annotations

from enum import Enum

from tensorwire_server.scheduling.work import Sampling  # noqa: TC001 (the compiled form asks)


class SequenceState(Enum):
    """WAITING -> RUNNING -> FINISHED; preempted back to WAITING; an end may skip RUNNING."""

    WAITING = "waiting"  # no pages
    RUNNING = "running"  # has pages for all its tokens, and gets more as it grows
    FINISHED = "finished"  # holds nothing


class Sequence:
    """A request as the scheduler sees it; only the scheduler writes to it after `submit`.

    A plain class, which is cheap to make and to read where it is compiled.

    Args:
        prompt_ids: at least one.
        max_new_tokens: `so_far` included.
        so_far: tokens an earlier attempt already emitted: they are fed like the prompt, they count
            towards `max_new_tokens`, and the next token's index is their number.
        stop_ids: the model's EOS ids and the client's own.
        deadline: monotonic s, as `arrived_at`.
        priority: the higher goes first.
        tenant: whose prefixes it may share.
    """

    def __init__(
        self,
        *,
        id: int,
        prompt_ids: tuple[int, ...],
        max_new_tokens: int,
        sampling: Sampling,
        so_far: tuple[int, ...] = (),
        stop_ids: frozenset[int] = frozenset(),
        deadline: float | None = None,
        priority: int = 0,
        arrived_at: float = 0.0,
        tenant: str = "",
    ) -> None:
        if not prompt_ids:
            raise ValueError("a sequence needs at least one prompt token")
        if max_new_tokens <= len(so_far):
            raise ValueError(
                f"nothing left to generate: {len(so_far)} tokens so far, "
                f"max_new_tokens is {max_new_tokens}"
            )
        self.id = id
        self.prompt_ids = prompt_ids
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling
        self.so_far = so_far
        self.stop_ids = stop_ids
        self.deadline = deadline
        self.priority = priority
        self.arrived_at = arrived_at
        self.tenant = tenant

        self.tokens = [*prompt_ids, *so_far]  # and then what was sampled
        self.num_tokens_at_most = len(prompt_ids) + max_new_tokens  # how long these may become
        self.state = SequenceState.WAITING
        self.order = (0.0, 0)  # who goes first, and who is preempted last
        self.pages: list[int] = []  # its own; the i-th is for the i-th page_tokens
        self.num_cached = 0  # tokens of `tokens` whose keys and values are in the cache
        self.is_reading = False  # what was known when it was admitted is not all in the cache
        self.has_run = False
        self.num_lost = 0  # tokens that were in the cache when it was preempted
        self.num_held_back = 0  # times it waited for another one to compute its prefix
        self.digests: list[bytes] = []  # names of its full pages, as far as needed
        self.end_digest: bytes | None = None  # of what stands behind these, but for the last token

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
