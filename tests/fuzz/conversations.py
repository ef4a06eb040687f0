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
from tensorwire_protocol.messages import Kind
from tensorwire_protocol.roles import PEER, WORKER_ROLES, Role

from .applications import Application
from .bodies import Places, SharedZeros, in_pieces
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
FEATURES = ("passive", "resume", "body", "credit", "shm")
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
_ROLE_WEIGHTS = [4, 4, 3, 3]  # clients and servers face strangers, and have logins
_LOGIN_WEIGHTS = [1, 2, 2]
_LATE, _IN_PIECES = 0.3, 0.6  # of DATA frames, of messages
_TIGHT_PEERS = 0.2
_CODECS = {"plain": PLAIN, "typed": TYPED, "packing": PACKING}
_LOGINS: dict[str, Login | None] = {
    "none": None,
    "token": TokenLogin(token=TOKEN),
    "hmac": by_hmac(),
}


def make_end(case: Case, role: Role, *, is_tight: bool | None = None) -> Application:
    """Return one end of the case's link; the same bytes follow the same bytes each time.

    Args:
        is_tight: it announces limits so low that they are met; by default as the case has it.
    """
    if is_tight is None:
        is_tight = case.is_tight and role is case.role
    has_login = case.login != "none"
    places, sharing = Places(may_wait=role is Role.SERVER), SharedZeros()
    connection = Connection(
        role,
        limits=TIGHT if is_tight else None,
        scratch=SCRATCH,
        features=FEATURES if case.has_features else (),
        login=_LOGINS[case.login] if role is Role.CLIENT else None,
        authenticator=Knows() if has_login and role is Role.SERVER else None,
        nonce=SERVER_NONCE if has_login and role is Role.SERVER else b"",
        codec=_CODECS[case.codec if role is case.role else "plain"],
        bodies=places,
        sharing=sharing if role in WORKER_ROLES else None,
    )
    return Application(connection, places, sharing)


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


def is_kind(frame: bytes, kind: Kind) -> bool:
    """Say if a frame is of a kind; the preface is none."""
    return len(frame) >= HEADER_BYTES and frame[4] == kind


def converse(rng: Random, role: Role | None = None) -> Case:
    """Return a conversation in which nobody does wrong."""
    chosen = role or rng.choices(ROLES, _ROLE_WEIGHTS)[0]
    case = Case(
        role=chosen,
        login=rng.choices(LOGINS, _LOGIN_WEIGHTS)[0] if chosen in CLIENT_LINK_ROLES else "none",
        has_features=rng.random() < 0.75,
        is_tight=rng.random() < 0.15,
        codec=rng.choice(CODECS if chosen in GATEWAY_ROLES else CODECS[:2]),
        cut_seed=rng.getrandbits(32),
    )
    _Talk(case, rng).run()
    return case


class _Talk:
    """The two ends, and what of their talk the case has to repeat."""

    def __init__(self, case: Case, rng: Random) -> None:
        self._case, self._rng = case, rng
        self._ours = make_end(case, case.role)
        self._theirs = make_end(case, PEER[case.role], is_tight=rng.random() < _TIGHT_PEERS)
        self._late: list[bytes] = []  # DATA that has not left yet

    def run(self) -> None:
        rng = self._rng
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
        self._exchange(is_last=True)

    def _exchange(self, *, is_last: bool = False) -> None:
        ours, theirs = self._ours.connection, self._theirs.connection
        while True:
            arriving = list(frames_of(b"".join(theirs.take_output())))
            answer = b"".join(ours.take_output())
            arriving = self._in_pieces(arriving, is_last=is_last and not answer)
            if not arriving and not answer and not self._memory_comes():
                return
            for frame in arriving:
                self._case.steps.append(Step(What.BYTES, frame))
                for message in ours.feed(frame):
                    self._ours.hear(message)
            for message in theirs.feed(answer):
                self._theirs.hear(message)

    def _memory_comes(self) -> bool:
        if not self._ours.places.come():
            return self._theirs.places.come()
        self._case.steps.append(Step(What.WAIT, b""))
        return True

    def _in_pieces(self, frames: list[bytes], *, is_last: bool) -> list[bytes]:
        """Let some messages arrive as head and DATA, and some DATA late."""
        if not self._case.has_features:
            return frames
        rng, pieces = self._rng, self._late
        for frame in frames:
            pieces += in_pieces(frame, rng) if rng.random() < _IN_PIECES else [frame]
        self._late, arriving = [], []
        late_streams = set()
        for piece in pieces:
            is_data, stream = is_kind(piece, Kind.DATA), piece[8:12]
            if is_data and (stream in late_streams or (not is_last and rng.random() < _LATE)):
                late_streams.add(stream)
                self._late.append(piece)
            else:
                arriving.append(piece)
        return arriving
