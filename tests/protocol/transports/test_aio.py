"""The asyncio transport, on the standard loop and on uvloop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tensorwire_protocol.codec import decode
from tensorwire_protocol.connection import NOT_OURS, Connection
from tensorwire_protocol.errors import (
    BadParams,
    BadPreface,
    Busy,
    ConnectionLost,
    Flood,
    FrameTooLarge,
    HandshakeTimeout,
    SequenceError,
    SlowConsumer,
)
from tensorwire_protocol.frames import HEADER, PREFACE
from tensorwire_protocol.limits import CLIENT_LINK, Limits
from tensorwire_protocol.messages import (
    Failure,
    Hello,
    Kind,
    Message,
    Ping,
    Pong,
    Request,
    Result,
    Welcome,
)
from tensorwire_protocol.roles import Role
from tensorwire_protocol.transports.aio import AioTransport, shared_scratch

from protocol.samples import cut, end, event, plain, request, wire
from protocol.transports.driving import PATIENCE_S, Recorder, reset, tcp_pair

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

    Test = Callable[[], Coroutine[Any, Any, None]]
    Run = Callable[[Test], None]

GREETING = PREFACE + wire(Hello())


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a coroutine on one kind of loop; errors that the loop would only log fail the test."""
    factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.SelectorEventLoop
    if request.param == "uvloop":
        factory = pytest.importorskip("uvloop").new_event_loop

    def run_on_loop(test: Test) -> None:
        unhandled: list[dict[str, Any]] = []
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.get_loop().set_exception_handler(lambda _, context: unhandled.append(context))
            runner.run(test())
        assert unhandled == []

    return run_on_loop


async def attach(
    role: Role, sock: socket.socket, limits: Limits | None = None
) -> tuple[AioTransport, Recorder]:
    recorder = Recorder()
    connection = Connection(role, limits=limits, scratch=shared_scratch())
    _, transport = await asyncio.get_running_loop().create_connection(
        lambda: AioTransport(connection, recorder), sock=sock
    )
    return transport, recorder


@contextlib.asynccontextmanager
async def server_and_socket(
    limits: Limits | None = None,
) -> AsyncIterator[tuple[AioTransport, Recorder, socket.socket]]:
    """Yield a server's transport and, as its client, a bare socket."""
    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    transport, recorder = await attach(Role.SERVER, near, limits)
    try:
        yield transport, recorder, far
    finally:
        far.close()
        transport.close()
        await recorder.until_lost()


@contextlib.asynccontextmanager
async def two_ends() -> AsyncIterator[tuple[AioTransport, Recorder, AioTransport, Recorder]]:
    near, far = socket.socketpair()
    server, on_server = await attach(Role.SERVER, far)
    client, on_client = await attach(Role.CLIENT, near)
    try:
        yield client, on_client, server, on_server
    finally:
        client.close()
        await on_client.until_lost()
        await on_server.until_lost()


async def push(sock: socket.socket, data: bytes) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.get_running_loop().sock_sendall(sock, data)


async def pull_all(sock: socket.socket) -> bytes:
    """Return everything until the peer closes."""
    data = b""
    async with asyncio.timeout(PATIENCE_S):
        while chunk := await asyncio.get_running_loop().sock_recv(sock, 65536):
            data += chunk
    return data


async def pull_messages(sock: socket.socket, count: int) -> list[Message]:
    data = b""
    async with asyncio.timeout(PATIENCE_S):
        while len(frames := cut(data)) < count:
            data += await asyncio.get_running_loop().sock_recv(sock, 65536)
    return [decode(frame, CLIENT_LINK) for frame in frames]


def test_two_ends_greet_ask_and_answer(run: Run) -> None:
    async def test() -> None:
        async with two_ends() as (client, on_client, server, on_server):
            array = np.arange(200_000, dtype=np.int32)
            client.send(request(1, inputs={"x": array}))
            await on_server.until(lambda r: len(r.messages) == 2)
            hello, asked = on_server.messages
            assert isinstance(hello, Hello)
            assert plain(asked) == plain(request(1, inputs={"x": array}))
            server.send(event(1, 0, [4, 5]))
            server.send(end(1, 2))
            await on_client.until(lambda r: len(r.messages) == 3)
            assert isinstance(on_client.messages[0], Welcome)
            assert client.connection.num_streams == server.connection.num_streams == 0

    run(test)


