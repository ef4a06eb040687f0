"""Many requests at once, in every order of events, through a real gateway on a fake clock."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tensorwire_protocol.errors import InternalError
from tensorwire_protocol.messages import End, Failure, Finish
from tensorwire_server.config import AdmissionConfig

from .fake_worker import FakeWorker, words
from .house import Client, House, new_key
from .loops import FakeClockLoop, pass_time

ADMISSION = AdmissionConfig(max_requests=6, max_requests_per_model=6, stop_grace_s=2.0)
FINISHES = st.sampled_from([Finish.STOP, Finish.LENGTH, Finish.CANCELLED, Finish.DEADLINE])
PICK = st.integers(0, 1000)


class Lives(RuleBasedStateMachine):
    """Two replicas that come and go, clients that come and go, and every kind of answer."""

    def __init__(self) -> None:
        super().__init__()
        self.unhandled: list[Any] = []
        self.runner = asyncio.Runner(loop_factory=FakeClockLoop)
        self.runner.get_loop().set_exception_handler(lambda _, what: self.unhandled.append(what))
        self.clients: list[Client] = []
        self.gone: list[Client] = []
        self.asked: list[tuple[Client, int]] = []
        self.keys: list[bytes] = []
        self.resumed: set[tuple[Client, int]] = set()
        self.runner.run(self._open())  # most walks would not get as far by themselves

    async def _open(self) -> None:
        self.house = House(ADMISSION)
        self.replicas = [self.house.add_replica() for _ in range(2)]
        await self.house.add_worker(replica=self.replicas[0])
        for _ in range(2):
            client = await self.house.connect(can_resume=True)
            self.clients.append(client)
            self.keys.append(new_key())
            self.asked.append((client, client.ask(key=self.keys[-1])))
        await pass_time()

    def do(self, action: Any = lambda: None) -> None:
        """Act, and let everything happen that follows from it before time passes."""

        async def act() -> None:
            action()
            await pass_time()

        self.runner.run(act())

    def worker_of(self, pick: int) -> FakeWorker | None:
        alive = [worker for worker in self.house.workers if not worker.is_lost]
        return alive[pick % len(alive)] if alive else None

    def attempt(self, pick: int) -> tuple[FakeWorker, int] | None:
        """Return one open attempt of a worker."""
        found = [
            (worker, stream)
            for worker in self.house.workers
            if not worker.is_lost
            for stream in worker.tokens
        ]
        return found[pick % len(found)] if found else None

    # -- clients ------------------------------------------------------------------------------

    @precondition(lambda self: len(self.clients) < 2)
    @rule()
    def connect(self) -> None:
        async def connect() -> None:
            self.clients.append(await self.house.connect(can_resume=len(self.gone) % 2 == 0))

        self.runner.run(connect())

    @precondition(lambda self: self.clients)
    @rule(pick=PICK, deadline_ms=st.none() | st.integers(50, 5000))
    def ask(self, pick: int, deadline_ms: int | None) -> None:
        client = self.clients[pick % len(self.clients)]
        self.keys.append(new_key())
        self.do(
            lambda: self.asked.append(
                (client, client.ask(deadline_ms=deadline_ms, key=self.keys[-1]))
            )
        )

    @precondition(lambda self: self.asked)
    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        client, stream = self.asked[pick % len(self.asked)]
        if client in self.clients and client.transport.connection.is_open(stream):
            self.do(lambda: client.cancel(stream))

    @precondition(lambda self: self.clients and self.keys)
    @rule(pick=PICK, of=PICK, how=st.sampled_from(["resume", "join"]), has=st.integers(0, 3))
    def come_back(self, pick: int, of: int, how: str, has: int) -> None:
        """Ask for something again: what runs, what has ended, what was forgotten."""
        client, key = self.clients[pick % len(self.clients)], self.keys[of % len(self.keys)]

        def ask() -> None:
            if how == "join" or not client.transport.connection.can_resume:
                self.asked.append((client, client.ask(key=key)))
            else:
                stream = client.resume(key, has, len(words(list(range(1, has + 1)))))
                self.resumed.add((client, stream))
                self.asked.append((client, stream))

        self.do(ask)

    @precondition(lambda self: self.clients)
    @rule(pick=PICK)
    def lose_reader(self, pick: int) -> None:
        client = self.clients.pop(pick % len(self.clients))
        self.gone.append(client)
        self.do(client.transport.close)

    # -- workers ------------------------------------------------------------------------------

    @rule(pick=PICK, is_ready=st.booleans())
    def start_worker(self, pick: int, is_ready: bool) -> None:
        replica = self.replicas[pick % len(self.replicas)]
        if replica._transport is None:
            self.runner.run(self.house.add_worker(replica=replica, is_ready=is_ready))
            self.do()

    @rule(pick=PICK, state=st.sampled_from(["loading", "ready", "failed"]))
    def beat(self, pick: int, state: str) -> None:
        worker = self.worker_of(pick)
        if worker is not None:
            self.do(lambda: worker.beat(state, detail=state))

    @rule(pick=PICK)
    def lose_worker(self, pick: int) -> None:
        worker = self.worker_of(pick)
        if worker is not None:
            self.do(worker.die)

    @rule(pick=PICK)
    def ack(self, pick: int) -> None:
        if found := self.attempt(pick):
            worker, stream = found
            self.do(lambda: worker.ack(stream))

    @rule(picks=st.lists(PICK, min_size=1, max_size=4), count=st.integers(0, 3))
    def step(self, picks: list[int], count: int) -> None:
        worker = self.worker_of(picks[0])
        if worker is not None and worker.tokens:
            streams = list(worker.tokens)
            made = {streams[p % len(streams)]: list(range(1, count + 1)) for p in picks}
            self.do(lambda: worker.step(made))

    @rule(pick=PICK, attempt=st.integers(2, 3))
    def step_of_an_old_attempt(self, pick: int, attempt: int) -> None:
        if found := self.attempt(pick):
            worker, stream = found
            self.do(lambda: worker.step({stream: [666]}, attempt=attempt))

    @rule(pick=PICK, skip=st.integers(1, 2))
    def gap(self, pick: int, skip: int) -> None:
        if found := self.attempt(pick):
            worker, stream = found
            self.do(lambda: worker.step({stream: [777]}, skip=skip))

    @rule(pick=PICK, how=st.sampled_from(["end", "lie", "result", "failure"]), finish=FINISHES)
    def end(self, pick: int, how: str, finish: Finish) -> None:
        """The last tokens of all streams and the end of one come in the same turn."""
        if found := self.attempt(pick):
            worker, stream = found

            def end() -> None:
                if pick % 2:
                    worker.step({stream: [9] for stream in worker.tokens})
                if how == "result":
                    worker.result(stream)
                elif how == "failure":
                    worker.fail(stream, InternalError("by script"))
                else:
                    worker.end(stream, finish, **({"count": 99} if how == "lie" else {}))

            self.do(end)

    # -- time ---------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.03, 0.5, 2.1]))
    def time_passes(self, seconds: float) -> None:
        """Deadlines pass, and workers that do not confirm are given up."""
        self.runner.run(pass_time(seconds))

    # -- what always holds --------------------------------------------------------------------

    @invariant()
    def nothing_crashed(self) -> None:
        assert self.unhandled == []

    @invariant()
    def every_request_has_at_most_one_end_and_the_books_count_the_others(self) -> None:
        for client, stream in self.asked:
            assert len(client.terminals(stream)) <= 1
        num_open = sum(
            client.transport.connection.is_open(stream)
            for client, stream in self.asked
            if client in self.clients
        )
        sessions = self.house.gateway.sessions
        assert sum(session.num_live for session in sessions) == num_open
        # What is stopping without a reader lives too, for a grace.
        total = self.house.gateway.admission.total
        assert num_open <= total <= ADMISSION.max_requests
        self.house.check_books(num_live=total)

    @invariant()
    def no_client_ever_saw_the_server_break_the_protocol(self) -> None:
        for client in self.clients:
            assert client.lost == []

    def teardown(self) -> None:
        """Time passes: then every request has ended, once, with what its client saw."""
        try:
            for client, stream in self.asked:
                if client in self.clients and client.transport.connection.is_open(stream):
                    self.do(lambda c=client, s=stream: c.cancel(s))
            self.runner.run(pass_time(10.0))
            self.house.check_books(num_live=0)
            for client, stream in self.asked:
                if client not in self.gone:
                    (terminal,) = client.terminals(stream)
                    tokens = client.tokens(stream)
                    if (client, stream) in self.resumed:
                        continue  # has only the rest
                    assert client.text(stream) == words(tokens)
                    assert not {666, 777} & set(tokens)
                    if isinstance(terminal, End):
                        assert terminal.count == len(tokens)
                    elif isinstance(terminal, Failure):
                        assert terminal.message
            self.runner.run(self.house.close())
            assert self.unhandled == []
        finally:
            self.runner.close()


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
