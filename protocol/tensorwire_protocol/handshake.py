"""From the first byte to OPEN: preface, greeting, login, and how little a stranger may do before.

    opener        CONNECTING: preface and HELLO queued -- WELCOME --> OPEN
    answerer      PREFACE -- 8 bytes --> HANDSHAKE -- HELLO --> OPEN
    both          AUTHENTICATING in between, where `login.py` wants a step more than the greeting

A connection drops its handshake when it is done, so that an idle one does not pay for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorwire_protocol.auth import LOCAL
from tensorwire_protocol.codec import PLAIN, encode
from tensorwire_protocol.errors import (
    BadFraming,
    BadPreface,
    BadVersion,
    Flood,
    FrameTooLarge,
    HandshakeTimeout,
    RequestRefused,
    SequenceError,
    Unauthenticated,
)
from tensorwire_protocol.frames import PREFACE, Frame, build_frame
from tensorwire_protocol.limits import CLIENT_LINK, MIN_FRAME_BYTES, WORKER_LINK
from tensorwire_protocol.login import ClientLogin, ServerLogin
from tensorwire_protocol.messages import Auth, Failure, Hello, Kind, Message, Welcome, changed
from tensorwire_protocol.roles import OPENERS, WORKER_ROLES, Role, State

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tensorwire_protocol.auth import Authenticator, Principal
    from tensorwire_protocol.codec import Codec
    from tensorwire_protocol.frames import FrameDecoder
    from tensorwire_protocol.limits import Limits
    from tensorwire_protocol.login import Login
    from tensorwire_protocol.outbox import Outbox
    from tensorwire_protocol.streams import OpenStreams

VERSION = 1

# How text begins: the line for strangers of another version, and what a web server says.
_TEXT = (b"tensorwire:", b"HTTP/")
_MOST_TEXT_BYTES = 200
_REFUSED_EARLY = frozenset({Kind.REQ, Kind.RESUME})  # each is answered on its own stream


class Handshake:
    """One end's part of a connection that is not open yet.

    Args:
        role, limits: those of the connection.
        decoder, outbox, streams: the connection's own, which the handshake works with.
        software, features, session: what HELLO or WELCOME says of this side.
        login: how a client says who it is.
        authenticator: who decides about a client's login; without one every peer may do all.
        nonce: 32 random bytes, fresh for each connection that has an authenticator.
    """

    def __init__(
        self,
        role: Role,
        limits: Limits,
        *,
        decoder: FrameDecoder,
        outbox: Outbox,
        streams: OpenStreams,
        software: str,
        features: Iterable[str],
        session: bytes,
        login: Login | None,
        authenticator: Authenticator | None,
        nonce: bytes,
    ) -> None:
        self.state = State.CONNECTING if role in OPENERS else State.PREFACE
        self.peer_limits = WORKER_LINK if role in WORKER_ROLES else CLIENT_LINK
        self.peer_features: tuple[str, ...] = ()
        self.peer_software = ""
        # Who the peer of a server is; None until it has shown it.
        self.principal: Principal | None = LOCAL if authenticator is None else None
        self._is_opener = role in OPENERS
        self._limits = limits
        self._decoder, self._outbox, self._streams = decoder, outbox, streams
        self._software, self._features, self._session = software, tuple(features), session
        self._login = ClientLogin(login)
        self._guard = None if authenticator is None else ServerLogin(authenticator, nonce)
        # What is sent too early waits: for WELCOME, or until the server has proven itself.
        self.holds_output = not self._is_opener or self._login.is_mutual
        self._preface_seen = 0
        self._born: float | None = None
        self._num_frames = self._out_bytes = 0  # before the peer has logged in
        if self._is_opener:
            self._greet()
        else:
            decoder.max_frame_bytes = min(limits.frame_bytes, limits.preauth_bytes)

    def _greet(self) -> None:
        self._outbox.add([PREFACE], len(PREFACE))
        hello = Hello(
            version=VERSION,
            features=self._features,
            limits=self._limits.differing_from(self.peer_limits),
            software=self._software,
            auth=self._login.hello_auth(),
        )
        self._login.note_hello(self._emit(hello))

    def check_time(self, now: float) -> None:
        """Let time pass; the first call is the connection's birth.

        Raises:
            HandshakeTimeout: it took too long, however the bytes trickled.
        """
        if self._born is None:
            self._born = now
        if now - self._born >= self._limits.handshake_s:
            raise HandshakeTimeout(f"no greeting within {self._limits.handshake_s:g} s")

    def take_preface(self) -> None:
        """Take what has come of the preface.

        Raises:
            BadPreface: something else speaks here.
        """
        got = self._decoder.take(len(PREFACE) - self._preface_seen)
        expected = PREFACE[self._preface_seen : self._preface_seen + len(got)]
        if got != expected:
            raise BadPreface("the first bytes are not the Tensorwire preface")
        self._preface_seen += len(got)
        if self._preface_seen == len(PREFACE):
            self.state = State.HANDSHAKE

    def explain(self, error: FrameTooLarge) -> FrameTooLarge | BadPreface:
        """Return what is wrong if the peer's first frame is none, but text for a person."""
        said = self._decoder.unfinished
        if self.state is not State.CONNECTING or not said.startswith(_TEXT):
            return error
        line = said.splitlines()[0][:_MOST_TEXT_BYTES].decode("ascii", "replace")
        return BadPreface(f"not a Tensorwire server of version {VERSION}; it says {line!r}")

    def admit(self, frame: Frame) -> Message | None:
        """Take a frame of a kind that this end accepts; `state` says if the connection is open now.

        Returns:
            What the driver should know: the peer's greeting, or its ERR for the connection.

        Raises:
            ConnectionFailed, Unauthenticated: the connection cannot go on.
        """
        if not self._is_opener:
            self._count(frame)
        if frame.kind == Kind.ERR and frame.stream == 0:
            return decode_sound(frame, self._limits)
        if self.state is State.AUTHENTICATING:
            self._admit_login(frame)
            return None
        return self._admit_greeting(frame)

    def _count(self, frame: Frame) -> None:
        """Keep a peer that has not logged in within its allowance."""
        self._num_frames += 1
        if self._num_frames > self._limits.preauth_frames:
            raise Flood(f"more than {self._limits.preauth_frames} frames came before the login")
        # At least what the frame's body had: its table of segments and their padding are not kept.
        had = len(frame.meta) + sum(map(len, frame.segments)) + frame.aux * (8 + 63)
        left = self._decoder.max_frame_bytes - had
        self._decoder.max_frame_bytes = max(0, left)

    def _admit_greeting(self, frame: Frame) -> Message:
        expected = Kind.WELCOME if self._is_opener else Kind.HELLO
        if frame.kind != expected:
            raise SequenceError(f"{Kind(frame.kind).name} came before {expected.name}")
        greeting = decode_sound(frame, self._limits)
        assert isinstance(greeting, Hello | Welcome)
        if greeting.version != VERSION:
            raise BadVersion(f"the peer speaks version {greeting.version}, this side {VERSION}")
        self.peer_features, self.peer_software = greeting.features, greeting.software
        self.peer_limits = limits = self.peer_limits.announced(dict(greeting.limits))
        meta_bytes = limits.meta_bytes(is_from_opener=self._is_opener)
        if min(limits.frame_bytes, meta_bytes) < MIN_FRAME_BYTES:
            raise BadFraming(f"the peer must accept frames and metas of {MIN_FRAME_BYTES} bytes")
        if isinstance(greeting, Welcome):
            self._on_welcome(greeting, frame)
            return greeting
        self._on_hello(greeting, frame)
        # No further than here: what is handed on may end up in a log.
        return greeting if greeting.auth is None else changed(greeting, auth=None)

    def _on_welcome(self, welcome: Welcome, frame: Frame) -> None:
        answer = self._login.answer(welcome.auth, _whole(frame))
        if answer is None:
            self._open()
        else:
            self._emit(answer)
            self.state = State.AUTHENTICATING

    def _on_hello(self, hello: Hello, frame: Frame) -> None:
        guard = self._guard
        if guard is not None:
            self.principal = guard.greet(hello.auth, _whole(frame))
        welcome = Welcome(
            version=VERSION,
            features=tuple(f for f in hello.features if f in self._features),
            limits=self._limits.to_wire(),
            software=self._software,
            session=self._session,
            auth=None if guard is None else guard.welcome_auth(),
        )
        sent = self._emit(welcome)
        if guard is not None and self.principal is None:
            guard.note_welcome(sent)
            self.state = State.AUTHENTICATING
        else:
            self._open()

    def _open(self) -> None:
        self.state = State.OPEN
        self._decoder.max_frame_bytes = self._limits.frame_bytes
        self._outbox.release()

    def _admit_login(self, frame: Frame) -> None:
        """Take what may come between the greeting and the end of the login."""
        kind = frame.kind
        if kind == Kind.AUTH:
            auth = decode_sound(frame, self._limits)
            assert isinstance(auth, Auth)
            if self._guard is None:
                self._login.confirm(auth)
            else:
                self.principal, answer = self._guard.prove(auth)
                self._emit(answer)
            self._open()
        elif kind in _REFUSED_EARLY and not self._is_opener:
            self._refuse(frame.stream)
        elif kind != Kind.CANCEL:  # of what was just refused
            raise SequenceError(f"{Kind(kind).name} came before the login was done")

    def _refuse(self, stream: int) -> None:
        """Answer a request of a peer that has not logged in; nothing of it is looked at."""
        self._streams.pass_by(stream)
        refusal = Unauthenticated("this server serves nobody without a login: give a token")
        self._out_bytes += len(self._emit(Failure.of(stream, refusal)))
        if self._out_bytes > self._limits.preauth_out_bytes:
            raise Flood("a peer without a login has had all the answers that it gets")

    def _emit(self, message: Message) -> bytes:
        """Queue a message, and return its one frame."""
        frame = b"".join(encode(message, self._limits))
        self._outbox.add([frame], len(frame))
        return frame


def decode_sound(frame: Frame, limits: Limits, codec: Codec = PLAIN) -> Message:
    """Return the message of a frame on which the connection itself depends.

    Raises:
        BadFraming: it cannot be read; there is no request that could fail alone.
    """
    try:
        return codec.decode(frame, limits)
    except RequestRefused as error:
        raise BadFraming(f"{Kind(frame.kind).name}: {error.message}") from error


def _whole(frame: Frame) -> bytes:
    """Return the bytes that a frame without segments came as."""
    return build_frame(frame.kind, frame.stream, frame.meta, flags=frame.flags, aux=frame.aux)