def test_messages_come_out_of_single_bytes(run: Run) -> None:
    async def test() -> None:
        async with server_and_socket() as (_, recorder, sock):
            for byte in GREETING + wire(request(1)):
                await push(sock, bytes([byte]))
                await asyncio.sleep(0)
            await recorder.until(lambda r: len(r.messages) == 2)
            assert plain(recorder.messages[1]) == plain(request(1))

    run(test)


def test_idle_connections_share_their_receive_buffer(run: Run) -> None:
    async def test() -> None:
        async with server_and_socket() as (_, one, first), server_and_socket() as (_, two, second):
            data = GREETING + wire(request(1, inputs={"texts": ["x" * 5000]}))
            for at in range(0, len(data), 700):
                await push(first, data[at : at + 700])
                await push(second, data[at : at + 700])
                await asyncio.sleep(0)
            await one.until(lambda r: len(r.messages) == 2)
            await two.until(lambda r: len(r.messages) == 2)
            assert plain(one.messages[1]) == plain(two.messages[1])

    run(test)


def test_a_peer_that_closes_in_the_middle_of_a_frame_is_reported_so(run: Run) -> None:
    async def test() -> None:
        async with server_and_socket() as (_, recorder, sock):
            await push(sock, GREETING + wire(request(1))[:-1])
            sock.close()
            error = await recorder.until_lost()
            assert isinstance(error, ConnectionLost)
            assert "in the middle of a frame" in error.message

    run(test)


def test_a_peer_that_closes_with_an_open_stream_is_lost(run: Run) -> None:
    async def test() -> None:
        async with server_and_socket() as (transport, recorder, sock):
            await push(sock, GREETING + wire(request(1)))
            await recorder.until(lambda r: len(r.messages) == 2)
            sock.close()
            error = await recorder.until_lost()
            assert isinstance(error, ConnectionLost)
            assert "frame" not in error.message
            with pytest.raises(ConnectionLost):
                transport.send(end(1, 0))
            transport.flush()

    run(test)


def test_what_came_before_a_reset_reaches_the_driver_although_a_send_failed_first(run: Run) -> None:
    async def test() -> None:
        near, far = tcp_pair()
        client, recorder = await attach(Role.CLIENT, near)
        client.send(request(client.connection.next_stream()))
        client.flush()
        far.sendall(wire(Welcome(session=bytes(16))) + wire(end(1, 0)))
        reset(near, far)
        client.send(request(client.connection.next_stream()))
        client.flush()
        assert isinstance(await recorder.until_lost(), ConnectionLost)
        assert [m.KIND.name for m in recorder.messages] == ["WELCOME", "END"]

    run(test)


class Faulty(Recorder):
    """A driver with a fault."""

    def on_messages(self, messages: Sequence[Message]) -> None:
        super().on_messages(messages)
        if any(isinstance(message, Result) for message in messages):
            raise KeyError("a fault of the driver")


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_a_driver_that_fails_on_what_came_last_is_told_of_the_end(kind: str) -> None:
    factory = pytest.importorskip(kind).new_event_loop
    faults: list[Any] = []

    async def test() -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: faults.append(context.get("exception"))
        )
        near, far = tcp_pair()
        recorder = Faulty()
        connection = Connection(Role.CLIENT, scratch=shared_scratch())
        _, client = await asyncio.get_running_loop().create_connection(
            lambda: AioTransport(connection, recorder), sock=near
        )
        client.send(request(connection.next_stream()))
        client.flush()
        far.sendall(wire(Welcome(session=bytes(16))) + wire(Result(stream=1)))
        reset(near, far)
        client.send(request(connection.next_stream()))
        client.flush()
        assert isinstance(await recorder.until_lost(), ConnectionLost)

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(test())
    assert any(isinstance(fault, KeyError) for fault in faults)


