"""What only the sync client has: threads, forks, signals, finalizers, one reader for all."""

from __future__ import annotations

import asyncio
import gc
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tensorwire import BadPreface, Client, ConnectionLost, DeadlineExceeded, RequestCancelled, pool
from tensorwire_protocol.bodies import FEATURE_BODY
from tensorwire_protocol.connection import FEATURE_PASSIVE, FEATURE_RESUME, Connection
from tensorwire_protocol.errors import HandshakeTimeout, PeerSilent, TensorwireError
from tensorwire_protocol.limits import Limits
from tensorwire_protocol.messages import Request, Result
from tensorwire_protocol.roles import Role
from tensorwire_protocol.transports.blocking import BlockingTransport, Mailbox

from .fake_server import FakeServer, cat_vectors, oracle_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def spin_until(condition: Callable[[], bool]) -> None:
    """Wait for a state that nothing announces; fails after 10 s."""
    give_up = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.0005)


# -- threads ---------------------------------------------------------------------------------------


def test_32_threads_share_one_client_and_its_one_connection(server: FakeServer) -> None:
    with Client(server.address) as client, ThreadPoolExecutor(32) as pool:

        def work(worker: int) -> None:
            for i in range(12):
                text = f"{worker}/{i}"
                match (worker + i) % 5:
                    case 0:
                        made = client.generate("oracle", text, max_new_tokens=6)
                        assert made.token_ids == oracle_tokens(text, 6)
                    case 1:
                        with client.stream("oracle", text, max_new_tokens=6) as stream:
                            got = [token for delta in stream for token in delta.token_ids]
                        assert got == oracle_tokens(text, 6)
                    case 2:
                        vectors = client.embed("cat", [text])
                        np.testing.assert_array_equal(vectors, cat_vectors([text]))
                    case 3:
                        assert client.tokenize("cat", text) == list(text.encode())
                    case _:
                        with client.stream("endless", text) as stream:
                            next(stream)

        for done in [pool.submit(work, worker) for worker in range(32)]:
            done.result(60)
    assert server.num_connections == 1
    assert server.wait_until(lambda: server.open_runs == 0)


class Wire:
    """A blocking transport and the server's end of its connection, pumped by hand."""

    def __init__(self, limits: Limits | None = None) -> None:
        ours, self.theirs = socket.socketpair()
        self.server = Connection(Role.SERVER)
        self.transport = BlockingTransport(ours, Connection(Role.CLIENT, limits=limits))

    def open(self) -> Mailbox:
        return self.transport.open(lambda n: Request(stream=n, op="health", key=bytes(16)))

    def pump(self) -> None:
        self.server.feed(self.theirs.recv(65536))

    def answer(self, *mailboxes: Mailbox) -> None:
        """Answer these streams with one write."""
        for mailbox in mailboxes:
            self.server.send(Result(stream=mailbox.stream))
        self.theirs.sendall(b"".join(self.server.take_output()))

    def close(self) -> None:
        self.transport.close()
        self.theirs.close()


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.close()


def test_a_leader_that_leaves_hands_over_past_a_follower_that_leaves_too(wire: Wire) -> None:
    boxes = [wire.open() for _ in range(3)]
    wire.pump()
    got: dict[int, Any] = {}

    def wait(box: Mailbox) -> None:
        got[box.stream] = wire.transport.receive(box, time.monotonic() + 10)

    threads = [threading.Thread(target=wait, args=(box,)) for box in boxes]
    threads[0].start()
    spin_until(lambda: wire.transport._has_leader)
    for num_waiting, thread in enumerate(threads[1:], start=1):
        thread.start()
        spin_until(lambda n=num_waiting: len(wire.transport._waiting) == n)  # type: ignore[misc]
    # The leader and the first follower have their answers; who reads for the second?
    wire.answer(boxes[0], boxes[1])
    threads[0].join(10)
    threads[1].join(10)
    wire.answer(boxes[2])
    threads[2].join(5)
    assert not threads[2].is_alive()
    assert isinstance(got[boxes[2].stream], Result)


def test_a_follower_that_gives_up_hands_the_lead_on(wire: Wire) -> None:
    # The one that is woken to lead may time out at that very moment.
    first, second = wire.open(), wire.open()
    wire.pump()
    transport = wire.transport
    transport._has_leader = True
    got: list[Any] = []
    patient = threading.Thread(target=lambda: got.append(transport.receive(second, None)))
    impatient = threading.Thread(target=lambda: transport.receive(first, time.monotonic() + 0.5))
    impatient.start()
    spin_until(lambda: len(transport._waiting) == 1)
    patient.start()
    spin_until(lambda: len(transport._waiting) == 2)
    transport._has_leader = False  # as if the wake-up had gone to the one that times out
    impatient.join(10)
    wire.answer(second)
    patient.join(5)
    assert len(got) == 1


