"""Arrays between gateway and worker without a copy: each lends the other what lies in its memory.

lender      SHM on a stream: where the segments of the next message lie, and the loan's number
borrower    reads them where they are
borrower    SHM on stream 0: the loans whose last array is gone
lender      lets go of them; their memory is free when nobody else needs it
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections import Counter, deque
from typing import TYPE_CHECKING, Any

import numpy as np
from tensorwire_protocol.errors import BadFraming
from tensorwire_protocol.tensors import padding

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tensorwire_server.memory.slab import Borrowed, Slab

GATEWAY, WORKER = 0, 1  # whose memory it is


class Sharing:
    """One end of a link between two processes of one machine; runs on its event loop.

    Args:
        own: what this side gives out.
        theirs: what the peer gives out.
        is_gateway: which side this is.
    """

    def __init__(self, own: Slab, theirs: Borrowed, *, is_gateway: bool) -> None:
        self.on_returns: Callable[[list[int]], None] = _nothing
        self._memories: tuple[Slab | Borrowed, Slab | Borrowed]
        self._memories = (own, theirs) if is_gateway else (theirs, own)
        self._own = own
        self._num_loans = 0
        self._lent: dict[int, list[memoryview]] = {}  # kept alive until the peer is done
        self._loop = asyncio.get_running_loop()
        self._borrowed: Counter[int] = Counter()  # segments in use, by loan
        self._dead: deque[int] = deque()  # loans of segments that are not; filled in any thread
        self._look_is_due = False

    @property
    def num_used_bytes(self) -> int:
        """Bytes that this side has given out, to this link or another."""
        return self._own.num_used_bytes

    @property
    def num_lent(self) -> int:
        """Loans that have not come back."""
        return len(self._lent)

    @property
    def num_borrowed(self) -> int:
        """Loans that are in use here."""
        return len(self._borrowed)

    def lend(self, segments: Sequence[memoryview]) -> dict[str, Any] | None:
        """Return what SHM says of segments, which are copied where they lie in no shared memory.

        None: there is no room for the copies.
        """
        found = [self._find(segment) for segment in segments]
        kept = list(segments)
        missing = [i for i, place in enumerate(found) if place is None]
        if missing:
            num_bytes = sum(len(segments[i]) + padding(len(segments[i])) for i in missing)
            block = self._own.allocate(num_bytes)
            if block is None:
                return None
            at = 0
            for i in missing:
                size = len(segments[i])
                kept[i] = block[at : at + size]
                kept[i][:] = segments[i]
                found[i] = self._find(kept[i])
                at += size + padding(size)
        self._num_loans += 1
        self._lent[self._num_loans] = kept
        places = [place for place in found if place is not None]
        return {
            "loan": self._num_loans,
            "owners": [owner for owner, _ in places],
            "offsets": [offset for _, offset in places],
        }

    def _find(self, segment: memoryview) -> tuple[int, int] | None:
        for owner, memory in enumerate(self._memories):
            offset = memory.locate(segment)
            if offset is not None:
                return owner, offset
        return None

    def take_back(self, loans: Sequence[Any]) -> None:
        """Let go of loans that the peer is done with."""
        for loan in loans:
            if type(loan) is int:  # whatever the peer says; a list could not even be looked up
                self._lent.pop(loan, None)

    def borrow(self, places: Mapping[str, Any], lengths: Sequence[int]) -> list[memoryview]:
        """Return the segments that SHM speaks of; the loan ends when all of them are gone.

        Raises:
            BadFraming: they cannot lie there.
        """
        loan, owners, offsets = (places.get(name) for name in ("loan", "owners", "offsets"))
        if not (
            type(loan) is int
            and type(owners) is type(offsets) is list
            and len(owners) == len(offsets) == len(lengths)
            and loan not in self._borrowed
        ):
            raise BadFraming("SHM does not say where each segment lies")
        views = [self._view(*place) for place in zip(owners, offsets, lengths, strict=True)]
        self._borrowed[loan] = len(views)
        for view in views:
            weakref.finalize(view, self._on_dead, loan).atexit = False
        return [view.data for view in views]

    def _view(self, owner: Any, offset: Any, length: int) -> np.ndarray[Any, Any]:
        part = None
        if type(owner) is int and owner in (GATEWAY, WORKER) and type(offset) is int:
            part = self._memories[owner].view(offset, length)
        if part is None:
            raise BadFraming("SHM speaks of memory that was not given out")
        return np.frombuffer(part, np.uint8)

    def _on_dead(self, loan: int) -> None:
        # From a finalizer, which may run anywhere.
        self._dead.append(loan)
        if not self._look_is_due:
            self._look_is_due = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        self._look_is_due = False
        returned = []
        while self._dead:
            loan = self._dead.popleft()
            self._borrowed[loan] -= 1
            if not self._borrowed[loan]:
                del self._borrowed[loan]
                returned.append(loan)
        if returned:
            self.on_returns(returned)

    def close(self) -> None:
        """The link is gone, and with it whoever might have read."""
        self._lent.clear()
        self.on_returns = _nothing


def _nothing(_: list[int]) -> None:
    """Stand in for `on_returns`."""