def test_a_peer_that_closes_with_nothing_open_is_no_error(run: Run) -> None:
    async def test() -> None:
        async with server_and_socket() as (_, recorder, sock):
            await push(sock, GREETING)
            await recorder.until(lambda r: len(r.messages) == 1)
            sock.shutdown(socket.SHUT_WR)
            assert await recorder.until_lost() is None

    run(test)


def test_closing_lets_what_was_sent_leave_first(run: Run) -> None:
    async def test() -> None:
        async with server_and_socket() as (transport, recorder, sock):
            await push(sock, GREETING + wire(request(1)))
            await recorder.until(lambda r: len(r.messages) == 2)
            result = Result(stream=1, outputs={"x": np.zeros(500_000, np.uint8)})
            transport.send(result)
            transport.close()
            frames = cut(await pull_all(sock))
            assert [frame.kind for frame in frames] == [Kind.WELCOME, Kind.RES]
            assert await recorder.until_lost() is None

    run(test)


def test_a_peer_that_does_not_read_is_cut_at_the_hard_limit(run: Run) -> None:
    async def test() -> None:
        limits = Limits(send_high_water_bytes=64 * 1024, send_hard_bytes=2 * 2**20)
        async with server_and_socket(limits) as (transport, recorder, sock):
            await push(sock, GREETING + b"".join(wire(request(i)) for i in range(1, 9)))
            await recorder.until(lambda r: len(r.messages) == 9)
            for stream in range(1, 9):
                assert transport.unsent_bytes <= limits.send_hard_bytes
                array = np.zeros(1_000_000, np.uint8)
                transport.send(Result(stream=stream, outputs={"x": array}))
                transport.flush()
                if transport.connection.is_closed:
                    break
            assert isinstance(await recorder.until_lost(), SlowConsumer)
            assert stream >= 3  # not before two MiB waited

    run(test)


def test_a_peer_that_reads_again_makes_the_driver_writable(run: Run) -> None:
    async def test() -> None:
        limits = Limits(send_high_water_bytes=64 * 1024)
        async with server_and_socket(limits) as (transport, recorder, sock):
            await push(sock, GREETING + wire(request(1)))
            await recorder.until(lambda r: len(r.messages) == 2)
            transport.send(Result(stream=1, outputs={"x": np.zeros(1_000_000, np.uint8)}))
            transport.flush()
            await asyncio.sleep(0)
            assert transport.is_paused
            await pull_messages(sock, 2)
            await recorder.until(lambda r: r.num_writable == 1)
            assert not transport.is_paused

    run(test)


PAUSING = Limits(send_high_water_bytes=64 * 1024, send_pause_bytes=512 * 1024)


async def fill(
    transport: AioTransport, recorder: Recorder, sock: socket.socket, num_bytes: int = 1_000_000
) -> None:
    """Have a client ask twice, and leave an answer unread."""
    await push(sock, GREETING + wire(request(1)) + wire(request(2)))
    await recorder.until(lambda r: len(r.messages) == 3)
    transport.send(Result(stream=1, outputs={"x": np.zeros(num_bytes, np.uint8)}))
    transport.flush()
    await asyncio.sleep(0)
    assert transport.is_paused


def test_a_client_that_leaves_answers_unread_is_heard_again_when_it_has_taken_them(
    run: Run,
) -> None:
    async def test() -> None:
        async with server_and_socket(PAUSING) as (transport, recorder, sock):
            await fill(transport, recorder, sock)
            await push(sock, wire(request(3)))
            for _ in range(5):
                await asyncio.sleep(0)
            assert len(recorder.messages) == 3
            await pull_messages(sock, 2)
            await recorder.until(lambda r: len(r.messages) == 4)
            assert plain(recorder.messages[3]) == plain(request(3))

    run(test)


