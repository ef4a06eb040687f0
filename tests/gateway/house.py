"""A gateway with fake workers behind it and clients in front, all on one loop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from typing import TYPE_CHECKING, Any

from tensorwire_protocol.connection import FEATURE_CREDIT, FEATURE_RESUME, Connection
from tensorwire_protocol.limits import CLIENT_LINK, Limits
from tensorwire_protocol.messages import (
    Ack,
    Cancel,
    Credit,
    End,
    Event,
    EventBatch,
    Failure,
    Goaway,
    Request,
    Result,
    Resume,
)
from tensorwire_protocol.roles import Role
from tensorwire_protocol.transports.aio import AioTransport
from tensorwire_server.config import AdmissionConfig, OutcomesConfig
from tensorwire_server.gateway.gateway import Gateway
from tensorwire_server.routing.pool import ModelPool
from tensorwire_server.routing.replica import Replica

from .fake_worker import FakeWorker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from tensorwire_protocol.errors import TensorwireError
    from tensorwire_protocol.login import Login
    from tensorwire_protocol.messages import Message, Submit
    from tensorwire_server.gateway.auth import Credentials
    from tensorwire_server.gateway.session import Session

PATIENCE_S = 5.0
_numbers = itertools.count(1)
INPUTS: dict[str, dict[str, Any]] = {
    "generate": {"prompt": "hi"},
    "embed": {"texts": ["hi"]},
    "tokenize": {"prompt": "hi"},
}


def new_key() -> bytes:
    """Return a request key that nobody has used."""
    return next(_numbers).to_bytes(16, "big")


class Client:
    """One client; keeps every frame in the order it came."""

    def __init__(
        self,
        limits: Limits | None = None,
        login: Login | None = None,
        *,
        can_resume: bool = False,
        has_credit: bool = False,
    ) -> None:
        self.messages: list[Message] = []
        self.lost: list[TensorwireError | None] = []
        features = (FEATURE_RESUME,) * can_resume + (FEATURE_CREDIT,) * has_credit
        self.transport = AioTransport(
            Connection(Role.CLIENT, limits=limits, features=features, login=login), self
        )
        self._changed = asyncio.Event()

    # -- the transport's driver ---------------------------------------------------------------

    def on_messages(self, messages: Sequence[Message]) -> None:
        self.messages += messages
        self._changed.set()

    def on_writable(self) -> None: ...

    def on_lost(self, error: TensorwireError | None) -> None:
        self.lost.append(error)
        self._changed.set()

    # -- what a test does ---------------------------------------------------------------------

    def ask(self, op: str = "generate", model: str | None = "m", **fields: Any) -> int:
        """Send a request; return its stream."""
        stream = self.transport.connection.next_stream()
        inputs = fields.pop("inputs", INPUTS.get(op, {}))
        key = fields.pop("key", None) or new_key()
        self.transport.send(
            Request(stream=stream, op=op, key=key, model=model, inputs=inputs, **fields)
        )
        return stream

    def resume(
        self, key: bytes, next_index: int = 0, next_char: int = 0, credit: int | None = None
    ) -> int:
        """Ask for the rest of a request; return the stream it comes on."""
        stream = self.transport.connection.next_stream()
        self.transport.send(
            Resume(
                stream=stream, key=key, next_index=next_index, next_char=next_char, credit=credit
            )
        )
        return stream

    def allow(self, stream: int, amount: int) -> None:
        """Send CREDIT."""
        self.transport.send(Credit(stream=stream, amount=amount))

    def cut(self) -> None:
        """Lose the connection without a word."""
        raw = self.transport._transport
        assert raw is not None
        raw.abort()

    def cancel(self, stream: int) -> None:
        """Send CANCEL."""
        self.transport.send(Cancel(stream=stream))

    async def until(self, condition: Callable[[Client], object]) -> None:
        """Wait until what has come fulfils `condition`."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition(self):
                self._changed.clear()
                await self._changed.wait()

    async def until_lost(self) -> TensorwireError | None:
        """Wait for the end of the connection; return what it was told."""
        await self.until(lambda client: client.lost)
        (error,) = self.lost
        return error

    # -- what has come ------------------------------------------------------------------------

    def terminals(self, stream: int) -> list[End | Result | Failure]:
        """Return all last frames of a stream: there should be one."""
        return [
            m for m in self.messages if isinstance(m, End | Result | Failure) and m.stream == stream
        ]

    async def terminal(self, stream: int) -> End | Result | Failure:
        """Wait for the last frame of a stream."""
        await self.until(lambda client: client.terminals(stream))
        (message,) = self.terminals(stream)
        return message

    async def ended(self, stream: int) -> End:
        """Wait for END."""
        message = await self.terminal(stream)
        assert isinstance(message, End), message
        return message

    async def answered(self, stream: int) -> Result:
        """Wait for RES."""
        message = await self.terminal(stream)
        assert isinstance(message, Result), message
        return message

    async def failed(self, stream: int) -> Failure:
        """Wait for ERR."""
        message = await self.terminal(stream)
        assert isinstance(message, Failure), message
        return message

    @property
    def acks(self) -> list[Ack]:
        """Return the accepted."""
        return [m for m in self.messages if isinstance(m, Ack)]

    @property
    def goaways(self) -> list[Goaway]:
        """Return what said that the server leaves."""
        return [m for m in self.messages if isinstance(m, Goaway)]

    @property
    def frames(self) -> list[Event | EventBatch]:
        """Return the frames with tokens."""
        return [m for m in self.messages if isinstance(m, Event | EventBatch)]

    def events(self, stream: int) -> list[Event]:
        """Return what came for one stream, whatever frames it came in."""
        return [event for event in events_of(self.frames) if event.stream == stream]

    def tokens(self, stream: int) -> list[int]:
        """Return the tokens of a stream."""
        return [token for event in self.events(stream) for token in event.tokens]

    def text(self, stream: int) -> str:
        """Return the text of a stream."""
        return "".join(event.text for event in self.events(stream))


