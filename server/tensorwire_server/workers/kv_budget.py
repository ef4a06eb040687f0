"""How much memory a model's key/value cache may take, and how many pages that is."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorwire_server.scheduling.work import GenerateEngine
    from tensorwire_server.workers.spec import WorkerSpec

log = logging.getLogger(__name__)

# Of what is free once the weights are loaded. The rest is for activations, and for everybody else.
_PART_OF_FREE = 0.5
_SAVED_ON_LEAVING = 64  # pages, see `KVBudget`; at most an eighth of all


class KVBudgetTooSmall(ValueError):
    """There is no room for a single page; the message is one sentence for a person."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVBudget:
    """What the scheduler may hand out."""

    num_pages: int
    page_tokens: int
    max_running: int  # less than was asked for, where the budget is small
    # Of a sequence that leaves, so many pages go to the prefix cache. They are copied before its
    # own are released, so there is memory for them beside that of `num_pages`.
    saved_on_leaving: int
    num_bytes: int | None  # None: the engine keeps nothing that would count

    @property
    def num_tokens(self) -> int:
        """Tokens that all sequences and the prefix cache may hold together."""
        return self.num_pages * self.page_tokens


def find_kv_budget(engine: GenerateEngine, spec: WorkerSpec) -> KVBudget:
    """Return the budget of `spec` in pages, or one measured from the memory that is free now.

    Raises:
        KVBudgetTooSmall: not one page can be had.
    """
    page_tokens, max_running = spec.page_tokens, spec.max_running
    pages_per_context = -(-engine.card.context_tokens // page_tokens)
    # As many again: what running sequences leave unused is the prefix cache's.
    most = 2 * max_running * pages_per_context
    geometry = getattr(engine, "kv_geometry", None)
    if geometry is None:
        return KVBudget(
            num_pages=most,
            page_tokens=page_tokens,
            max_running=max_running,
            saved_on_leaving=_SAVED_ON_LEAVING,
            num_bytes=None,
        )
    num_bytes = spec.kv_bytes
    if num_bytes is None:
        num_bytes = int(geometry.free_bytes() * _PART_OF_FREE * spec.kv_share)
    page_bytes, slack = geometry.page_bytes(page_tokens), geometry.slack_bytes(page_tokens)
    if slack:
        # Many short sequences would take more for the rests of system pages than for tokens.
        max_running = max(1, min(max_running, num_bytes // 2 // slack))
    affordable = (num_bytes - slack * max_running) // page_bytes
    saved_on_leaving = min(_SAVED_ON_LEAVING, affordable // 8)
    num_pages = min(most, affordable - saved_on_leaving)
    if num_pages < 1:
        raise KVBudgetTooSmall(
            f"{num_bytes} bytes for keys and values do not hold one page of {page_tokens} tokens,"
            f" {page_bytes} bytes; give more with --kv-memory"
        )
    if num_pages < pages_per_context:
        log.warning(
            "kv_memory_is_short model=%s tokens=%d context_tokens=%d",
            spec.model, num_pages * page_tokens, engine.card.context_tokens,
        )  # fmt: skip
    return KVBudget(
        num_pages=num_pages,
        page_tokens=page_tokens,
        max_running=max_running,
        saved_on_leaving=saved_on_leaving,
        num_bytes=num_bytes,
    )
