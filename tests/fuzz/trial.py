"""One case against one end of a connection, and what must hold whatever the peer does."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, ParamSpec, TypeGuard, TypeVar

from tensorwire_protocol.codec import PLAIN, decode
from tensorwire_protocol.codec.typed import PACKING
from tensorwire_protocol.connection import NOT_OURS
from tensorwire_protocol.errors import BadPreface, ErrorCode, TensorwireError
from tensorwire_protocol.frames import HEADER, HEADER_BYTES, PREFACE, FrameDecoder
from tensorwire_protocol.limits import WORKER_LINK
from tensorwire_protocol.messages import Failure, Kind, Packed, PackedResult, Ping
from tensorwire_protocol.roles import ACCEPTS, OPENERS, PEER, Role, State

from .bodies import BODY, BrokenBody, Reassembly
from .cases import What
from .conversations import frames_of, make_end
from .shapes import misshapen
from .tally import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tensorwire_protocol.frames import Frame
    from tensorwire_protocol.messages import Message

    from .cases import Case

# The application is not told of these.
_KEPT = frozenset({Kind.AUTH, Kind.PING, Kind.PONG, Kind.CREDIT, Kind.SHM})
_T = TypeVar("_T")
_Args = ParamSpec("_Args")
CALL_CPU_S = 0.050
STRANGER_OUT_BYTES = 4096  # WELCOME, a few refusals, the last word
_SLACK_BYTES = 2 * 1024 * 1024  # a meta may promise 1 MiB
_PER_BYTE = 100  # what an object costs that came as one byte
_BEGINNING = 0.0


class Finding(Exception):
    """Something that must never happen, has."""

    is_slow = False


class SlowCall(Finding):
    """A call took too much CPU; on a busy machine it may have been an accident."""

    is_slow = True


class Trial:
    """The end under test, its application, and what was seen of them."""

    def __init__(self, case: Case, tally: Tally, *, is_timed: bool = True) -> None:
        self._case, self._tally, self._is_timed = case, tally, is_timed
        self._now = _BEGINNING
        self.application = make_end(case, case.role)
        self.connection = self.application.connection
        self.messages: list[Message] = []
        self.output = bytearray()
        self._num_bytes = 0  # that have arrived
        self._is_over = False  # the last words were taken

    def run(self) -> None:
        """Do all steps.

        Raises:
            Finding: something is wrong with the code under test.
        """
        cuts = Random(self._case.cut_seed)
        self._call(self.connection.on_timer, self._now)
        self._take_output()
        for step in self._case.steps:
            match step.what:
                case What.BYTES:
                    self._arrive(step.data, cuts)
                case What.ACTION:
                    self._call(self.application.act, *step.as_action())
                case What.WAIT:
                    self._now += len(step.data) / 10
                    self._call(self.application.places.come)
                    self._call(self.connection.on_timer, self._now)
            self._take_output()
        self._check_end()
        self._count()

    def outcome(self) -> tuple[bytes, list[bytes], str]:
        """Return what was said, what was heard, and why it ended."""
        heard = [packed(message) for message in self.messages]
        return bytes(self.output), heard, str(self.connection.error)

    # -- doing --------------------------------------------------------------------------------

    def _call(self, what: Callable[_Args, _T], *args: _Args.args, **named: _Args.kwargs) -> _T:
        started = time.thread_time()
        try:
            result = what(*args, **named)
        except TensorwireError as error:
            raise Finding(f"an honest application was refused: {error!r}") from error
        except Exception as error:
            raise Finding(f"{type(error).__name__} left the connection: {error}") from error
        spent_s = time.thread_time() - started
        if self._is_timed and spent_s > CALL_CPU_S:
            raise SlowCall(f"one call took more than {CALL_CPU_S * 1000:.0f} ms of CPU")
        return result

    def _arrive(self, data: bytes, cuts: Random) -> None:
        for piece in _pieces(data, cuts):
            state = self.connection.state
            was_closed = self.connection.is_closed
            messages = self._feed(piece)
            if was_closed and messages:
                raise Finding("a closed connection went on listening")
            if piece is data:
                self._note_arrival(state, data, messages)
            for message in messages:
                self._check_message(message)
                self._call(self.application.hear, message)
            self.messages += messages
            self._take_output()
        if not self.connection.is_closed and not len(self.connection.get_buffer()):
            raise Finding("there is no room for the next bytes")

    def _feed(self, piece: bytes) -> list[Message]:
        self._num_bytes += len(piece)
        if not tracemalloc.is_tracing():
            return self._call(self.connection.feed, piece, self._now)
        # This call alone: what the application makes of it is its own.
        tracemalloc.reset_peak()
        places = self.application.places
        before, placed = tracemalloc.get_traced_memory()[0], places.num_bytes
        messages = self._call(self.connection.feed, piece, self._now)
        allocated = tracemalloc.get_traced_memory()[1] - before
        granted = places.num_bytes - placed
        if allocated > _SLACK_BYTES + _PER_BYTE * self._num_bytes + granted:
            raise Finding(f"{self._num_bytes} bytes made the connection allocate {allocated}")
        return messages

    def _take_output(self) -> None:
        announced, has_bulk = self.connection.pending_bytes, self.connection.has_bulk
        said = b"".join(self.connection.take_output())
        if len(said) < announced or (len(said) > announced and not has_bulk):
            raise Finding(f"{announced} bytes were pending, {len(said)} came out")
        if said and self._is_over:
            raise Finding("a closed connection went on speaking")
        self.output += said
        if self.connection.is_closed:
            self._is_over = True
        is_stranger = self._case.role is Role.SERVER and self.connection.principal is None
        if is_stranger and len(self.output) > STRANGER_OUT_BYTES:
            raise Finding(f"a peer without a login was sent {len(self.output)} bytes")

    # -- what must hold -----------------------------------------------------------------------

    def _check_message(self, message: Message) -> None:
        field = misshapen(message)
        if field is not None:
            raise Finding(f"{field} of a {message.KIND.name} is {getattr(message, field)!r:.60}")
        check_survives(message)

    def _check_end(self) -> None:
        connection = self.connection
        if isinstance(connection.error, BadPreface):
            if bytes(self.output) != NOT_OURS:
                raise Finding("a stranger got other than one line of text")
        else:
            said = _said(bytes(self.output), self._case.role, self._tally)
            self._check_farewells(said)
        if connection.is_closed:
            self._check_closed()

    def _check_farewells(self, said: list[Message]) -> None:
        connection = self.connection
        farewells = [m for m in said if _is_farewell(m)]
        if not connection.is_closed:
            if farewells:
                raise Finding("an open connection said farewell")
        elif any(_is_farewell(m) for m in self.messages):
            if farewells:
                raise Finding("an ERR on stream 0 was answered")
        elif len(farewells) != 1 or said[-1] is not farewells[0]:
            raise Finding(f"a failed connection ended with {len(farewells)} ERR frames")
        elif connection.error is None or farewells[0].code != connection.error.code:
            raise Finding("the last ERR is not why the connection failed")

    def _check_closed(self) -> None:
        connection = self.connection
        if self._call(connection.feed, bytes(64), self._now):
            raise Finding("a closed connection went on listening")
        self._call(connection.on_timer, self._now + 1000)
        try:
            connection.send(Ping())
        except TensorwireError:
            pass
        else:
            raise Finding("a closed connection took a message")
        if connection.pending_bytes or connection.is_mid_frame:
            raise Finding("a closed connection keeps bytes")

    # -- counting -----------------------------------------------------------------------------

    def _note_arrival(self, state: State, frame: bytes, messages: list[Message]) -> None:
        tally, role = self._tally, self._case.role.value
        if state in (State.PREFACE, State.CLOSED) or len(frame) < HEADER_BYTES:
            return
        body_bytes, kind, flags = HEADER.unpack_from(frame)[:3]
        if len(frame) != HEADER_BYTES + body_bytes:
            return
        tally.frames += 1
        tally.states[f"{role} {state.value}"] += 1
        tally.arrived[f"{role} {kind:#04x}"] += 1
        is_kept = kind == Kind.DATA or (kind in _KEPT and not messages)
        if is_kept and not self.connection.is_closed:
            tally.heard[f"{role} {kind:#04x}"] += 1
        if kind == Kind.DATA or flags & BODY:
            tally.bodies.update(f"{role} {m.KIND:#04x}" for m in messages)

    def _count(self) -> None:
        tally, connection, case = self._tally, self.connection, self._case
        tally.executions += 1
        tally.roles[case.role.value] += 1
        got_in = any(m.KIND in (Kind.HELLO, Kind.WELCOME) for m in self.messages)
        tally.passed += got_in
        tally.logged_in += case.login != "none" and self._is_logged_in(got_in)
        tally.heard.update(f"{case.role.value} {m.KIND:#04x}" for m in self.messages)
        error = connection.error
        tally.errors["nothing" if error is None else ErrorCode(error.code).name] += 1

    def _is_logged_in(self, is_greeted: bool) -> bool:
        if self._case.role is Role.SERVER:
            return self.connection.principal is not None
        # A client by hmac waits for the server's proof.
        return is_greeted and not (
            self._case.login == "hmac" and self.connection.state is State.AUTHENTICATING
        )


def _is_farewell(message: Message) -> TypeGuard[Failure]:
    return isinstance(message, Failure) and message.stream == 0


def check_survives(message: Message) -> None:
    """Send a message that came in out again: it must arrive as it was."""
    try:
        first = packed(message)
        codec = PACKING if _is_unopened(message) else PLAIN
        again = packed(codec.decode(_frame_of(first), WORKER_LINK))
    except TensorwireError as error:
        raise Finding(f"a {message.KIND.name} that came in cannot go out: {error}") from error
    if first != again:
        raise Finding(f"a {message.KIND.name} comes back as another")


def packed(message: Message) -> bytes:
    """Return a message as it leaves, whichever codec read it."""
    codec = PACKING if _is_unopened(message) else PLAIN
    return b"".join(codec.encode(message, WORKER_LINK))


def _is_unopened(message: Message) -> bool:
    return isinstance(message, PackedResult) or isinstance(getattr(message, "inputs", None), Packed)


def _frame_of(data: bytes) -> Frame:
    decoder = FrameDecoder(max_frame_bytes=2**26, scratch=memoryview(bytearray(data)))
    decoder.received(len(data))
    frame = decoder.next_frame()
    if frame is None:
        raise Finding("half a frame was sent")
    return frame


def _said(output: bytes, role: Role, tally: Tally) -> list[Message]:
    """Return what an end has said; it must be what its peer can read."""
    if role in OPENERS and not output.startswith(PREFACE):
        raise Finding("an opener did not begin with the preface")
    said, bodies = [], Reassembly()
    for data in frames_of(output):
        if data == PREFACE:
            continue
        if len(data) < HEADER_BYTES or len(data) != HEADER_BYTES + HEADER.unpack_from(data)[0]:
            raise Finding("half a frame was sent")
        kind, flags = data[4], data[5]
        if kind not in ACCEPTS[PEER[role]]:
            raise Finding(f"{Kind(kind).name} was sent to a peer that may not get it")
        tally.sent[f"{role.value} {kind:#04x}"] += 1
        try:
            whole = bodies.take(data)
            message = None if whole is None else decode(_frame_of(whole), WORKER_LINK)
        except (BrokenBody, TensorwireError) as error:
            raise Finding(f"what was sent cannot be read: {error}") from error
        if message is not None:
            said.append(message)
            if kind == Kind.DATA or flags & BODY:
                tally.sent_bodies[f"{role.value} {message.KIND:#04x}"] += 1
    return said


def _pieces(data: bytes, cuts: Random) -> Iterator[bytes]:
    """Return the bytes in pieces; more often than not in one."""
    if cuts.random() < 0.7:
        yield data
        return
    at = 0
    while at < len(data):
        size = cuts.choice([1, 2, 15, 16, 17, 100, 5000])
        yield data[at : at + size]
        at += size


def check_cuts(case: Case) -> None:
    """Do a case with its bytes cut in two ways.

    Raises:
        Finding: it made a difference.
    """
    outcomes = []
    for cut_seed in (case.cut_seed, case.cut_seed + 1):
        trial = Trial(replace(case, cut_seed=cut_seed), Tally(), is_timed=False)
        trial.run()
        outcomes.append(trial.outcome())
    if outcomes[0] != outcomes[1]:
        raise Finding("the same bytes, cut elsewhere, had another outcome")


def check_memory(case: Case) -> None:
    """Do a case again and watch what the peer's bytes make the connection allocate.

    Raises:
        Finding: more than the limits allow for the bytes that came.
    """
    tracemalloc.start()
    try:
        Trial(case, Tally(), is_timed=False).run()
    finally:
        tracemalloc.stop()