def test_close_on_another_thread_ends_waiting_calls(server: FakeServer) -> None:
    client = Client(server.address)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(client.generate, "silent", "x") for _ in range(2)]
        assert server.wait_until(lambda: server.open_runs == 2)
        client.close()
        for call in waiting:
            with pytest.raises(ConnectionLost, match="closed"):
                call.result(10)


def test_close_of_a_stream_on_another_thread_ends_its_iteration(server: FakeServer) -> None:
    with Client(server.address) as client, ThreadPoolExecutor(1) as pool:
        stream = client.stream("silent", "x")
        waiting = pool.submit(next, stream)
        (transport,) = client._link.pool.transports
        spin_until(lambda: transport._has_leader)
        stream.close()
        with pytest.raises(RequestCancelled, match="cancelled before its end"):
            waiting.result(10)


def test_all_prompts_of_a_list_are_in_flight_at_once(server: FakeServer) -> None:
    client = Client(server.address)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.generate, "silent", ["a", "b", "c"])
        assert server.wait_until(lambda: len(server.requests) == 3)
        client.close()
        with pytest.raises(ConnectionLost):
            waiting.result(10)


def test_one_lost_connection_gives_each_thread_an_error_of_its_own(server: FakeServer) -> None:
    with Client(server.address, max_attempts=1) as client, ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(client.generate, "endless", str(i)) for i in range(4)]
        assert server.wait_until(lambda: server.open_runs == 4)
        server.abort_all()
        errors = [call.exception(10) for call in waiting]
    assert len({id(error) for error in errors}) == 4
    assert all(isinstance(error, ConnectionLost) for error in errors)


# -- where it runs ---------------------------------------------------------------------------------


def test_it_works_inside_a_running_event_loop(server: FakeServer) -> None:
    async def notebook_cell() -> list[int]:
        with Client(server.address) as client:
            return client.generate("oracle", "x", max_new_tokens=3).token_ids

    assert asyncio.run(notebook_cell()) == oracle_tokens("x", 3)


def test_it_says_that_it_reads_only_while_a_call_waits(server: FakeServer) -> None:
    with Client(server.address) as client:
        client.health()
        assert server.do(lambda: server.sessions[0].features) == (
            FEATURE_PASSIVE,
            FEATURE_RESUME,
            FEATURE_BODY,
        )