@pytest.mark.parametrize("unread_bytes", [1_000_000, 400_000])
def test_only_a_client_that_is_not_heard_is_not_blamed_for_its_silence(
    run: Run, unread_bytes: int
) -> None:
    async def test() -> None:
        async with server_and_socket(PAUSING) as (transport, recorder, sock):
            await fill(transport, recorder, sock, unread_bytes)
            long_ago = asyncio.get_running_loop().time() - 1000
            transport.connection.feed(wire(request(3))[:-1], long_ago)
            transport.on_timer()
            assert transport.connection.is_closed is (unread_bytes < PAUSING.send_pause_bytes)

    run(test)


def test_a_client_that_leaves_little_unread_is_heard(run: Run) -> None:
    async def test() -> None:
        async with server_and_socket(Limits(send_high_water_bytes=64 * 1024)) as (
            transport, recorder, sock,
        ):  # fmt: skip
            await fill(transport, recorder, sock)
            await push(sock, wire(request(3)))
            await recorder.until(lambda r: len(r.messages) == 4)

    run(test)


def test_a_client_that_is_not_heard_hears_of_the_end_although_it_still_sends(run: Run) -> None:
    async def test() -> None:
        async with server_and_socket(PAUSING) as (transport, recorder, sock):
            await fill(transport, recorder, sock)
            transport.fail(SlowConsumer("enough"))
            assert isinstance(await recorder.until_lost(), SlowConsumer)
            await push(sock, b"x" * 1_000_000)  # more than the kernel holds: it is thrown away
            failure = decode(cut(await pull_all(sock))[-1], CLIENT_LINK)
            assert isinstance(failure, Failure)

    run(test)


def test_a_violation_is_told_and_the_socket_closed(run: Run) -> None:
    async def test() -> None:
        async with server_and_socket() as (_, recorder, sock):
            # The header alone in a read of its own: the buffer for it is full when it is refused.
            await push(sock, GREETING + b"\xff" * 15)
            await recorder.until(lambda r: len(r.messages) == 1)
            await push(sock, b"\xff")
            frames = cut(await pull_all(sock))
            failure = decode(frames[-1], CLIENT_LINK)
            assert isinstance(failure, Failure)
            assert isinstance(failure.to_error(), FrameTooLarge)
            assert isinstance(await recorder.until_lost(), FrameTooLarge)

    run(test)


def test_four_gibibytes_are_refused_on_the_header(run: Run) -> None:
    async def test() -> None:
        async with server_and_socket() as (_, recorder, sock):
            await push(sock, GREETING + HEADER.pack(2**32 - 1, Kind.REQ, 0, 0, 1, 4))
            assert isinstance(await recorder.until_lost(), FrameTooLarge)

    run(test)


def test_what_came_before_a_violation_reaches_the_driver(run: Run) -> None:
    async def test() -> None:
        async with server_and_socket() as (_, recorder, sock):
            await push(sock, GREETING + wire(request(1)) + wire(request(1)))
            assert isinstance(await recorder.until_lost(), SequenceError)
            assert [type(m) for m in recorder.messages] == [Hello, Request]

    run(test)


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", bytes.fromhex("1603010200010001fc")])
def test_a_stranger_gets_one_line_and_the_end(run: Run, data: bytes) -> None:
    async def test() -> None:
        async with server_and_socket() as (_, recorder, sock):
            await push(sock, data)
            assert await pull_all(sock) == NOT_OURS
            assert isinstance(await recorder.until_lost(), BadPreface)

    run(test)


def test_a_peer_that_never_greets_is_cut_by_the_timer(run: Run) -> None:
    async def test() -> None:
        async with server_and_socket(Limits(handshake_s=0.0)) as (transport, recorder, _):
            transport.on_timer()
            assert isinstance(await recorder.until_lost(), HandshakeTimeout)

    run(test)


def test_a_ping_is_answered_without_the_driver(run: Run) -> None:
    async def test() -> None:
        async with server_and_socket() as (_, recorder, sock):
            await push(sock, GREETING + wire(Ping(payload=b"abcdefgh")))
            _, pong = await pull_messages(sock, 2)
            assert plain(pong) == plain(Pong(payload=b"abcdefgh"))
            assert [type(m) for m in recorder.messages] == [Hello]

    run(test)


