"""What one fuzzing input is: one end of a link, and what its peer, its application and time do.

As bytes, so that a fuzzer can keep, change and shrink it, and a person can send it to another:

    u8 role | u8 login | u8 options | u32 seed of the cuts | step | step | ...
    step: u8 what | u32 length | so many bytes

Any bytes are a case: what is cut short ends there, what is out of range wraps around.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import Enum

from tensorwire_protocol.roles import Role

ROLES = tuple(Role)
CODECS = ("plain", "typed", "packing")  # the last on a gateway's two ends only
GATEWAY_ROLES = (Role.SERVER, Role.DISPATCHER)
LOGINS = ("none", "token", "hmac")  # client links only
CLIENT_LINK_ROLES = (Role.CLIENT, Role.SERVER)

_HEAD = struct.Struct("<BBBI")
_STEP = struct.Struct("<BI")
_ACTION = struct.Struct("<BI")


class What(Enum):
    """What a step is about."""

    BYTES = 0  # arrive from the peer
    ACTION = 1  # of the application: which one, and the seed of its details
    WAIT = 2  # as many tenths of a second as there are bytes


@dataclass(frozen=True, slots=True)
class Step:
    """Something that happens to the end under test."""

    what: What
    data: bytes

    @classmethod
    def action(cls, number: int, seed: int) -> Step:
        """Return the application's action `number`."""
        return cls(What.ACTION, _ACTION.pack(number, seed))

    def as_action(self) -> tuple[int, int]:
        """Return the number and the seed of an action."""
        number, seed = _ACTION.unpack(self.data[: _ACTION.size].ljust(_ACTION.size, b"\0"))
        return number, seed


@dataclass(slots=True)
class Case:
    """One input."""

    role: Role
    login: str
    has_features: bool  # all that have a name
    is_tight: bool  # limits so low that they are met
    codec: str
    cut_seed: int
    steps: list[Step] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        """Return the case as it is kept."""
        options = self.has_features | self.is_tight << 1 | CODECS.index(self.codec) << 2
        role, login = ROLES.index(self.role), LOGINS.index(self.login)
        head = _HEAD.pack(role, login, options, self.cut_seed)
        steps = (_STEP.pack(s.what.value, len(s.data)) + s.data for s in self.steps)
        return head + b"".join(steps)

    @classmethod
    def from_bytes(cls, data: bytes) -> Case:
        """Return the case that any bytes are."""
        role, login, options, cut_seed = _HEAD.unpack(data[: _HEAD.size].ljust(_HEAD.size, b"\0"))
        case = cls(
            role=ROLES[role % len(ROLES)],
            login=LOGINS[login % len(LOGINS)],
            has_features=bool(options & 1),
            is_tight=bool(options & 2),
            codec=CODECS[(options >> 2) % len(CODECS)],
            cut_seed=cut_seed,
        )
        if case.role not in CLIENT_LINK_ROLES:
            case.login = "none"
        if case.codec == "packing" and case.role not in GATEWAY_ROLES:
            case.codec = "typed"
        at = _HEAD.size
        while at + _STEP.size <= len(data):
            what, length = _STEP.unpack_from(data, at)
            at += _STEP.size
            case.steps.append(Step(What(what % len(What)), data[at : at + length]))
            at += length
        return case
