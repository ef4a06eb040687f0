"""The key/value budget in pages: who may hold how much, without knowing what lies behind it."""

from __future__ import annotations


class PagesExhausted(Exception):
    """More pages were asked for than are free; nothing was taken."""

    def __init__(self, *, wanted: int, free: int) -> None:
        super().__init__(f"{wanted} pages wanted, {free} free")
        self.wanted, self.free = wanted, free


class PagePool:
    """Hands out page numbers 0 .. num_pages - 1, each to one owner at a time."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        if num_pages < 1 or page_tokens < 1:
            raise ValueError(f"need at least one page of one token, got {num_pages}, {page_tokens}")
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        # A stack: the page freed last is handed out first, while it is still in the CPU's cache.
        self._free = list(range(num_pages - 1, -1, -1))
        self._used: set[int] = set()

    @property
    def free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages that have an owner."""
        return len(self._used)

    def pages_for(self, num_tokens: int) -> int:
        """Return how many pages hold `num_tokens`."""
        return -(-num_tokens // self.page_tokens)

    def allocate(self, num_pages: int) -> tuple[int, ...]:
        """Take pages out of the pool.

        Raises:
            PagesExhausted: fewer are free; nothing was taken.
        """
        if num_pages > len(self._free):
            raise PagesExhausted(wanted=num_pages, free=len(self._free))
        pages = tuple(self._free.pop() for _ in range(num_pages))
        self._used.update(pages)
        return pages

    def release(self, pages: tuple[int, ...]) -> None:
        """Give pages back; each must be in use."""
        assert len(set(pages)) == len(pages), "a page was released twice at once"
        assert self._used.issuperset(pages), "a page was released that nobody holds"
        self._used.difference_update(pages)
        self._free.extend(reversed(pages))

    def check_invariants(self) -> None:
        """Fail if a page is lost, doubled or both free and used."""
        assert len(self._free) == len(set(self._free)), "a page is free twice"
        assert not self._used.intersection(self._free), "a page is both free and used"
        assert len(self._free) + len(self._used) == self.num_pages, "a page is lost"