class FakeTransport(asyncio.Transport):
    """Keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.is_closed = False

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def writelines(self, list_of_data: Any) -> None:
        self.writes.append(b"".join(list_of_data))

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.is_closed

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.is_closed = True

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_closed = True


def test_one_turn_of_the_loop_makes_one_write(run: Run) -> None:
    async def test() -> None:
        transport, below = AioTransport(Connection(Role.CLIENT), Recorder()), FakeTransport()
        transport.connection_made(below)
        transport.send(request(1))
        await asyncio.sleep(0)
        num_before = len(below.writes)
        for stream in range(2, 11):
            transport.send(request(stream))
        assert len(below.writes) == num_before
        await asyncio.sleep(0)
        assert below.writes[num_before:] == [b"".join(wire(request(i)) for i in range(2, 11))]
        transport.send(request(11))
        await asyncio.sleep(0)
        assert len(below.writes) == num_before + 2

    run(test)


def test_what_nothing_can_join_does_not_wait_for_the_end_of_the_turn(run: Run) -> None:
    async def test() -> None:
        transport, below = AioTransport(Connection(Role.SERVER), Recorder()), FakeTransport()
        transport.connection_made(below)
        transport.connection.feed(GREETING + wire(request(1)) + wire(request(2)))
        transport.flush()
        greeted = len(below.writes)
        transport.send(event(1, 0, [4]))
        assert below.writes[greeted:] == []  # the other stream may have something to say as well
        transport.send(end(2, 0))
        await asyncio.sleep(0)
        assert below.writes[greeted:] == [wire(event(1, 0, [4])) + wire(end(2, 0))]
        transport.send(end(1, 1))
        assert below.writes[greeted + 1 :] == [wire(end(1, 1))]

    run(test)


def test_a_turn_that_sends_much_does_not_keep_the_peer_waiting_for_its_end(run: Run) -> None:
    async def test() -> None:
        transport, below = AioTransport(Connection(Role.CLIENT), Recorder()), FakeTransport()
        transport.connection_made(below)
        transport.send(request(1))
        num_before = len(below.writes)
        requests = [wire(request(i)) for i in range(2, 302)]
        for stream in range(2, 302):
            transport.send(request(stream))
        first, *more = below.writes[num_before:]
        whole = b"".join(requests)
        early = len(first) + sum(map(len, more))
        # The first soon, so that the peer begins; then each worth a system call of its own.
        assert 1024 <= len(first) < 1024 + len(requests[-1])
        assert all(4096 <= len(write) < 4096 + len(requests[-1]) for write in more)
        assert len(whole) - 4096 < early < len(whole)
        await asyncio.sleep(0)
        assert b"".join(below.writes[num_before:]) == whole

    run(test)


def test_each_turn_of_the_loop_has_a_first_write_that_is_soon(run: Run) -> None:
    async def test() -> None:
        transport, below = AioTransport(Connection(Role.CLIENT), Recorder()), FakeTransport()
        transport.connection_made(below)
        transport.send(request(1))
        for turn in range(3):
            num_before = len(below.writes)
            for stream in range(2, 32):  # more than 1,024 bytes, less than 4,096 more
                transport.send(request(30 * turn + stream))
            assert len(below.writes) == num_before + 1
            await asyncio.sleep(0)
            assert len(below.writes) == num_before + 2

    run(test)


def test_a_driver_that_sends_does_not_hear_meanwhile_that_the_connection_is_lost(run: Run) -> None:
    async def test() -> None:
        server = Connection(Role.SERVER, limits=Limits(fault_burst=1))
        recorder, below = Recorder(), FakeTransport()
        transport = AioTransport(server, recorder)
        transport.connection_made(below)
        server.feed(GREETING + b"".join(wire(request(i)) for i in (1, 2, 3)))
        refusal = BadParams("x" * 5000)  # more than waits for the end of a turn
        for stream in (1, 2):
            transport.send(Failure.of(stream, refusal))
        assert server.is_closed  # for this peer it was one too many
        assert not recorder.lost
        await asyncio.sleep(0)
        assert len(recorder.lost) == 1
        assert isinstance(recorder.lost[0], Flood)
        assert b"".join(below.writes).count(b"x" * 5000) == 2

    run(test)


class Source(FakeTransport):
    """Has always more to read, as a loop sees it that reads until it is told to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.is_read = True

    def pause_reading(self) -> None:
        self.is_read = False

    def resume_reading(self) -> None:
        self.is_read = True

    def pour(self, transport: AioTransport, data: bytes) -> int:
        """Give data to a transport while it reads; return how many bytes it took."""
        at = 0
        while self.is_read and at < len(data):
            room = transport.get_buffer(-1)
            part = data[at : at + len(room)]
            room[: len(part)] = part
            transport.buffer_updated(len(part))
            at += len(part)
        return at


