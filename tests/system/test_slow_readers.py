"""Clients of a real server that do not read what they asked for."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Self

import pytest
from tensorwire_protocol.connection import FEATURE_RESUME, Connection
from tensorwire_protocol.errors import SlowConsumer
from tensorwire_protocol.messages import End, Event, EventBatch, Finish, Request, Resume
from tensorwire_protocol.roles import Role
from tensorwire_protocol.tensors import ids_checksum
from tensorwire_server.workers.oracle import oracle_text

from .serving import PATIENCE_S, RunningServer, expected, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tensorwire_protocol.messages import Message

    Serve = Callable[..., RunningServer]

pytestmark = pytest.mark.slow

MIB = 1024 * 1024
# More than the kernel's buffers and the hard limit of 4 MiB hold together.
STREAMS, TOKENS = range(1, 9), 200_000
PROMPT = "read me"


class RawClient:
    """A connection that reads only when it is told to, with a small buffer in the kernel.

    What comes is kept by the number of the request, whatever stream it comes on.
    """

    def __init__(self, address: str, answers: dict[int, Answer]) -> None:
        host, _, port = address.rpartition(":")
        self._sock = socket.socket()
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        self._sock.settimeout(PATIENCE_S)
        self._sock.connect((host, int(port)))
        self._connection = Connection(Role.CLIENT, features=(FEATURE_RESUME,))
        self._answers = answers

    def send(self, *messages: Message) -> None:
        for message in messages:
            self._connection.send(message)
        self._sock.sendall(b"".join(self._connection.take_output()))

    def read(self) -> bool:
        """Read once; False at the end of the connection."""
        try:
            data = self._sock.recv(64 * 1024)
        except ConnectionResetError:
            return False
        for message in self._connection.feed(data):
            if isinstance(message, Event):
                self._answers[message.stream].add(message.index, message.tokens, message.text)
            elif isinstance(message, EventBatch):
                self._add_batch(message)
            elif isinstance(message, End):
                self._answers[message.stream].end = message
        return bool(data) and not self._connection.is_closed

    def _add_batch(self, batch: EventBatch) -> None:
        at = 0
        for i, stream in enumerate(batch.streams):
            count = 1 if batch.counts is None else batch.counts[i]
            tokens = batch.tokens[at : at + count]
            self._answers[stream].add(batch.first_indexes[i], tokens, batch.texts[i])
            at += count

    @property
    def error(self) -> Exception | None:
        return self._connection.error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()


class Answer:
    """What has come of one request, over all connections."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.texts: list[str] = []
        self.end: End | None = None

    def add(self, index: int, tokens: object, text: str) -> None:
        assert index == len(self.tokens), "a gap or a repeat"
        assert isinstance(tokens, list)
        self.tokens += tokens
        self.texts.append(text)

    def check(self, prompt: str, seed: int, count: int) -> None:
        """Fail unless it is what the oracle makes, each token and character once."""
        assert self.tokens == expected(prompt, seed, count)
        assert "".join(self.texts) == oracle_text(self.tokens)
        assert self.end is not None
        assert (self.end.finish, self.end.count) == (Finish.LENGTH, count)
        assert self.end.checksum == ids_checksum(self.tokens)


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def ask(number: int, num_tokens: int = TOKENS) -> Request:
    return Request(
        stream=number,
        op="generate",
        key=key(number),
        model="oracle",
        inputs={"prompt": PROMPT},
        params={"max_new_tokens": num_tokens, "seed": number},
    )


def test_streams_that_nobody_reads_are_cut_at_the_bound_and_resumed_whole(serve: Serve) -> None:
    more_room = ("outcomes.resume_grace_s=60", f"outcomes.detached_bytes={256 * MIB}")
    words = [word for setting in more_room for word in ("--set", setting)]
    server = serve(f"oracle:context={2 * TOKENS}", *words).ready()
    answers = {number: Answer() for number in STREAMS}
    with RawClient(server.address, answers) as deaf:
        deaf.send(*map(ask, STREAMS))
        while any(len(answer.tokens) < 100 for answer in answers.values()):
            assert deaf.read()
        before_bytes = server.stats()["gateway"]["rss_bytes"]
        gateway = wait_until(lambda: detached(server), "the cut", 60.0)
        assert gateway["merged_bytes"] == 0
        assert gateway["detached_bytes"] > 4 * MIB
        while deaf.read():  # what had left before the cut is still good
            pass
        assert deaf.error is None or isinstance(deaf.error, SlowConsumer)
    assert all(answer.end is None for answer in answers.values())
    # The journal of all tokens, what waited, and a copy of it on its way: no more than that.
    assert server.stats()["gateway"]["rss_bytes"] - before_bytes < 256 * MIB
    with RawClient(server.address, answers) as other:
        have = {n: (len(a.tokens), len("".join(a.texts))) for n, a in answers.items()}
        other.send(*[Resume(stream=n, key=key(n), next_index=i, next_char=c)
                     for n, (i, c) in have.items()])  # fmt: skip
        while any(answer.end is None for answer in answers.values()):
            assert other.read()
    for number, answer in answers.items():
        answer.check(PROMPT, number, TOKENS)
    assert wait_until(lambda: server.stats()["gateway"]["live_requests"] == 0, "the end")


def detached(server: RunningServer) -> dict[str, int]:
    """Return the gateway's counts once only the watcher is connected."""
    gateway = server.stats()["gateway"]
    return gateway if gateway["sessions"] == 1 else {}


def test_a_client_that_reads_nothing_does_not_slow_down_its_neighbour(serve: Serve) -> None:
    server = serve("oracle:step_ms=1", "--set", "outcomes.resume_grace_s=0").ready()
    answers = {number: Answer() for number in range(1, 33)}
    with RawClient(server.address, answers) as deaf, server.client() as client:
        deaf.send(*[ask(number, 1000) for number in answers])
        whole = client.generate("oracle", PROMPT, seed=3, max_new_tokens=500)
        assert whole.token_ids == expected(PROMPT, 3, 500)
        assert whole.timings.write_stall_ms == 0
        while any(answer.end is None for answer in answers.values()):
            assert deaf.read()
    for number, answer in answers.items():
        answer.check(PROMPT, number, 1000)
