"""The blocking transport: threads share one connection, one of them reads for all."""

from __future__ import annotations

import random
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tensorwire_protocol.connection import FEATURE_PASSIVE, Connection
from tensorwire_protocol.errors import (
    BadFraming,
    ConnectionFailed,
    ConnectionLost,
    TensorwireError,
    TooLarge,
)
from tensorwire_protocol.messages import (
    Ack,
    Cancel,
    End,
    Event,
    EventBatch,
    Failure,
    Hello,
    Message,
    Ping,
    Request,
    Result,
)
from tensorwire_protocol.roles import Role
from tensorwire_protocol.transports.blocking import BlockingTransport, Mailbox

from protocol.samples import KEY, end, event, request, wire
from protocol.transports.driving import PATIENCE_S, reset, tcp_pair

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Peer:
    """The server's end of a socket pair, moved by the test itself."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(PATIENCE_S)
        self.connection = Connection(Role.SERVER)
        self.heard: list[Message] = []
        self.near = sock  # the client's end

    def reset(self) -> None:
        """Reset the connection, and wait until the client's kernel knows."""
        reset(self.near, self.sock)

    def hear(self, count: int) -> list[Message]:
        """Read until `count` messages have come in all; return those that are new."""
        new: list[Message] = []
        while len(self.heard) < count and not self.connection.is_closed:
            data = self.sock.recv(65536)
            assert data, "the client closed"
            new += self._feed(data)
            self.say()
        return new

    def _feed(self, data: bytes) -> list[Message]:
        new = self.connection.feed(data, time.monotonic())
        self.heard += new
        return new

    def say(self, *messages: Message) -> None:
        """Send messages in one piece."""
        for message in messages:
            self.connection.send(message)
        self.sock.sendall(b"".join(self.connection.take_output()))

    def rest(self) -> bytes:
        data = b""
        with suppress(ConnectionError):
            while chunk := self.sock.recv(65536):
                data += chunk
        return data


@contextmanager
def link(
    pair: Callable[[], tuple[socket.socket, socket.socket]] = socket.socketpair,
    scratch: memoryview | None = None,
) -> Iterator[tuple[BlockingTransport, Peer]]:
    """Yield a greeted client and its peer."""
    near, far = pair()
    peer = Peer(far)
    client = Connection(Role.CLIENT, features=(FEATURE_PASSIVE,), scratch=scratch)
    transport = BlockingTransport(near, client)
    try:
        peer.hear(1)
        transport.catch_up()
        peer.near = near
        yield transport, peer
    finally:
        transport.close()
        far.close()


def ask(transport: BlockingTransport, op: str = "embed") -> Mailbox:
    return transport.open(lambda stream: request(stream, op=op))


def soon() -> float:
    return time.monotonic() + PATIENCE_S


class Caller(threading.Thread):
    """A thread that waits for messages of one mailbox until its terminal one."""

    def __init__(self, transport: BlockingTransport, mailbox: Mailbox) -> None:
        super().__init__(daemon=True)
        self.transport, self.mailbox = transport, mailbox
        self.got: list[Message] = []
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            while not (self.mailbox.is_ended and not self.mailbox.items):
                message = self.transport.receive(self.mailbox, soon())
                assert message is not None, "nothing came in time"
                self.got.append(message)
        except BaseException as error:
            self.error = error

    def result(self) -> list[Message]:
        self.join(2 * PATIENCE_S)
        assert not self.is_alive(), "a caller hangs"
        if self.error:
            raise self.error
        return self.got


def test_a_lone_caller_gets_its_answer() -> None:
    with link() as (transport, peer):
        mailbox = ask(transport)
        peer.hear(2)
        peer.say(Ack(stream=1), event(1, 0, [4]), end(1, 1))
        got = [transport.receive(mailbox, soon()) for _ in range(3)]
        assert [type(m) for m in got] == [Ack, Event, End]
        assert mailbox.is_ended


