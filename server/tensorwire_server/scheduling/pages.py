"""The key/value budget in pages: who holds which, and which prefixes are kept for others.

A page of the pool is in one of three places:

    free --allocate--> private: one sequence's own --release--> free
      |                   |
      |                   +--keep: its tokens may serve others--+
      |                                                         v
      +<--evicted: least recently used, unpinned, wanted--  cached: under the digest of its tokens

What lies behind a page is the engine's business; `take_evicted` tells it what to forget.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class PagesExhausted(Exception):
    """More pages were asked for than can be had; nothing was taken."""

    def __init__(self, *, wanted: int, available: int) -> None:
        super().__init__(f"{wanted} pages wanted, {available} available")
        self.wanted, self.available = wanted, available


class PagePool:
    """Hands out page numbers 0 .. num_pages - 1, and keeps the ones that may be used again."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        if num_pages < 1 or page_tokens < 1:
            raise ValueError(f"need at least one page of one token, got {num_pages}, {page_tokens}")
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.num_evictions = 0  # since the start
        # A stack: the page freed last is handed out first, while it is still in the CPU's cache.
        self._free = list(range(num_pages - 1, -1, -1))
        self._used: set[int] = set()
        self._cached: dict[bytes, int] = {}  # digest -> page
        self._digests: list[bytes | None] = [None] * num_pages  # of cached pages
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached, unpinned; the next to go first
        self._pins: dict[int, int] = {}  # of cached pages that must not go
        self._evicted: list[int] = []

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages that have an owner."""
        return len(self._used)

    @property
    def cached(self) -> int:
        """Pages that are kept for whoever has the same tokens."""
        return len(self._cached)

    @property
    def available(self) -> int:
        """Pages that can be allocated: free ones, and kept ones that nobody has pinned."""
        return len(self._free) + len(self._idle)

    def num_idle(self, pages: Iterable[int]) -> int:
        """Return how many of these cached pages nobody has pinned."""
        return sum(page in self._idle for page in pages)

    def pages_for(self, num_tokens: int) -> int:
        """Return how many pages hold `num_tokens`."""
        return -(-num_tokens // self.page_tokens)

    def allocate(self, num_pages: int) -> list[int]:
        """Take pages out of the pool, evicting kept ones where it must.

        Raises:
            PagesExhausted: fewer are available; nothing was taken.
        """
        if num_pages > self.available:
            raise PagesExhausted(wanted=num_pages, available=self.available)
        while len(self._free) < num_pages:
            page, _ = self._idle.popitem(last=False)
            self._drop(page)
            self.num_evictions += 1
        pages = [self._free.pop() for _ in range(num_pages)]
        self._used.update(pages)
        return pages

    def release(self, pages: Iterable[int]) -> None:
        """Give pages back; each must be in use."""
        given = list(pages)
        assert len(set(given)) == len(given), "a page was released twice at once"
        assert self._used.issuperset(given), "a page was released that nobody holds"
        self._used.difference_update(given)
        self._free.extend(reversed(given))

    # -- pages that are kept --------------------------------------------------------------------

    def keep(self, page: int, digest: bytes) -> None:
        """Turn an owned page into a cached one; no other may be cached under this digest."""
        assert page in self._used, "a page was kept that nobody holds"
        assert digest not in self._cached, "the same tokens are kept twice"
        self._used.remove(page)
        self._cached[digest] = page
        self._digests[page] = digest
        self._idle[page] = None

    def find(self, digest: bytes) -> int | None:
        """Return the page that is cached under a digest."""
        return self._cached.get(digest)

    def touch(self, digests: Iterable[bytes]) -> None:
        """Move pages behind the others that are to go; the last one goes last."""
        for digest in digests:
            page = self._cached.get(digest)
            if page is not None and page in self._idle:
                self._idle.move_to_end(page)

    def pin(self, page: int) -> None:
        """Keep a cached page from being evicted until it is unpinned as often as it was pinned."""
        assert self.is_cached(page), "a page was pinned that is not cached"
        self._pins[page] = self._pins.get(page, 0) + 1
        self._idle.pop(page, None)

    def unpin(self, page: int) -> None:
        """Take one pin away."""
        count = self._pins.pop(page) - 1
        if count:
            self._pins[page] = count
        else:
            self._idle[page] = None

    def forget(self, digest: bytes) -> None:
        """Evict a cached page, unless somebody has pinned it."""
        page = self._cached.get(digest)
        if page is not None:
            self.forget_page(page)

    def forget_page(self, page: int) -> None:
        """Evict a page if it is cached and nobody has pinned it."""
        if page in self._idle:
            del self._idle[page]
            self._drop(page)

    def is_cached(self, page: int) -> bool:
        """Say if a page is kept for whoever has the same tokens."""
        return self._digests[page] is not None

    @property
    def num_pins(self) -> int:
        """Pins on all pages together."""
        return sum(self._pins.values())

    def take_evicted(self) -> list[int]:
        """Return the pages that were evicted since the last call."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def _drop(self, page: int) -> None:
        """Free a page that is not cached any more, as far as `_idle` knows."""
        digest = self._digests[page]
        assert digest is not None, "a page was evicted that is not cached"
        del self._cached[digest]
        self._digests[page] = None
        self._free.append(page)
        self._evicted.append(page)

    def check_invariants(self) -> None:
        """Fail if a page is lost, doubled or in two places."""
        free, cached = set(self._free), set(self._cached.values())
        assert len(self._free) == len(free), "a page is free twice"
        assert not self._used & free, "a page is both free and used"
        assert not cached & free, "a page is both free and cached"
        assert not cached & self._used, "a page is both used and cached"
        assert len(free) + len(self._used) + len(cached) == self.num_pages, "a page is lost"
        named = {digest: page for page, digest in enumerate(self._digests) if digest is not None}
        assert self._cached == named
        assert self._idle.keys() | self._pins.keys() == cached, "neither idle nor pinned"
        assert not self._idle.keys() & self._pins.keys(), "both idle and pinned"
        assert all(count > 0 for count in self._pins.values())
