"""The gateway's end of a worker link, as small as tests can have it, and workers to talk to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tensorwire_protocol.connection import Connection
from tensorwire_protocol.messages import (
    Ack,
    Cancel,
    End,
    Failure,
    Heartbeat,
    Result,
    Step,
    Submit,
)
from tensorwire_protocol.roles import Role
from tensorwire_protocol.tensors import ids_checksum
from tensorwire_protocol.transports.aio import AioTransport
from tensorwire_server.workers.spec import WorkerSpec
from tensorwire_server.workers.supervisor import WorkerProcess

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from tensorwire_protocol.errors import TensorwireError
    from tensorwire_protocol.messages import Message
    from tensorwire_server.workers.supervisor import WorkerExit

PATIENCE_S = 20.0
LOADS_S = 100.0  # a model, on a machine that others use
KEY = bytes(range(16))


@dataclass
class Answer:
    """Everything that came for one stream; `add` refuses what breaks the rules of the link."""

    attempt: int
    num_so_far: int = 0
    ack: Ack | None = None
    tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    terminal: End | Result | Failure | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def add(self, message: Message) -> None:
        assert self.terminal is None, f"{message} came after the end"
        if isinstance(message, Ack):
            assert self.ack is None
            self.ack = message
        else:
            assert isinstance(message, End | Result | Failure)
            self.terminal = message

    def add_tokens(self, attempt: int, index: int, tokens: Sequence[int], text: str) -> None:
        assert self.terminal is None, "a token came after the end"
        assert self.ack is not None, "a token came before the ACK"
        assert attempt == self.attempt
        assert index == self.num_so_far + len(self.tokens), "a gap or a repeat"
        self.tokens += tokens
        self.texts.append(text)


class Dispatcher:
    """One link to a worker."""

    def __init__(self) -> None:
        self.answers: dict[int, Answer] = {}
        self.beats: list[Heartbeat] = []
        self.steps: list[Step] = []
        self.is_lost = False
        self._news = asyncio.Event()
        self.transport = AioTransport(Connection(Role.DISPATCHER), self)

    def on_messages(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if isinstance(message, Heartbeat):
                self.beats.append(message)
            elif isinstance(message, Step):
                self._on_step(message)
            elif isinstance(message, Ack | End | Result | Failure):
                self.answers[message.stream].add(message)
        self._news.set()

    def _on_step(self, step: Step) -> None:
        self.steps.append(step)
        at = 0
        for i, stream in enumerate(step.streams):
            count = 1 if step.counts is None else step.counts[i]
            tokens = step.tokens[at : at + count]
            at += count
            event = step.attempts[i], step.first_indexes[i], tokens, step.texts[i]
            self.answers[stream].add_tokens(*event)
        assert at == len(step.tokens)

    def on_writable(self) -> None: ...

    def on_lost(self, error: TensorwireError | None) -> None:
        self.is_lost = True
        self._news.set()

    def submit(self, op: str, inputs: dict[str, Any], /, **fields: Any) -> int:
        stream = self.transport.connection.next_stream()
        submit = Submit(
            stream=stream, op=op, key=KEY, inputs=inputs, **{"attempt": 1, "model": "m", **fields}
        )
        self.answers[stream] = Answer(submit.attempt, len(submit.so_far))
        self.transport.send(submit)
        return stream

    def generate(self, prompt: str, **params: Any) -> int:
        return self.submit("generate", {"prompt": prompt}, params=params)

    def cancel(self, stream: int, reason: str = "cancelled") -> None:
        self.transport.send(Cancel(stream=stream, reason=reason))

    async def until(self, condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
        """Wait for messages until `condition` holds."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def ready(self, within_s: float = PATIENCE_S) -> None:
        await self.until(lambda: bool(self.beats) and self.beats[-1].state == "ready", within_s)

    async def answered(self, *streams: int) -> list[Answer]:
        """Wait until the streams have ended; return what came of them."""
        answers = [self.answers[stream] for stream in streams]
        await self.until(lambda: self.is_lost or all(a.terminal is not None for a in answers))
        assert all(a.terminal is not None for a in answers), "the link was lost"
        return answers

    async def ended(self, stream: int) -> tuple[Answer, End]:
        """Wait for the END of a stream, and hold it against what came before it."""
        (answer,) = await self.answered(stream)
        end = answer.terminal
        assert isinstance(end, End), end
        assert end.count == answer.num_so_far + len(answer.tokens)
        if not answer.num_so_far:
            assert end.checksum == ids_checksum(answer.tokens)
        return answer, end

    async def result(self, op: str, inputs: dict[str, Any], /, **fields: Any) -> Result:
        (answer,) = await self.answered(self.submit(op, inputs, **fields))
        assert isinstance(answer.terminal, Result), answer.terminal
        return answer.terminal

    async def refused(self, op: str, inputs: dict[str, Any], /, **fields: Any) -> Failure:
        (answer,) = await self.answered(self.submit(op, inputs, **fields))
        assert isinstance(answer.terminal, Failure), answer.terminal
        return answer.terminal

    async def stats(self) -> dict[str, Any]:
        return dict((await self.result("stats", {})).extra)