def test_large_arrays_go_both_ways() -> None:
    array = np.arange(200_000, dtype=np.int32)
    with link() as (transport, peer):
        caller = threading.Thread(target=peer.hear, args=[2])
        caller.start()
        mailbox = transport.open(
            lambda stream: Request(stream=stream, op="infer", key=KEY, inputs={"x": array})
        )
        caller.join(PATIENCE_S)
        asked = peer.heard[1]
        assert isinstance(asked, Request)
        np.testing.assert_array_equal(asked.inputs["x"], array)
        reply = threading.Thread(target=peer.say, args=[Result(stream=1, outputs={"x": array})])
        reply.start()
        answer = transport.receive(mailbox, soon())
        reply.join(PATIENCE_S)
        assert isinstance(answer, Result)
        np.testing.assert_array_equal(answer.outputs["x"], array)


def test_nothing_in_time_is_none_and_the_answer_can_still_come() -> None:
    with link() as (transport, peer):
        mailbox = ask(transport)
        for deadline in (time.monotonic() - 1, time.monotonic(), time.monotonic() + 0.002):
            assert transport.receive(mailbox, deadline) is None
        peer.hear(2)
        peer.say(end(1, 0))
        assert isinstance(transport.receive(mailbox, soon()), End)


def test_a_deadline_is_kept_where_a_timer_interrupts_every_wait() -> None:
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        with link() as (transport, _):
            mailbox = ask(transport)
            # Where the deadline is not kept, the end comes from elsewhere, as an error.
            rescue = threading.Timer(PATIENCE_S, transport.close)
            rescue.start()
            assert transport.receive(mailbox, time.monotonic() + 1.5) is None
            rescue.cancel()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_deadline_in_the_past_still_takes_what_has_come() -> None:
    with link() as (transport, peer):
        mailbox, other = ask(transport), ask(transport)
        peer.hear(3)
        peer.say(end(2, 0), end(1, 0))
        assert isinstance(transport.receive(mailbox, soon()), End)
        assert isinstance(transport.receive(other, time.monotonic() - 1), End)


def test_eight_threads_each_get_their_own_answers() -> None:
    threads, rounds = 8, 15
    chance = random.Random(7)
    with link() as (transport, peer):
        errors: list[BaseException] = []

        def call() -> None:
            try:
                for number in range(rounds):
                    op = f"{threading.get_ident()}/{number}"
                    mailbox = ask(transport, op)
                    answer = transport.receive(mailbox, soon())
                    assert isinstance(answer, Result)
                    assert answer.outputs == {"echo": op}
            except BaseException as error:
                errors.append(error)

        callers = [threading.Thread(target=call, daemon=True) for _ in range(threads)]
        for caller in callers:
            caller.start()
        left = threads * rounds
        waiting: list[Request] = []
        while left:
            if not waiting:
                new = peer.hear(len(peer.heard) + 1)
                waiting += [m for m in new if isinstance(m, Request)]
            chance.shuffle(waiting)
            # Some of those that wait, in any order, in one piece: answers for others come first.
            some = [waiting.pop() for _ in range(chance.randint(1, len(waiting)))]
            peer.say(*[Result(stream=m.stream, outputs={"echo": m.op}) for m in some])
            left -= len(some)
        for caller in callers:
            caller.join(2 * PATIENCE_S)
        assert errors == []
        assert not any(caller.is_alive() for caller in callers)


@pytest.mark.parametrize("attempt", range(20))
def test_the_lead_is_not_lost_with_a_caller_that_got_its_answer(attempt: int) -> None:
    # Answers for the leader and for one follower come in one piece: the follower that is woken
    # to lead leaves at once, and the next has to be woken in its place.
    order = random.Random(attempt)
    with link() as (transport, peer):
        callers = [Caller(transport, ask(transport)) for _ in range(4)]
        peer.hear(5)
        streams = [1, 2, 3, 4]
        order.shuffle(streams)
        peer.say(end(streams[0], 0), end(streams[1], 0))
        peer.say(end(streams[2], 0))
        peer.say(end(streams[3], 0))
        assert [len(caller.result()) for caller in callers] == [1, 1, 1, 1]


