"""What a run has reached, so that nobody takes a million refused prefaces for a proof."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tensorwire_protocol.frames import SEGMENT_KINDS
from tensorwire_protocol.messages import Kind
from tensorwire_protocol.roles import ACCEPTS, PEER, WORKER_ROLES, Role

_LEAST_PASSED, _LEAST_LOGGED_IN = 0.5, 1 / 3
# What the specification allows at an end and this code does: LOAD is reserved, and nobody logs in
# on a worker link.
_LET_IN = {
    role: ACCEPTS[role] - {Kind.LOAD} - ({Kind.AUTH} if role in WORKER_ROLES else set())
    for role in Role
}
_WITH_BODY = {role: ACCEPTS[role] & SEGMENT_KINDS for role in Role}
_SENT = {role: _LET_IN[PEER[role]] for role in Role}
_SENT_WITH_BODY = {role: _WITH_BODY[PEER[role]] for role in Role}


@dataclass
class Tally:
    """Counts; two of them add up."""

    executions: int = 0
    passed: int = 0  # preface and header right, the greeting accepted
    logged_in: int = 0  # by token or hmac, up to the end of the login
    frames: int = 0
    roles: Counter[str] = field(default_factory=Counter)
    arrived: Counter[str] = field(default_factory=Counter)  # "role KIND", whole, known to the role
    states: Counter[str] = field(default_factory=Counter)  # "role state", in which a frame came
    heard: Counter[str] = field(default_factory=Counter)  # "role KIND" that got through
    sent: Counter[str] = field(default_factory=Counter)  # "role KIND" that the end itself sent
    # "role KIND" whose segments did not stand in its frame, let in and sent.
    bodies: Counter[str] = field(default_factory=Counter)
    sent_bodies: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)  # that connections ended with

    def add(self, other: Tally) -> None:
        """Put another run's counts in."""
        for name, value in vars(other).items():
            vars(self)[name] += value

    def to_json(self) -> dict[str, Any]:
        """Return the counts as JSON can hold them."""
        return vars(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Tally:
        """Return the counts of `to_json`."""
        tally = cls()
        for name, value in data.items():
            vars(tally)[name] += Counter(value) if isinstance(value, dict) else value
        return tally

    def not_reached(self) -> list[str]:
        """Return in words what a fair run must have reached and this one has not."""
        missing = [
            f"{role.value} {what} {kind.name}"
            for what, counts, kinds in (
                ("never got", self.arrived, ACCEPTS),
                ("never let in", self.heard, _LET_IN),
                ("never sent", self.sent, _SENT),
                ("never let in a body of", self.bodies, _WITH_BODY),
                ("never sent a body of", self.sent_bodies, _SENT_WITH_BODY),
            )
            for role in Role
            for kind in sorted(map(Kind, kinds[role]))
            if not counts[f"{role.value} {kind:#04x}"]
        ]
        if self.passed < _LEAST_PASSED * self.executions:
            missing.append("fewer than half of the inputs passed preface and header")
        if self.logged_in < _LEAST_LOGGED_IN * self.executions:
            missing.append("fewer than a third of the inputs were logged in")
        return missing

    def report(self) -> str:
        """Return the counts for a person."""
        n = self.executions or 1
        lines = [
            f"executions          {self.executions}",
            f"past the header     {self.passed} ({self.passed / n:.0%}; at least 50%)",
            f"logged in           {self.logged_in} ({self.logged_in / n:.0%}; at least 33%)",
            f"frames              {self.frames}",
            "roles               " + _row(self.roles),
            "states              " + _row(self.states),
            "ended with          " + _row(self.errors),
            "bodies let in       " + _row(self.bodies),
            "bodies sent         " + _row(self.sent_bodies),
            "arrived / let in:",
            *(f"  {role.value:12} {self._cells(role, is_sent=False)}" for role in Role),
            "sent:",
            *(f"  {role.value:12} {self._cells(role, is_sent=True)}" for role in Role),
        ]
        missing = self.not_reached()
        lines.append("not reached         " + ("; ".join(missing) or "nothing that counts"))
        return "\n".join(lines)

    def _cells(self, role: Role, *, is_sent: bool) -> str:
        kinds = sorted(map(Kind, ACCEPTS[PEER[role] if is_sent else role]))
        cells = []
        for kind in kinds:
            name = f"{role.value} {kind:#04x}"
            number = self.sent[name] if is_sent else f"{self.arrived[name]}/{self.heard[name]}"
            cells.append(f"{kind.name} {number}")
        return ", ".join(cells)


def _row(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())