def run_script(script: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


FORK = """
import gc, os, sys
from tensorwire import Client, TensorwireError
client = Client(sys.argv[1])
stream = client.stream("endless", "x")
next(stream)
child = os.fork()
if child == 0:
    for call in (client.health, lambda: next(stream)):
        try:
            call()
        except TensorwireError as error:
            print(type(error).__name__, error, flush=True)
    client.close()
    del stream, client
    gc.collect()
    os._exit(0)
os.waitpid(child, 0)
for _ in range(200):  # the parent's connection was left alone
    next(stream)
print("parent", client.health()["status"])
"""


def test_a_client_made_before_a_fork_refuses_in_the_child(server: FakeServer) -> None:
    output, errors = run_script(FORK, server.address).communicate(timeout=30)
    sentence = "ClientUnusable this client was made before a fork: make a new one in the child"
    lines = output.splitlines()
    assert [line[: len(sentence)] for line in lines[:2]] == [sentence] * 2, errors
    assert lines[2] == "parent ready"


INTERRUPT = """
import sys
from tensorwire import Client
client = Client(sys.argv[1])
try:
    if sys.argv[2] == "stream":
        for delta in client.stream("endless", "x"):
            print("started", flush=True)
    else:
        client.generate("silent", "x")
except KeyboardInterrupt:
    print("interrupted", client.health()["status"], flush=True)
"""


@pytest.mark.parametrize("how", ["stream", "generate"])
def test_ctrl_c_stops_the_work_and_leaves_the_client_usable(server: FakeServer, how: str) -> None:
    process = run_script(INTERRUPT, server.address, how)
    assert server.wait_until(lambda: server.open_runs == 1, 30)
    if how == "stream":
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert output.splitlines()[-1] == "interrupted ready", errors
    # By CANCEL; or, where it came in the middle of a read, by a new connection.
    assert len(server.cancels) + server.num_connections == 2
    assert server.wait_until(lambda: server.open_runs == 0)


def test_an_interrupt_while_waiting_sends_cancel(server: FakeServer) -> None:
    with Client(server.address) as client:
        stream = client.stream("silent", "x")
        (transport,) = client._link.pool.transports

        def interrupt() -> None:
            # Past the ACK and leading again: it waits for what will not come.
            spin_until(lambda: stream.prompt_tokens is not None and transport._has_leader)
            # A signal, as Ctrl-C is: it also ends the system call that waits.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        thread.join(10)
        assert server.wait_until(lambda: len(server.cancels) == 1)
        assert client.health()["status"] == "ready"
        assert server.num_connections == 1


# -- finalizers ------------------------------------------------------------------------------------


def test_a_finalizer_waits_for_no_lock_and_its_cancel_leaves_later(server: FakeServer) -> None:
    with Client(server.address) as client:
        stream = client.stream("endless", "x")
        next(stream)
        (transport,) = client._link.pool.transports
        with transport._send_lock, transport._lock:  # as if collected in the middle of a send
            del stream
            gc.collect()
        client.health()
        assert server.wait_until(lambda: len(server.cancels) == 1)


def test_a_client_that_is_dropped_closes_its_connection(server: FakeServer) -> None:
    Client(server.address).health()
    gc.collect()
    assert server.wait_until(lambda: server.num_connections == 1 and not server.sessions)


def test_a_stream_keeps_its_client_alive(server: FakeServer) -> None:
    stream = Client(server.address).stream("oracle", "x")
    gc.collect()
    assert len(list(stream)) == 8


# -- a connection that dies at the last moment -----------------------------------------------------


def test_a_request_that_did_not_leave_goes_on_a_new_connection(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(server.address) as client:
        client.health()
        server.abort_all()
        (transport,) = client._link.pool.transports
        transport.catch_up()
        looks = iter([True])  # it looked alive, and died before the request was queued
        usable = pool._is_usable
        monkeypatch.setattr(pool, "_is_usable", lambda t: next(looks, None) or usable(t))
        assert client.health()["status"] == "ready"
        assert server.num_connections == 2
        assert len(server.requests) == 2


def spend_budget(client: Client) -> None:
    """Leave no retry that is charged for."""
    while client._link.budget.take(time.monotonic()):
        pass


def test_a_request_that_a_reset_meets_on_its_way_costs_no_retry(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(server.address) as client:
        client.health()
        (transport,) = client._link.pool.transports
        is_over = select.poll()
        is_over.register(transport._sock.fileno(), 0)
        server.reset_all()
        assert is_over.poll(10_000)
        looks = iter([True])  # it looked alive, and the request was on its way
        usable = pool._is_usable
        monkeypatch.setattr(pool, "_is_usable", lambda t: next(looks, None) or usable(t))
        spend_budget(client)
        assert client.health()["status"] == "ready"
        assert server.num_connections == 2


def test_a_connection_that_was_cut_is_replaced_freely_one_that_never_greeted_is_not() -> None:
    num_accepted = 0
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            nonlocal num_accepted
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:  # the test is over
                    return
                num_accepted += 1
                with sock:
                    if num_accepted == 1:
                        greet(sock)

        def greet(sock: socket.socket) -> None:
            peer = Connection(Role.SERVER, features=(FEATURE_RESUME,))
            while not peer.num_streams:
                peer.feed(sock.recv(1 << 16))
                sock.sendall(b"".join(peer.take_output()))

        thread = threading.Thread(target=serve)
        thread.start()
        with Client(f"127.0.0.1:{listener.getsockname()[1]}") as client:
            spend_budget(client)
            with pytest.raises(ConnectionLost):
                client.tokenize("m", "x")
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)
    assert num_accepted == 2


# -- what else may answer --------------------------------------------------------------------------


def test_another_kind_of_server_is_named_as_such() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(1000)
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                peer.recv(1000)

        thread = threading.Thread(target=answer)
        thread.start()
        port = listener.getsockname()[1]
        with Client(f"127.0.0.1:{port}") as client, pytest.raises(BadPreface) as caught:
            client.health()
        thread.join(10)
    assert str(caught.value) == (
        f"what answers at 127.0.0.1:{port} is not a Tensorwire server of version 1; it says"
        " 'HTTP/1.1 400 Bad Request'"
    )


def test_a_server_that_never_greets_is_given_up() -> None:
    wire = Wire(Limits(handshake_s=0.1))
    with pytest.raises(HandshakeTimeout):
        wire.transport.receive(wire.open(), None)
    wire.close()


def test_a_server_that_falls_silent_is_asked_and_then_given_up() -> None:
    wire = Wire(Limits(ping_after_s=0.5, dead_after_s=1.5))
    box, greeting = wire.open(), wire.open()
    wire.pump()
    wire.answer(greeting)
    with pytest.raises(PeerSilent):
        wire.transport.receive(box, None)
    assert wire.theirs.recv(1000)[4] == 0x04  # PING
    wire.close()


def test_a_full_backlog_is_a_connect_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        port = listener.getsockname()[1]
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        client = Client(f"127.0.0.1:{port}", connect_timeout=0.1)
        with pytest.raises(ConnectionLost, match=r"within 0\.1 s"):
            client.health()
        with pytest.raises((ConnectionLost, DeadlineExceeded)):
            client.health(timeout=0.05)
        for filler in fillers:
            filler.close()


def test_a_host_that_does_not_exist_is_one_sentence() -> None:
    with pytest.raises(TensorwireError, match=r"'no-such-host\.invalid' cannot be found"):
        Client("no-such-host.invalid:1").health()
