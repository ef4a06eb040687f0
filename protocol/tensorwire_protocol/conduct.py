"""How a peer behaves: what is cheap for it and dear for this side is counted, and bounded in time.

Faults are whatever makes this side work for nothing: cancels, late ones as well, and frames that
it answers with an error. Without a bound a peer could open and reset streams as fast as it can
write, always staying below the number that may be open at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorwire_protocol.allowance import Allowance
from tensorwire_protocol.errors import ErrorCode, Flood, PeerSilent

if TYPE_CHECKING:
    from collections.abc import Container

    from tensorwire_protocol.frames import FrameDecoder
    from tensorwire_protocol.limits import Limits
    from tensorwire_protocol.messages import Cancel

_REQUEST_CLASS = 0x02
_FAULTS = frozenset(
    {ErrorCode.UNAUTHENTICATED, ErrorCode.FORBIDDEN, ErrorCode.POISONED, ErrorCode.OUTPUT_TOO_LARGE}
)


def is_fault(code: int) -> bool:
    """Say if it is the asking side's doing that a stream ends with this error."""
    return code >> 8 == _REQUEST_CLASS or code in _FAULTS


class Conduct:
    """What is remembered of one peer's behaviour. Pure: `now` comes in.

    The allowances are made when they are first needed: most peers never do anything that counts.
    """

    __slots__ = ("_began", "_faults", "_limits", "_num_started", "_pings")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._pings: Allowance | None = None
        self._faults: Allowance | None = None
        self._num_started = 0  # which of the peer's unfinished frames `_began` is about
        self._began = 0.0

    def note_ping(self, now: float) -> None:
        """Count a PING.

        Raises:
            Flood: they came too often.
        """
        if self._pings is None:
            self._pings = Allowance(self._limits.ping_burst, 1 / self._limits.ping_interval_s)
        if not self._pings.spend(now):
            raise Flood("PING came more often than once a second")

    def note_fault(self, now: float) -> None:
        """Count what this side has to do for nothing.

        Raises:
            Flood: it was too much.
        """
        limits = self._limits
        if self._faults is None:
            self._faults = Allowance(limits.fault_burst, limits.faults_per_s)
        if not self._faults.spend(now):
            raise Flood(
                "cancels and requests that fail came more often than"
                f" {limits.faults_per_s:g} times a second"
            )

    def note_unfinished(self, decoder: FrameDecoder, now: float) -> None:
        """Take note that bytes were received and a frame is not complete."""
        if self._num_started != decoder.num_started:
            self._num_started, self._began = decoder.num_started, now

    def forgive_unfinished(self, now: float) -> None:
        """Let the time of the frame that is not complete begin anew."""
        self._began = now

    def check_unfinished(self, decoder: FrameDecoder, now: float) -> None:
        """Let time pass for the frame that is not complete.

        Raises:
            Flood: it trickles.
        """
        limits, size = self._limits, decoder.unfinished_bytes
        if now - self._began > limits.frame_grace_s + size / limits.frame_bytes_per_s:
            raise Flood(f"a frame of {size} bytes was not complete after {now - self._began:.0f} s")


class Silence:
    """Nothing was heard for a while: when to ask, and when to give up. Pure."""

    __slots__ = ("_limits", "_pinged")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._pinged = 0.0

    def is_ping_due(self, now: float, silent_s: float) -> bool:
        """Say if a PING has to be sent.

        Raises:
            PeerSilent: it was too long.
        """
        if silent_s >= self._limits.dead_after_s:
            raise PeerSilent(f"nothing was heard for {silent_s:.0f} s")
        ping_after_s = self._limits.ping_after_s
        if silent_s < ping_after_s or now - self._pinged < ping_after_s:
            return False
        self._pinged = now
        return True


class CancelPace:
    """Spreads this side's own cancels, so that many at once are no flood to the peer.

    Half of what the peer allows, because delays on the way can push them together there.
    """

    __slots__ = ("_allowance", "_late")

    def __init__(self, peer_limits: Limits) -> None:
        self._allowance = Allowance(
            max(1, peer_limits.fault_burst / 2), peer_limits.faults_per_s / 2
        )
        self._late: dict[int, Cancel] = {}

    def may_go(self, cancel: Cancel, now: float) -> bool:
        """Say if a cancel may be sent at once; if not, it is kept until `take`."""
        if self._allowance.spend(now):
            return True
        self._late[cancel.stream] = cancel
        return False

    def take(self, streams: Container[int], now: float) -> list[Cancel]:
        """Return the kept cancels that may be sent now; those of ended streams are forgotten."""
        self._late = {stream: cancel for stream, cancel in self._late.items() if stream in streams}
        due = []
        while self._late and self._allowance.spend(now):
            due.append(self._late.pop(next(iter(self._late))))
        return due
