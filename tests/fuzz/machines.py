"""What the state machines of both links have in common: a wire, a clock, and two books."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tensorwire_protocol.messages import (
    Cancel,
    Failure,
    Goaway,
    Hello,
    Message,
    Ping,
    Request,
    Resume,
    Submit,
    Welcome,
)

from .reference import Book
from .wire import Wire, held_bytes

if TYPE_CHECKING:
    from tensorwire_protocol.connection import Connection

SCRATCH = memoryview(bytearray(256 * 1024))  # one for all connections, as in one thread
GREETED_BYTES = 4096  # what a login and a second of life may leave behind in a connection
WHOLE = 1 << 22


def is_receiving(end: Connection, stream: int) -> bool:
    """Say if a body is on its way to an end, and wanted."""
    return end._transfers is not None and end._transfers.is_receiving(stream)


class TwoEnds(RuleBasedStateMachine):
    """Two honest applications on two connections; the bytes between them arrive as they like."""

    opener: Connection
    answerer: Connection

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.num_connections = 0

    # -- what a link adds ---------------------------------------------------------------------

    def make_ends(self, nonce: bytes) -> tuple[Connection, Connection]:
        raise NotImplementedError

    def opener_hears(self, message: Message) -> None:
        raise NotImplementedError

    def answerer_hears(self, message: Message) -> None:
        raise NotImplementedError

    def finish_everything(self) -> None:
        raise NotImplementedError

    # -- moving bytes -------------------------------------------------------------------------

    def connect(self) -> None:
        """Begin with two new ends; what was on its way is lost."""
        self.num_connections += 1
        self.opener, self.answerer = self.make_ends(self.num_connections.to_bytes(32, "big"))
        self.wire = Wire(self.opener, self.answerer)
        self.asking, self.answering = Book(), Book()
        self.new_bytes = [held_bytes(end, SCRATCH) for end in (self.opener, self.answerer)]
        for end in (self.opener, self.answerer):
            end.on_timer(self.now)

    def ask(self, message: Message) -> None:
        self.opener.send(message)
        self.asking.note(message)

    def answer(self, message: Message) -> None:
        self.answerer.send(message)
        self.answering.note(message)

    @rule(num_bytes=st.integers(1, 40) | st.integers(41, 5000), up=st.booleans())
    def deliver(self, num_bytes: int, up: bool) -> None:
        messages = self.wire.deliver(num_bytes, self.now, up=up)
        # When they arrived: the application may end a stream before it comes to its CANCEL.
        were_open = self.answering.next_index.keys() | {
            m.stream for m in messages if isinstance(m, Request | Resume | Submit)
        }
        for message in messages:
            if isinstance(message, Cancel):
                assert message.stream in were_open
            if isinstance(message, Hello | Welcome):
                continue
            if not isinstance(message, Goaway):
                (self.answering if up else self.asking).note(message)
            (self.answerer_hears if up else self.opener_hears)(message)

    @rule()
    def deliver_all(self) -> None:
        while not self.wire.is_quiet():
            self.deliver(WHOLE, up=True)
            self.deliver(WHOLE, up=False)

    @rule(from_opener=st.booleans())
    def ping(self, from_opener: bool) -> None:
        self.deliver_all()  # pings that bunch up on the wire look like a flood
        self.now += 1.0
        (self.opener if from_opener else self.answerer).send(Ping())

    @rule(seconds=st.floats(0, 15))
    def wait(self, seconds: float) -> None:
        self.deliver_all()
        self.now += seconds
        self.opener.on_timer(self.now)
        self.answerer.on_timer(self.now)
        self.deliver_all()

    # -- what always holds --------------------------------------------------------------------

    @invariant()
    def neither_end_accuses_the_other(self) -> None:
        for end in (self.opener, self.answerer):
            assert end.error is None
            assert not end.is_closed

    @invariant()
    def the_books_of_each_end_are_its_application_s(self) -> None:
        assert self.opener.open_streams() == list(self.asking.next_index)
        # Of a body that is still coming the application knows nothing.
        whole = [s for s in self.answerer.open_streams() if not is_receiving(self.answerer, s)]
        assert whole == sorted(self.answering.next_index)

    def teardown(self) -> None:
        if not self.num_connections:
            return
        self.deliver_all()
        self.finish_everything()
        self.deliver_all()
        self.neither_end_accuses_the_other()
        self.the_books_of_each_end_are_its_application_s()
        self._the_books_agree()
        self._nothing_is_left()

    def _the_books_agree(self) -> None:
        assert not self.asking.next_index
        assert not self.answering.next_index
        for stream, heard in self.asking.ends.items():
            told = self.answering.ends.get(stream)
            if told is None:  # refused by the connection: the application never saw it
                assert isinstance(heard, Failure)
            else:
                assert type(heard) is type(told)
        assert self.answering.ends.keys() <= self.asking.ends.keys()

    def _nothing_is_left(self) -> None:
        for end, before in zip((self.opener, self.answerer), self.new_bytes, strict=True):
            assert end.num_streams == end.pending_bytes == 0
            assert not end.is_mid_frame
            assert not end.has_bulk
            assert end._transfers is None or not end._transfers.num_incoming
            assert held_bytes(end, SCRATCH) <= before + GREETED_BYTES