def events_of(frames: Sequence[Event | EventBatch]) -> list[Event]:
    """Return the events of frames, one by one."""
    events: list[Event] = []
    for frame in frames:
        if isinstance(frame, Event):
            events.append(frame)
            continue
        counts = frame.counts or [1] * len(frame.streams)
        at = 0
        for i, (stream, count) in enumerate(zip(frame.streams, counts, strict=True)):
            tokens = frame.tokens[at : at + count]
            at += count
            first, text = frame.first_indexes[i], frame.texts[i]
            events.append(Event(stream=stream, index=first, tokens=tokens, text=text))
        assert at == len(frame.tokens)
    return events


class House:
    """A gateway, its models, and who talks to it."""

    def __init__(
        self,
        admission: AdmissionConfig | None = None,
        limits: Limits = CLIENT_LINK,
        credentials: Credentials | None = None,
        outcomes: OutcomesConfig | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.pools: dict[str, ModelPool] = {}
        self.unnamed: list[Replica] = []
        self.gateway = Gateway(
            admission or AdmissionConfig(),
            limits,
            self.pools,
            "test",
            outcomes=outcomes,
            unnamed=self.unnamed,
            credentials=credentials,
            clock=loop.time,
        )
        self.workers: list[FakeWorker] = []
        self._changed = asyncio.Event()
        self._timers = asyncio.ensure_future(self.gateway.run_timers())

    def add_replica(self, model: str = "m") -> Replica:
        """Add a replica without a worker."""
        pool = self.pools.setdefault(model, ModelPool(model))
        replica = Replica(
            f"{model}/{len(pool.replicas)}",
            on_change=lambda changed: self._on_change(changed, pool),
        )
        pool.replicas.append(replica)
        return replica

    def _on_change(self, replica: Replica, pool: ModelPool) -> None:
        self.gateway.on_replica_change(replica, pool)
        self._changed.set()

    async def add_worker(
        self,
        model: str = "m",
        *,
        on_submit: Callable[[FakeWorker, Submit], None] | None = None,
        replica: Replica | None = None,
        is_ready: bool = True,
    ) -> FakeWorker:
        """Add a worker with a replica of its own, or start another life of one."""
        replica = replica or self.add_replica(model)
        worker = FakeWorker(on_submit)
        self.workers.append(worker)
        await worker.attach(replica)
        await worker.until(lambda w: w.transport.connection.peer_software)
        if is_ready:
            worker.beat("ready", model=model)
            async with asyncio.timeout(PATIENCE_S):
                while not replica.is_ready:
                    self._changed.clear()
                    await self._changed.wait()
        return worker

    async def connect(
        self,
        limits: Limits | None = None,
        *,
        can_resume: bool = False,
        has_credit: bool = False,
    ) -> Client:
        """Return a client that has been greeted."""
        client = Client(limits, can_resume=can_resume, has_credit=has_credit)
        loop = asyncio.get_running_loop()
        near, far = socket.socketpair()
        session = self.gateway.open_session()
        await loop.create_unix_connection(lambda: session.transport, sock=near)
        await loop.create_unix_connection(lambda: client.transport, sock=far)
        await client.until(lambda c: c.messages)
        client.messages.clear()
        return client

    async def connect_socket(self) -> tuple[Session, socket.socket]:
        """Return a session and the bare socket of its client, which has said nothing yet.

        What the client does not read fills up the session's side soon.
        """
        near, far = socket.socketpair()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        far.setblocking(False)
        session = self.gateway.open_session()
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: session.transport, sock=near)
        return session, far

    async def close(self) -> None:
        """Let everybody go, and see that nothing is left in the books."""
        await self.gateway.drain(0.0, asyncio.Event())
        assert not self.gateway.sessions
        for worker in self.workers:
            worker.die()
            await worker.until(lambda w: w.is_lost)
        self._timers.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._timers
        self.check_books(num_live=0)
        for pool in self.pools.values():
            assert [replica.num_in_flight for replica in pool.replicas] == [0] * len(pool.replicas)

    def check_books(self, num_live: int) -> None:
        """See that all books of the gateway agree on how many requests live."""
        gateway = self.gateway
        gateway.admission.check_invariants()
        gateway.deadlines.check_invariants()
        assert gateway.admission.total == num_live
        assert sum(gateway.admission.counts().values()) == num_live
        assert len(gateway.journal) == num_live
        assert len(gateway.deadlines) <= num_live
        assert len(gateway._give_up_timers) <= num_live
        gateway.by_key.check_invariants()
        assert gateway.by_key.num_live <= num_live
        assert len(gateway._live) == num_live
        detached = [live for live in gateway._live if live.is_detached]
        assert list(gateway._grace_timers.keys() - detached) == []
        assert len(gateway._grace_timers) == len(detached)
        gateway.detached.check_invariants()
        gateway.merged.check_invariants()
        assert set(gateway.detached._held) == set(detached)
        for session in gateway.sessions:
            assert session._merged_bytes == gateway.merged._held.get(session, 0)
            assert session._merged_bytes == sum(d.num_bytes for d in session._deltas.values())
        assert sum(map(len, gateway._waiting.values())) <= num_live
        assert sum(session.num_live for session in gateway.sessions) <= num_live


@contextlib.asynccontextmanager
async def house(
    admission: AdmissionConfig | None = None,
    limits: Limits = CLIENT_LINK,
    credentials: Credentials | None = None,
    outcomes: OutcomesConfig | None = None,
) -> AsyncIterator[House]:
    """Open a house, and close it whatever happens."""
    opened = House(admission, limits, credentials, outcomes)
    try:
        yield opened
    except BaseException:
        opened._timers.cancel()
        raise
    else:
        await opened.close()
