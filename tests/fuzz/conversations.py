"""Valid conversations: two honest ends talk, and what reaches one of them is written down."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protocol.credentials import SERVER_NONCE, TOKEN, Knows, by_hmac
from tensorwire_protocol.codec import PLAIN
from tensorwire_protocol.codec.typed import PACKING, TYPED
from tensorwire_protocol.connection import Connection
from tensorwire_protocol.frames import HEADER, HEADER_BYTES, PREFACE
from tensorwire_protocol.limits import MIN_FRAME_BYTES, Limits
from tensorwire_protocol.login import TokenLogin
from tensorwire_protocol.roles import PEER, Role

from .applications import Application
from .cases import (
    CLIENT_LINK_ROLES,
    CODECS,
    GATEWAY_ROLES,
    LOGINS,
    ROLES,
    Case,
    Step,
    What,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

    from tensorwire_protocol.login import Login

# All names of the specification: what is not built yet is fuzzed as soon as it is.
FEATURES = ("passive", "resume", "body", "credit")
TIGHT = Limits(
    frame_bytes=MIN_FRAME_BYTES,
    client_meta_bytes=MIN_FRAME_BYTES,
    server_meta_bytes=MIN_FRAME_BYTES,
    container_items=40,
    segments=2,
    inline_bytes=8,
    streams=2,
)
SCRATCH = memoryview(bytearray(64 * 1024))
_ROLE_WEIGHTS = [4, 4, 2, 2]  # clients and servers face strangers, and have logins
_LOGIN_WEIGHTS = [1, 2, 2]
_CODECS = {"plain": PLAIN, "typed": TYPED, "packing": PACKING}
_LOGINS: dict[str, Login | None] = {
    "none": None,
    "token": TokenLogin(token=TOKEN),
    "hmac": by_hmac(),
}


def make_end(case: Case, role: Role) -> Connection:
    """Return one end of the case's link; the same bytes follow the same bytes each time."""
    has_login = case.login != "none"
    return Connection(
        role,
        limits=TIGHT if case.is_tight and role is case.role else None,
        scratch=SCRATCH,
        features=FEATURES if case.has_features else (),
        login=_LOGINS[case.login] if role is Role.CLIENT else None,
        authenticator=Knows() if has_login and role is Role.SERVER else None,
        nonce=SERVER_NONCE if has_login and role is Role.SERVER else b"",
        codec=_CODECS[case.codec if role is case.role else "plain"],
    )


def frames_of(data: bytes) -> Iterator[bytes]:
    """Return the preface and the frames of a stream of bytes; an unfinished one comes last."""
    at = 0
    if data.startswith(PREFACE):
        yield PREFACE
        at = len(PREFACE)
    while at < len(data):
        size = len(data)
        if at + HEADER_BYTES <= len(data):
            size = HEADER_BYTES + HEADER.unpack_from(data, at)[0]
        yield data[at : at + size]
        at += size


def converse(rng: Random, role: Role | None = None) -> Case:
    """Return a conversation in which nobody does wrong."""
    chosen = role or rng.choices(ROLES, _ROLE_WEIGHTS)[0]
    case = Case(
        role=chosen,
        login=rng.choices(LOGINS, _LOGIN_WEIGHTS)[0] if chosen in CLIENT_LINK_ROLES else "none",
        has_features=rng.random() < 0.6,
        is_tight=rng.random() < 0.15,
        codec=rng.choice(CODECS if chosen in GATEWAY_ROLES else CODECS[:2]),
        cut_seed=rng.getrandbits(32),
    )
    _Talk(case).run(rng)
    return case


class _Talk:
    """The two ends, and what of their talk the case has to repeat."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._ours = Application(make_end(case, case.role))
        self._theirs = Application(make_end(case, PEER[case.role]))

    def run(self, rng: Random) -> None:
        if rng.random() < 0.8:  # else some speak before they are greeted
            self._exchange()
        for _ in range(rng.randint(2, 14)):
            number, seed = rng.randrange(16), rng.getrandbits(32)
            if rng.random() < 0.5:
                self._case.steps.append(Step.action(number, seed))
                self._ours.act(number, seed)
            else:
                self._theirs.act(number, seed)
            if rng.random() < 0.8:
                self._exchange()
        self._exchange()

    def _exchange(self) -> None:
        ours, theirs = self._ours, self._theirs
        while ours.connection.pending_bytes or theirs.connection.pending_bytes:
            arriving = b"".join(theirs.connection.take_output())
            self._case.steps += [Step(What.BYTES, frame) for frame in frames_of(arriving)]
            for message in ours.connection.feed(arriving):
                ours.hear(message)
            for message in theirs.connection.feed(b"".join(ours.connection.take_output())):
                theirs.hear(message)