def test_the_lead_is_not_lost_with_a_caller_whose_time_is_over() -> None:
    with link() as (transport, peer):
        for _ in range(20):
            short, long = ask(transport), ask(transport)
            peer.hear(len(peer.heard) + 2)
            caller = Caller(transport, long)
            transport.receive(short, time.monotonic() + 0.001)
            peer.say(end(long.stream, 0), end(short.stream, 0))
            assert len(caller.result()) == 1


def test_batches_are_dealt_to_their_streams() -> None:
    with link() as (transport, peer):
        boxes = [ask(transport) for _ in range(3)]
        peer.hear(4)
        peer.say(
            EventBatch(
                streams=[1, 3], first_indexes=[0, 0], counts=None, tokens=[5, 6], texts=["a", "b"]
            ),
            EventBatch(
                streams=[3, 2], first_indexes=[1, 0], counts=[2, 0], tokens=[7, 8], texts=["c", ""]
            ),
            end(3, 3),
        )
        third = [transport.receive(boxes[2], soon()) for _ in range(3)]
        events = [m for m in third if isinstance(m, Event)]
        assert [(m.index, list(m.tokens), m.text) for m in events] == [
            (0, [6], "b"),
            (1, [7, 8], "c"),
        ]
        assert isinstance(third[2], End)
        first = transport.receive(boxes[0], soon())
        assert isinstance(first, Event)
        assert list(first.tokens) == [5]


def test_a_ping_is_answered_by_whoever_reads() -> None:
    with link() as (transport, peer):
        peer.say(Ping(payload=b"abcdefgh"))
        transport.catch_up()
        assert b"abcdefgh" in peer.sock.recv(1000)
        mailbox = ask(transport)
        peer.hear(2)
        peer.say(Ping(payload=b"ijklmnop"), end(1, 0))
        transport.receive(mailbox, soon())
        assert b"ijklmnop" in peer.sock.recv(1000)


def test_an_answer_is_handed_out_although_the_pong_behind_it_cannot_be_sent() -> None:
    with link() as (transport, peer):
        mailbox = ask(transport)
        peer.hear(2)
        peer.say(end(1, 0), Ping())
        peer.sock.close()
        assert isinstance(transport.receive(mailbox, soon()), End)


# -- what came before a send failed ----------------------------------------------------------------


def test_an_answer_that_came_before_a_reset_is_handed_out_although_a_send_failed_first() -> None:
    with link(tcp_pair) as (transport, peer):
        mailbox, other = ask(transport), ask(transport)
        peer.hear(3)
        peer.say(event(1, 0, [4]), end(1, 1))
        peer.reset()
        with pytest.raises(ConnectionLost, match="reset"):
            transport.send(Ping())
        assert isinstance(transport.receive(mailbox, soon()), Event)
        assert isinstance(transport.receive(mailbox, soon()), End)
        with pytest.raises(ConnectionLost, match="reset"):
            transport.receive(other, soon())


def test_whoever_reads_goes_on_to_the_end_when_it_can_send_no_more() -> None:
    with link(tcp_pair, scratch=memoryview(bytearray(64))) as (transport, peer):
        mailbox = ask(transport)
        peer.hear(2)
        # The first read brings the PING, whose answer fails; the END comes in a later one.
        peer.say(Ping(), *[event(1, i, [i]) for i in range(50)], end(1, 50))
        peer.reset()
        got = [transport.receive(mailbox, soon()) for _ in range(51)]
        assert isinstance(got[-1], End)


def test_what_a_server_said_before_it_cut_a_request_short_is_its_answer() -> None:
    with link(tcp_pair) as (transport, peer):
        refusal = Failure(stream=1, code=int(TooLarge.code), message="too much of it")

        def refuse() -> None:
            peer.sock.recv(16)
            peer.sock.sendall(wire(refusal))
            peer.sock.close()  # most of the request was not read, which makes it a reset

        peer.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        thread = threading.Thread(target=refuse)
        thread.start()
        much = {"x": np.zeros(250_000, np.int32)}
        mailbox = transport.open(lambda stream: request(stream, op="infer", inputs=much))
        answer = transport.receive(mailbox, soon())
        thread.join(PATIENCE_S)
        assert isinstance(answer, Failure)
        assert answer.message == "too much of it"


