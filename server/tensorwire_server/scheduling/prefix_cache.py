"""Which of a sequence's pages others have computed, and which of its own others may use.

Sequences compute in rows of their own. A page that may serve again is copied: into the cache when
it has been computed (`saves` of a plan), out of it when a sequence begins (`loads`). The pages of a
prompt are saved as soon as they are computed, those of an answer when the sequence leaves, for then
its own pages can be turned into cached ones.

What stands behind a prompt's last whole page, but for its last token, serves only the same prompt
once more: other choices of one answer. It is saved when the second one comes while the first runs.

A sequence that waits is held back while a running one computes the very page it needs next: it then
joins with a hit instead of computing the same. Whoever is held back is named by the last page that
the two have in common, and is let go when that page is there or will not come.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tensorwire_server.scheduling.prefixes import extend_digests, page_digest, root_digest
from tensorwire_server.scheduling.work import Load, Save

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tensorwire_server.scheduling.pages import PagePool
    from tensorwire_server.scheduling.sequences import Sequence
    from tensorwire_server.scheduling.work import StepPlan

_ROOTS_AT_MOST = 1024
_HELD_BACK_AT_MOST = 4  # times; after that a sequence computes its prefix itself


@dataclass(kw_only=True)
class PrefixCounts:
    """What happened since the start."""

    asked_tokens: int = 0  # that sequences had when they were admitted
    hit_tokens: int = 0  # of these, found in the cache
    recomputed_tokens: int = 0  # computed again after a preemption


class PrefixCache:
    """Owns the cached pages of the pool, and what of them is still to be told to the engine."""

    def __init__(self, pool: PagePool, model: str, *, saved_on_leaving: int, share: bool) -> None:
        self.counts = PrefixCounts()
        self.saves: dict[int, Save] = {}  # by page; not told to the engine yet
        self.loads: dict[int, Load] = {}  # by sequence, whose first row is still to come
        self.dropped: list[int] = []
        self._pool = pool
        self._model = model
        self._saved_on_leaving = saved_on_leaving
        self._share = share  # between tenants
        self._roots: dict[str, bytes] = {}
        self._readers: dict[bytes, int] = {}  # page's name -> who computes it
        # What follows a text's whole pages, by name -> who has it in its own rows, and still runs.
        self._ends: dict[bytes, int] = {}
        self._held_back: dict[bytes, dict[int, Sequence]] = {}

    # -- pages ----------------------------------------------------------------------------------

    def allocate(self, num_pages: int) -> list[int]:
        """Take pages out of the pool.

        Raises:
            PagesExhausted: as the pool does.
        """
        pages = self._pool.allocate(num_pages)
        self._note_evicted()
        return pages

    def _note_evicted(self) -> None:
        for page in self._pool.take_evicted():
            if self.saves.pop(page, None) is None:
                self.dropped.append(page)

    def _keep(
        self, page: int, digest: bytes, sequence_id: int, index: int, end: int | None = None
    ) -> None:
        """Keep a sequence's page at this index, or what of it comes before position `end`."""
        page_tokens = self._pool.page_tokens
        self._pool.keep(page, digest)
        start = index * page_tokens
        self.saves[page] = Save(
            page=page,
            sequence_id=sequence_id,
            start=start,
            end=start + page_tokens if end is None else end,
            page_tokens=page_tokens,
        )

    # -- a sequence's life ----------------------------------------------------------------------

    def find(self, sequence: Sequence) -> list[int]:
        """Return the cached pages that a sequence can begin with; at least one token is left."""
        self._name_pages(sequence, len(sequence.tokens))
        self._name_end(sequence)
        pages = []
        for digest in self._reusable(sequence):
            page = self._pool.find(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def begin(self, sequence: Sequence, pages: list[int], *, has_room: bool) -> None:
        """Have a sequence that was admitted begin with these pages, and others wait for its own.

        Args:
            has_room: for one page more, of which nobody has a copy yet.
        """
        names, most = self._reusable(sequence), self._num_reusable_tokens(sequence)
        # From the end: what comes later in a text is to be evicted first.
        self._pool.touch(reversed(names[: len(pages)]))
        for page in pages:
            self._pool.pin(page)
        if has_room and len(pages) == len(names) - 1 and names[-1] in self._ends:
            pages = [*pages, self._copy_end(names[-1], len(pages), most)]
        num_known, num_hit = len(sequence.tokens), min(len(pages) * self._pool.page_tokens, most)
        sequence.num_cached = num_hit
        counts = self.counts
        if sequence.num_lost:
            counts.recomputed_tokens += max(0, sequence.num_lost - num_hit)
        else:
            counts.asked_tokens += num_known
            counts.hit_tokens += num_hit
        for digest in {*sequence.digests, *names[len(pages) :]}.difference(names[: len(pages)]):
            self._readers.setdefault(digest, sequence.id)
        if pages:
            self.loads[sequence.id] = Load(
                sequence_id=sequence.id,
                pages=tuple(pages),
                token_ids=tuple(sequence.tokens[:num_hit]),
            )

    def _copy_end(self, digest: bytes, index: int, end: int) -> int:
        """Have what follows the whole pages copied from whoever has it; return the pinned page."""
        page = self.allocate(1)[0]
        self._keep(page, digest, self._ends[digest], index, end)
        self._pool.pin(page)
        return page

    def note_read(self, sequence: Sequence, start: int) -> list[Sequence]:
        """Save the pages that were completed since position `start`; return who waited for them."""
        page_tokens = self._pool.page_tokens
        first, last = start // page_tokens, sequence.num_cached // page_tokens
        let_go: list[Sequence] = []
        for index in range(first, min(last, len(sequence.digests))):
            digest = sequence.digests[index]
            if self._pool.find(digest) is None and self._pool.available:
                self._keep(self.allocate(1)[0], digest, sequence.id, index)
            let_go += self._let_go(digest, sequence.id)
        if sequence.end_digest is not None and not sequence.is_reading:
            self._ends[sequence.end_digest] = sequence.id
            let_go += self._let_go(sequence.end_digest, sequence.id)
        # All of the text each time that it has doubled: with each chunk, what a long prompt costs
        # here would grow with the square of its length.
        if last > first and (last >= 2 * first or not sequence.is_reading):
            self._pool.touch(reversed(sequence.digests[:last]))
        return let_go

    def leave(self, sequence: Sequence, *, keep: bool) -> list[Sequence]:
        """Take a sequence's pages, keep of them what may serve; return who waited for it."""
        load = self.loads.pop(sequence.id, None)
        if load is not None:
            self._unpin(load)
        if keep:
            self._name_pages(sequence, sequence.num_cached)
            self._keep_own(sequence)
        else:
            for digest in _names(sequence):
                self._pool.forget(digest)
            self._note_evicted()
        self._pool.release(sequence.pages)
        sequence.pages = []
        let_go: list[Sequence] = []
        for digest in _names(sequence):
            let_go += self._let_go(digest, sequence.id)
            if self._ends.get(digest) == sequence.id:
                del self._ends[digest]
        return let_go

    def _keep_own(self, sequence: Sequence) -> None:
        last = sequence.num_cached // self._pool.page_tokens
        saved: list[int] = []
        for index in range(last):
            if len(saved) == self._saved_on_leaving:
                break
            if self._pool.find(sequence.digests[index]) is None:
                self._keep(sequence.pages[index], sequence.digests[index], sequence.id, index)
                saved.append(index)
        for index in reversed(saved):
            del sequence.pages[index]
        self._pool.touch(reversed(sequence.digests[:last]))

    # -- holding back ---------------------------------------------------------------------------

    def hold_back(self, sequence: Sequence, num_hits: int) -> bool:
        """Say if a running sequence computes what this one needs next; then it is kept here.

        Args:
            num_hits: pages that it would find now.
        """
        digests = self._reusable(sequence)[num_hits:]
        if not digests or sequence.num_held_back == _HELD_BACK_AT_MOST:
            return False
        reader = self._readers.get(digests[0])
        # For less than a page it is not worth a step to wait.
        if reader is None or digests[0] == sequence.end_digest:
            return False
        shared = digests[0]
        for digest in digests:
            if self._readers.get(digest) != reader:
                break
            shared = digest
        sequence.num_held_back += 1
        self._held_back.setdefault(shared, {})[sequence.id] = sequence
        return True

    def forget_held_back(self, sequence: Sequence) -> bool:
        """Drop a sequence that is held back; False if it is not."""
        for digest in _names(sequence):
            waiting = self._held_back.get(digest, {})
            if waiting.pop(sequence.id, None) is not None:
                if not waiting:
                    del self._held_back[digest]
                return True
        return False

    @property
    def held_back(self) -> list[Sequence]:
        """Who is held back."""
        return [sequence for waiting in self._held_back.values() for sequence in waiting.values()]

    def _let_go(self, digest: bytes, reader: int) -> list[Sequence]:
        if self._readers.get(digest) != reader:
            return []
        del self._readers[digest]
        return list(self._held_back.pop(digest, {}).values())

    # -- plans ----------------------------------------------------------------------------------

    def note_told(self, plan: StepPlan) -> None:
        """Take in that the engine has done what a plan said."""
        del self.dropped[: len(plan.dropped)]
        for save in plan.saves:
            if self.saves.get(save.page) is save:
                del self.saves[save.page]
        for load in plan.loads:
            if self.loads.get(load.sequence_id) is load:
                del self.loads[load.sequence_id]
                self._unpin(load)

    def note_failed(self, plan: StepPlan, running: Mapping[int, Sequence]) -> None:
        """Take in that nobody knows what of a plan was done."""
        lost = [save.page for save in plan.saves if self.saves.pop(save.page, None) is not None]
        if lost and self.loads:
            self._cut_loads(set(lost), running)
        for page in lost:
            self._pool.forget_page(page)
        self._note_evicted()

    def _cut_loads(self, lost: set[int], running: Mapping[int, Sequence]) -> None:
        """Have sequences compute themselves what they were to begin with, from a lost page on."""
        for load in [*self.loads.values()]:
            left = next((i for i, page in enumerate(load.pages) if page in lost), len(load.pages))
            if left == len(load.pages):
                continue
            for page in load.pages[left:]:
                self._pool.unpin(page)
            sequence = running[load.sequence_id]
            for digest in self._reusable(sequence)[left : len(load.pages)]:
                self._readers.setdefault(digest, sequence.id)
            sequence.num_cached = num_tokens = left * self._pool.page_tokens
            if left:
                self.loads[sequence.id] = replace(
                    load, pages=load.pages[:left], token_ids=load.token_ids[:num_tokens]
                )
            else:
                del self.loads[sequence.id]

    def _unpin(self, load: Load) -> None:
        for page in reversed(load.pages):
            self._pool.unpin(page)

    def _num_reusable_tokens(self, sequence: Sequence) -> int:
        """Return how many tokens may be loaded: the last one has to be fed, for its logits."""
        most = len(sequence.tokens) - 1
        first_scored = sequence.sampling.first_scored(len(sequence.prompt_ids))
        return most if first_scored is None else min(most, first_scored)

    def _reusable(self, sequence: Sequence) -> list[bytes]:
        """Return the names of the pages that may be loaded, and of what of the next one may."""
        num_pages = self._num_reusable_tokens(sequence) // self._pool.page_tokens
        end = sequence.end_digest
        return sequence.digests[:num_pages] + ([] if end is None else [end])

    def _name_end(self, sequence: Sequence) -> None:
        most, page_tokens = self._num_reusable_tokens(sequence), self._pool.page_tokens
        num_pages = most // page_tokens
        before = sequence.digests[num_pages - 1] if num_pages else self._root(sequence)
        rest = sequence.tokens[num_pages * page_tokens : most]
        sequence.end_digest = page_digest(before, rest) if rest else None

    def _name_pages(self, sequence: Sequence, num_tokens: int) -> None:
        root, page_tokens = self._root(sequence), self._pool.page_tokens
        extend_digests(sequence.digests, root, sequence.tokens, num_tokens, page_tokens)

    def _root(self, sequence: Sequence) -> bytes:
        tenant = "" if self._share else sequence.tenant
        root = self._roots.get(tenant)
        if root is None:
            if len(self._roots) >= _ROOTS_AT_MOST:
                self._roots.clear()
            root = self._roots[tenant] = root_digest(self._model, tenant)
        return root

    def check_invariants(self, running: Mapping[int, Sequence]) -> None:
        """Fail if the books disagree."""
        pool = self._pool
        for page in self.saves:
            assert pool.is_cached(page), "a page is to be saved that is not cached"
        pins = [page for load in self.loads.values() for page in load.pages]
        assert pool.num_pins == len(pins), "a page is pinned for nobody"
        assert self._held_back.keys() <= self._readers.keys(), "held back for nobody"
        assert all(self._held_back.values())
        for digest, holder in self._ends.items():
            assert running[holder].end_digest == digest, "who has it has left"


def _names(sequence: Sequence) -> list[bytes]:
    end = sequence.end_digest
    return sequence.digests if end is None else [*sequence.digests, end]