class Supervised:
    """A worker process under its supervisor, with a dispatcher on each of its links."""

    def __init__(self, source: str, **spec: Any) -> None:
        self.links: list[Dispatcher] = []
        self.exits: list[WorkerExit] = []
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[Any]] = []
        self.process = WorkerProcess(
            WorkerSpec(model="m", source=source, **spec),
            on_socket=self._connect,
            on_exit=self._note_exit,
        )

    @property
    def link(self) -> Dispatcher:
        return self.links[-1]

    def _connect(self, sock: socket.socket, _: object) -> None:
        self._tasks.append(asyncio.create_task(self._attach(sock)))

    async def _attach(self, sock: socket.socket) -> None:
        dispatcher = Dispatcher()
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: dispatcher.transport, sock=sock)
        self.links.append(dispatcher)
        self._news.set()

    def _note_exit(self, end: WorkerExit) -> None:
        self.exits.append(end)
        self._news.set()

    async def until(self, condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def ready(self, life: int = 1, within_s: float = PATIENCE_S) -> Dispatcher:
        """Wait until the process is ready in its `life`-th life; return its link."""
        await self.until(lambda: len(self.links) >= life, within_s)
        await self.links[life - 1].ready(within_s)
        return self.links[life - 1]


@contextlib.asynccontextmanager
async def supervised(source: str, **spec: Any) -> AsyncIterator[Supervised]:
    worker = Supervised(source, **spec)
    worker.process.start()
    try:
        yield worker
    finally:
        pid = worker.process.pid
        await worker.process.stop(2.0)
        assert pid is None or not is_alive(pid)


@contextlib.contextmanager
def listening(source: str, **spec: Any) -> Iterator[tuple[str, int, int]]:
    """Run a worker that listens; gives host, port and pid once it has computed."""
    argv = [sys.executable, "-m", "tensorwire_server.workers", "--listen", "127.0.0.1:0"]
    argv += ["--parent", str(os.getpid())]
    argv += ["--spec", WorkerSpec(model="m", source=source, **spec).to_json()]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            ready, address, model = line.split()
            assert (ready, model) == ("ready", "model=m")
            host, _, port = address.rpartition(":")
            yield host, int(port), process.pid
        finally:
            process.kill()


@contextlib.asynccontextmanager
async def connected(address: tuple[str, int, int]) -> AsyncIterator[Dispatcher]:
    """A fresh link to a listening worker."""
    dispatcher = Dispatcher()
    loop = asyncio.get_running_loop()
    await loop.create_connection(lambda: dispatcher.transport, *address[:2])
    await dispatcher.ready()
    try:
        yield dispatcher
    finally:
        dispatcher.transport.close()


def is_alive(pid: int) -> bool:
    """Say if a process exists and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
