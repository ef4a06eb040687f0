"""Whether, when and how a call that failed is tried again. Pure: time and chance come in.

    what failed                            nothing had arrived       something had arrived
    ─────────────────────────────────      ────────────────────      ─────────────────────
    the connection, and it may be again    REQ with the same key     RESUME behind what arrived
    refused, and it may be accepted later  REQ with the same key     (does not happen)
    executed maybe, and it may be again    REQ with the same key     given up
    RESUME: the server knows nothing       REQ with the same key     given up
    executed, the answer was not kept      REQ with a new key        (does not happen)
    anything else                          given up                  given up

A repeated REQ is safe: the server joins it to the request of that key, or replays its outcome.
After a cut connection it is no more of a retry than RESUME: the work goes on where it was. One with
a new key is safe as well: what is asked for is computed once more, with no other effect. The
budget is for what a server has to do again: a request, or to accept a connection that it never
greeted, which counts once for all the calls that waited for it.
"""

from __future__ import annotations

from collections import Counter
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from tensorwire_protocol.errors import (
    ConnectionFailed,
    Executed,
    ModelLoading,
    TensorwireError,
    UnknownKey,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from tensorwire_protocol.connection import Connection

MAX_ATTEMPTS = 3
_FIRST_BACKOFF_S = 0.05
_LONGEST_BACKOFF_S = 5.0
_BUDGET_SHARE = 0.1  # of all requests, may be retries
_BUDGET_PER_S = 1.0  # may be retries however few the requests
_BUDGET_MOST = 10.0
_WEIGHT = {Executed.NO: 0, Executed.MAYBE: 1, Executed.YES: 2}


class RetryBudget:
    """How many retries one client may still make: when most calls fail, retries make it worse.

    Threads share it without a lock: a race costs a tenth of a retry.
    """

    __slots__ = ("_left", "_seen", "made")

    def __init__(self) -> None:
        self.made: Counter[Again] = Counter()  # retries so far
        self._left = _BUDGET_MOST
        self._seen: float | None = None  # monotonic s

    def note_request(self) -> None:
        """Earn a share of a retry."""
        if self._left < _BUDGET_MOST:
            self._left += _BUDGET_SHARE

    def take(self, now: float) -> bool:
        """Spend one retry; False if there is none."""
        if self._seen is not None:
            self._left += (now - self._seen) * _BUDGET_PER_S
        self._left, self._seen = min(self._left, _BUDGET_MOST), now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Again(Enum):
    """How to try again."""

    REQUEST = "request"
    RESUME = "resume"
    ANEW = "anew"  # as another request, with a key of its own


class Reached(Enum):
    """How far the connection had got on which an attempt failed."""

    NOTHING = "nothing"  # it could not be made, or was lost before WELCOME
    GREETING = "greeting"
    RESUME = "resume"  # its server keeps calls by their key


def how_far(connection: Connection) -> Reached:
    """Say how far `connection` has got."""
    if connection.can_resume:
        return Reached.RESUME
    return Reached.GREETING if connection.was_greeted else Reached.NOTHING


class Retry(NamedTuple):
    """Wait so long, then try again."""

    wait_s: float
    how: Again


class Attempts:
    """The attempts of one call: at most so many in a row that bring nothing."""

    __slots__ = ("_budget", "_has", "_left", "_most", "error")

    def __init__(self, most: int, budget: RetryBudget) -> None:
        self.error: TensorwireError | None = None  # what the call fails with if it is given up
        self._budget = budget
        self._most = self._left = most
        self._has = 0
        budget.note_request()

    def pay_for_connection(self, now: float) -> None:
        """Take from the budget what a connection costs, unless this is the first attempt.

        Raises:
            TensorwireError: there is no retry left; it is what the call fails with.
        """
        if self.error is not None and not self._budget.take(now):
            raise self.error

    def after(
        self,
        error: TensorwireError,
        *,
        reached: Reached,
        arrived: int,
        can_resume: bool,
        params: Mapping[str, Any],
        now: float,
        deadline: float | None,
        chance: float,
    ) -> Retry | None:
        """Say what to do after `error`; None: give up, and raise `self.error`.

        Args:
            error: how the last attempt ended.
            reached: how far its connection had got.
            arrived: tokens and characters that have arrived in all.
            can_resume: the server of an earlier connection or of this one knew RESUME.
            params: the call's options.
            now, deadline: monotonic seconds.
            chance: a random number from 0 to 1.
        """
        self._note(error)
        if arrived > self._has:  # a long stream may outlive many connections
            self._has, self._left = arrived, self._most
        self._left -= 1
        how = _how(error, arrived > 0, can_resume)
        if how is Again.ANEW and reached is Reached.NOTHING:
            how = Again.REQUEST  # a connection could not be paid for: nobody has answered anew
        if how is None or self._left <= 0:
            return None
        if isinstance(error, ModelLoading) and params.get("wait") is False:
            return None  # the caller said so
        longest = min(_FIRST_BACKOFF_S * 2 ** (self._most - self._left - 1), _LONGEST_BACKOFF_S)
        wait_s = max(chance * longest, (error.retry_after_ms or 0) / 1000)
        if deadline is not None and now + wait_s >= deadline:
            return None
        if not (_is_free(error, reached) or self._budget.take(now)):
            return None
        self._budget.made[how] += 1
        return Retry(wait_s, how)

    def _note(self, error: TensorwireError) -> None:
        """Keep the error that says most of what was executed, of equal ones the last.

        "Connection refused" after a lost connection would say that nothing was executed.
        """
        if self.error is None or _WEIGHT[error.executed] >= _WEIGHT[self.error.executed]:
            self.error = error


class Connecting:
    """Has connections paid for that replace one which could not be made, or carried no call.

    So it is where a server greets nobody, and where it ends each connection as soon as it has.
    """

    def __init__(self) -> None:
        self._has_tried = False
        self._latest: Connection | None = None

    def begin(self, attempts: Attempts, now: float) -> None:
        """Note that a connection is to be made for a call.

        Raises:
            TensorwireError: as `Attempts.pay_for_connection`; none is to be made.
        """
        latest = self._latest
        was_of_use = latest is not None and latest.was_greeted and latest.last_stream > 0
        if self._has_tried and not was_of_use:
            attempts.pay_for_connection(now)
        self._has_tried, self._latest = True, None

    def note_made(self, connection: Connection) -> None:
        """Note what came of it."""
        self._latest = connection


def _is_free(error: TensorwireError, reached: Reached) -> bool:
    """Say if the budget is not for this retry: see `Connecting`, or nothing is done again.

    The latter where a server that keeps calls has lost the connection, unless it said that it has
    had enough.
    """
    if reached is Reached.RESUME:
        return isinstance(error, ConnectionFailed) and error.executed is not Executed.NO
    return reached is Reached.NOTHING


def _how(error: TensorwireError, has_arrived: bool, can_resume: bool) -> Again | None:
    if isinstance(error, UnknownKey):
        if has_arrived:
            return None
        return Again.REQUEST if error.executed is Executed.NO else Again.ANEW
    if not error.retryable:
        return None
    if not has_arrived:
        return Again.REQUEST
    return Again.RESUME if isinstance(error, ConnectionFailed) and can_resume else None