def test_what_a_client_sends_without_end_is_read_a_part_in_each_turn(run: Run) -> None:
    async def test() -> None:
        recorder, below = Recorder(), Source()
        transport = AioTransport(Connection(Role.SERVER), recorder)
        transport.connection_made(below)
        array = np.zeros(300_000, np.uint8)
        data = GREETING + b"".join(wire(request(i, inputs={"x": array})) for i in range(1, 11))
        parts = [below.pour(transport, data)]
        while sum(parts) < len(data):
            assert not below.is_read
            await asyncio.sleep(0)
            parts.append(below.pour(transport, data[sum(parts) :]))
        assert len(parts) > 3
        assert all(512 * 1024 <= part < 1024 * 1024 for part in parts[:-1])
        assert len(recorder.messages) == 11

    run(test)


class Drained(Source):
    """Holds as many unsent bytes as a test says."""

    unsent = 0

    def get_write_buffer_size(self) -> int:
        return self.unsent


def test_a_client_that_stops_reading_when_little_is_left_is_heard_and_blamed_again() -> None:
    async def test() -> None:
        below = Drained()
        transport = AioTransport(Connection(Role.SERVER, limits=PAUSING), Recorder())
        transport.connection_made(below)
        below.pour(transport, GREETING)
        transport.flush()
        below.unsent = PAUSING.send_pause_bytes + 1
        transport.pause_writing()
        below.unsent = PAUSING.send_high_water_bytes + 1
        transport.on_timer()
        assert not below.is_read
        below.unsent -= 1  # while the loop tells only of a quarter of this
        transport.on_timer()
        assert below.is_read
        long_ago = asyncio.get_running_loop().time() - 1000
        transport.connection.feed(wire(request(1))[:-1], long_ago)
        transport.on_timer()
        assert transport.connection.is_closed

    asyncio.run(test())


def test_the_patience_for_last_words_ends_with_the_socket(run: Run) -> None:
    async def test() -> None:
        transport, below = AioTransport(Connection(Role.CLIENT), Recorder()), FakeTransport()
        transport.connection_made(below)
        transport.close()
        assert below.is_closed
        assert transport._abort_timer is not None
        assert not transport._abort_timer.cancelled()
        transport.connection_lost(None)
        assert transport._abort_timer.cancelled()

    run(test)


def test_closed_connections_whose_peers_do_not_close_are_bounded(run: Run) -> None:
    async def test() -> None:
        async with contextlib.AsyncExitStack() as stack:
            ends = [await stack.enter_async_context(server_and_socket()) for _ in range(258)]
            for transport, recorder, _ in ends:
                transport.fail(Busy("enough"))
                await recorder.until_lost()
            for _ in range(3):
                await asyncio.sleep(0)
            hears = [can_send(sock) for _, _, sock in ends]
            assert hears == [False, False] + [True] * 256

    run(test)


def can_send(sock: socket.socket) -> bool:
    try:
        return sock.send(b"x") == 1
    except OSError:
        return False