def test_why_a_server_ended_a_connection_is_told_although_a_send_failed_first() -> None:
    with link(tcp_pair) as (transport, peer):
        peer.sock.sendall(wire(Failure(stream=0, code=0x0105, message="enough")))
        peer.reset()
        with pytest.raises(ConnectionFailed, match="enough"):
            transport.send(Ping())
        with pytest.raises(ConnectionFailed, match="enough"):
            ask(transport)


def test_a_request_that_cannot_be_sent_leaves_the_connection_as_it_was() -> None:
    with link() as (transport, peer):
        with pytest.raises(TooLarge):
            transport.open(lambda s: request(s, inputs={"prompt": "x" * 20_000}))
        mailbox = ask(transport)
        assert mailbox.stream == 1
        peer.hear(2)
        peer.say(end(1, 0))
        assert isinstance(transport.receive(mailbox, soon()), End)


def test_a_cancelled_stream_is_told_to_the_server_and_its_rest_is_dropped() -> None:
    with link() as (transport, peer):
        given_up, kept = ask(transport), ask(transport)
        transport.cancel(given_up)
        peer.hear(4)
        cancel = peer.heard[3]
        assert isinstance(cancel, Cancel)
        assert cancel.stream == given_up.stream
        peer.say(event(1, 0, [4]), end(1, 1), end(2, 0))
        assert isinstance(transport.receive(kept, soon()), End)
        assert list(given_up.items) == []
        assert transport.connection.num_streams == 0


@pytest.mark.parametrize("num_callers", [1, 3])
def test_closing_wakes_everybody_who_waits(num_callers: int) -> None:
    with link() as (transport, peer):
        callers = [Caller(transport, ask(transport)) for _ in range(num_callers)]
        peer.hear(1 + num_callers)
        transport.close()
        for caller in callers:
            with pytest.raises(ConnectionLost, match="client was closed"):
                caller.result()
        with pytest.raises(ConnectionLost):
            ask(transport)
        transport.close()


@pytest.mark.parametrize(
    ("last", "says"), [(b"", "closed"), (wire(end(1, 0))[:-1], "in the middle of a frame")]
)
def test_a_server_that_goes_is_reported_to_everybody(last: bytes, says: str) -> None:
    with link() as (transport, peer):
        callers = [Caller(transport, ask(transport)) for _ in range(3)]
        peer.hear(4)
        peer.sock.sendall(last)
        peer.sock.close()
        for caller in callers:
            with pytest.raises(ConnectionLost, match=says):
                caller.result()
        assert isinstance(transport.error, ConnectionLost)


def test_an_error_about_the_connection_reaches_every_caller() -> None:
    with link() as (transport, peer):
        callers = [Caller(transport, ask(transport)) for _ in range(3)]
        peer.hear(4)
        peer.sock.sendall(wire(Failure(stream=0, code=0x0105, message="enough")))
        for caller in callers:
            with pytest.raises(ConnectionFailed, match="enough"):
                caller.result()


def test_a_violation_is_told_to_the_server() -> None:
    with link() as (transport, peer):
        mailbox = ask(transport)
        peer.hear(2)
        peer.sock.sendall(wire(Hello())[:4] + b"\x22" + bytes(11) + b"\xc1" * 6)
        with pytest.raises(TensorwireError):
            transport.receive(mailbox, soon())
        assert isinstance(transport.error, BadFraming)
        transport.close()
        assert b"a frame" in peer.rest()


def test_raising_one_error_many_times_does_not_collect_frames() -> None:
    with link() as (transport, _):
        transport.close()
        depths = []
        for _ in range(3):
            with pytest.raises(ConnectionLost) as caught:
                ask(transport)
            depths.append(len(caught.traceback))
        assert len(set(depths)) == 1


def test_requests_of_many_threads_leave_whole() -> None:
    with link() as (transport, peer):

        def ask_often() -> None:
            for _ in range(20):
                ask(transport)

        threads = [threading.Thread(target=ask_often, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        peer.hear(81)
        for thread in threads:
            thread.join(PATIENCE_S)
        streams = [m.stream for m in peer.heard if isinstance(m, Request)]
        assert streams == list(range(1, 81))
