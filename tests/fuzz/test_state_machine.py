"""Client and gateway, gateway and worker: two ends that do whatever they may agree at the end."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from protocol.credentials import TOKEN, Knows, by_hmac
from tensorwire_protocol.auth import LOCAL
from tensorwire_protocol.bodies import FEATURE_BODY
from tensorwire_protocol.connection import FEATURE_RESUME, Connection
from tensorwire_protocol.errors import ErrorCode, TooLarge
from tensorwire_protocol.limits import Limits
from tensorwire_protocol.login import Login, TokenLogin
from tensorwire_protocol.messages import (
    Ack,
    Cancel,
    Drain,
    End,
    Event,
    EventBatch,
    Failure,
    Finish,
    Goaway,
    Heartbeat,
    Message,
    Request,
    Result,
    Resume,
    Step,
    Submit,
    changed,
)
from tensorwire_protocol.roles import Role
from tensorwire_protocol.tensors import ids_checksum

from .conftest import IS_LONG, machine_settings
from .machines import SCRATCH, TwoEnds
from .reference import events_of

if TYPE_CHECKING:
    from collections.abc import Sequence

FEW_STREAMS = 3


def token(key: bytes, index: int) -> int:
    """Return the token that the model makes at a place, whoever runs it."""
    return (key[-1] * 1009 + index) % 65536


def tokens(key: bytes, start: int, stop: int) -> list[int]:
    return [token(key, index) for index in range(start, stop)]


def failure(stream: int, code: ErrorCode) -> Failure:
    return Failure(stream=stream, code=code, message="m")


def ended(stream: int, made: Sequence[int], finish: Finish = Finish.STOP) -> End:
    return End(stream=stream, finish=finish, count=len(made), checksum=ids_checksum(made))


@dataclass
class Call:
    """What a client knows of a request on one stream."""

    key: bytes
    content: str
    got: list[int] = field(default_factory=list)
    resumed: bool = False
    is_cancelled: bool = False


@dataclass
class Work:
    """What a gateway knows of a request, whoever reads it."""

    content: str
    num_tokens: int = 0
    final: Message | None = None  # on whatever stream


class ClientLink(TwoEnds):
    """A client that asks, cancels, loses its connection and resumes; a gateway that serves."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[int, Call] = {}  # by the stream on this connection
        self.contents: dict[bytes, str] = {}  # of every key that was ever used
        self.works: dict[bytes, Work] = {}
        self.readers: dict[int, bytes] = {}  # at the gateway: which work a stream reads
        self.cancelled: set[int] = set()  # at the gateway
        self.farewell: Goaway | None = None  # that the gateway said
        self.client_left = False

    @initialize(
        method=st.sampled_from(["none", "token", "hmac"]),
        knows_resume=st.booleans(),
        knows_bodies=st.booleans(),
        num_streams=st.sampled_from([FEW_STREAMS, 512]),
    )
    def begin(self, method: str, knows_resume: bool, knows_bodies: bool, num_streams: int) -> None:
        self.method, self.num_streams = method, num_streams
        self.knows_resume = knows_resume
        self.features = [FEATURE_RESUME] * knows_resume + [FEATURE_BODY] * knows_bodies
        self.connect()

    def make_ends(self, nonce: bytes) -> tuple[Connection, Connection]:
        logins: dict[str, Login | None] = {
            "none": None,
            "token": TokenLogin(token=TOKEN),
            "hmac": by_hmac(nonce=nonce),
        }
        client = Connection(
            Role.CLIENT, scratch=SCRATCH, features=self.features, login=logins[self.method]
        )
        server = Connection(
            Role.SERVER,
            limits=Limits(streams=self.num_streams),
            scratch=SCRATCH,
            features=self.features,
            authenticator=None if self.method == "none" else Knows(),
            nonce=nonce[::-1],
        )
        return client, server

    # -- the client ---------------------------------------------------------------------------

    def may_ask(self) -> bool:
        return not self.opener.peer_is_leaving and not self.client_left

    def request(self, call: Call, *, gap: bool = False, array_bytes: int = 0) -> None:
        stream = self.opener.next_stream() + gap
        inputs = {"prompt": call.content, "x": np.zeros(array_bytes, np.uint8)}
        self.ask(Request(stream=stream, op="generate", key=call.key, model="m", inputs=inputs))
        self.calls[stream] = call
        self.contents.setdefault(call.key, call.content)

    @precondition(may_ask)
    @rule(gap=st.booleans(), array_bytes=st.sampled_from([0, 10, 3000, 300_000, 1_100_000]))
    def ask_something_new(self, gap: bool, array_bytes: int) -> None:
        key = (len(self.contents) + 1).to_bytes(16, "big")
        if not self.opener.can_send_bodies:
            array_bytes = min(array_bytes, 300_000)
        self.request(Call(key, "first"), gap=gap, array_bytes=array_bytes)

    @precondition(lambda self: self.contents and self.may_ask())
    @rule(data=st.data(), same=st.booleans())
    def ask_under_a_known_key(self, data: st.DataObject, same: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.contents)))
        self.request(Call(key, self.contents[key] if same else "other"))

    @precondition(lambda self: not self.opener.can_send_bodies)
    @rule()
    def ask_too_much(self) -> None:
        before = (self.opener.open_streams(), self.opener.pending_bytes)
        huge = {"x": np.zeros(2 * 1024 * 1024, np.uint8)}
        message = Request(stream=self.opener.next_stream(), op="infer", key=bytes(16), inputs=huge)
        with pytest.raises(TooLarge):
            self.opener.send(message)
        assert (self.opener.open_streams(), self.opener.pending_bytes) == before

    @precondition(lambda self: self.asking.last)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        # Of streams that ended, too: a CANCEL and an END may cross on the wire.
        known = sorted(self.asking.next_index.keys() | self.asking.ends.keys())
        stream = data.draw(st.sampled_from(known))
        self.opener.send(Cancel(stream=stream))
        if stream in self.calls:
            self.calls[stream].is_cancelled = True

    @precondition(lambda self: not self.client_left)
    @rule()
    def leave_as_client(self) -> None:
        self.opener.send(Goaway())
        self.client_left = True

    def opener_hears(self, message: Message) -> None:
        match message:
            case Goaway():
                assert self.farewell is not None
                assert self.opener.peer_is_leaving
            case Event() | EventBatch():
                for stream, index, made in events_of(message):
                    call = self.calls[stream]
                    assert index == len(call.got)
                    call.got += made
                    assert call.got == tokens(call.key, 0, len(call.got))
            case Result() | End():
                call = self.calls.pop(message.stream)
                if isinstance(message, End) and message.finish is Finish.STOP:
                    assert len(call.got) == self.works[call.key].num_tokens
                    assert message.checksum == ids_checksum(call.got)
            case Failure():
                self.hear_failure(message, self.calls.pop(message.stream))

    def hear_failure(self, message: Failure, call: Call) -> None:
        match message.code:
            case ErrorCode.BUSY:
                assert self.num_streams == FEW_STREAMS
            case ErrorCode.CANCELLED:  # before all of it had come
                assert call.is_cancelled
                assert not call.got
            case ErrorCode.KEY_REUSED:
                assert call.content != self.works[call.key].content
            case ErrorCode.DRAINING:
                assert self.farewell is not None
                assert message.stream > self.farewell.last_stream
            case ErrorCode.UNKNOWN_KEY:  # the request itself was lost with its connection
                assert call.resumed
                assert not call.got
                if self.may_ask():
                    self.request(replace(call, resumed=False))
            case _:
                assert message.code == ErrorCode.INTERNAL
                assert isinstance(self.works[call.key].final, Failure)

    # -- the gateway --------------------------------------------------------------------------

    def lacks(self, stream: int) -> int:
        """Return how many tokens exist that the stream has not been told."""
        if stream in self.cancelled:
            return 0
        return self.works[self.readers[stream]].num_tokens - self.answering.next_index[stream]

    @precondition(lambda self: any(w.final is None for w in self.works.values()))
    @rule(data=st.data(), num_tokens=st.integers(1, 5))
    def work(self, data: st.DataObject, num_tokens: int) -> None:
        running = [key for key, work in self.works.items() if work.final is None]
        self.works[data.draw(st.sampled_from(running))].num_tokens += num_tokens

    @precondition(lambda self: any(w.final is None for w in self.works.values()))
    @rule(data=st.data(), how=st.sampled_from([End, Result, Failure]))
    def finish(self, data: st.DataObject, how: type[Message]) -> None:
        key = data.draw(st.sampled_from([k for k, w in self.works.items() if w.final is None]))
        self.end_work(key, how)

    def end_work(self, key: bytes, how: type[Message]) -> None:
        work = self.works[key]
        if how is Failure:
            work.final = failure(1, ErrorCode.INTERNAL)
        elif how is Result and not work.num_tokens:
            work.final = Result(stream=1, outputs={"x": np.zeros(2000, np.uint8)})
        else:
            work.final = ended(1, tokens(key, 0, work.num_tokens))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        self.answer(Ack(stream=data.draw(st.sampled_from(sorted(self.readers))), prompt_tokens=3))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def tell_one(self, data: st.DataObject) -> None:
        self.tell(data.draw(st.sampled_from(sorted(self.readers))))

    def tell(self, stream: int) -> None:
        """Send what a reader lacks, merged: also nothing but text."""
        at = self.answering.next_index[stream]
        new = tokens(self.readers[stream], at, at + self.lacks(stream))
        self.answer(Event(stream=stream, index=at, tokens=new, text="t"))

    @precondition(lambda self: any(self.lacks(stream) for stream in self.readers))
    @rule(data=st.data(), one_each=st.booleans())
    def tell_many(self, data: st.DataObject, one_each: bool) -> None:
        behind = [stream for stream in sorted(self.readers) if self.lacks(stream)]
        streams = data.draw(st.lists(st.sampled_from(behind), unique=True, min_size=1))
        firsts = [self.answering.next_index[stream] for stream in streams]
        counts = [1 if one_each else self.lacks(stream) for stream in streams]
        flat: list[int] = []
        for stream, first, count in zip(streams, firsts, counts, strict=True):
            flat += tokens(self.readers[stream], first, first + count)
        self.answer(
            EventBatch(
                streams=streams,
                first_indexes=firsts,
                counts=None if one_each else counts,
                tokens=flat,
                texts=["t"] * len(streams),
            )
        )

    def is_over(self, stream: int) -> bool:
        if stream in self.cancelled:
            return True
        return self.works[self.readers[stream]].final is not None and not self.lacks(stream)

    @precondition(lambda self: any(self.is_over(stream) for stream in self.readers))
    @rule(data=st.data())
    def end_one(self, data: st.DataObject) -> None:
        over = [stream for stream in sorted(self.readers) if self.is_over(stream)]
        self.end(data.draw(st.sampled_from(over)))

    def end(self, stream: int) -> None:
        key = self.readers.pop(stream)
        if stream in self.cancelled:
            told = tokens(key, 0, self.answering.next_index[stream])
            self.answer(ended(stream, told, Finish.CANCELLED))
            return
        final: Any = self.works[key].final
        self.answer(changed(final, stream=stream))

    @precondition(lambda self: self.farewell is None)
    @rule()
    def leave_as_gateway(self) -> None:
        self.farewell = Goaway(code=ErrorCode.DRAINING, last_stream=self.answerer.last_stream)
        self.answerer.send(self.farewell)

    def answerer_hears(self, message: Message) -> None:
        match message:
            case Goaway():
                assert self.client_left
                assert self.answerer.peer_is_leaving
            case Cancel() if message.stream in self.readers:  # or refused, in the same bytes
                self.cancelled.add(message.stream)
            case Request() | Resume():
                assert self.answerer.principal is not None
                assert (self.answerer.principal is LOCAL) is (self.method == "none")
                refusal = self.refusal_of(message)
                if refusal is None:
                    self.readers[message.stream] = message.key
                else:
                    self.answer(failure(message.stream, refusal))

    def refusal_of(self, message: Request | Resume) -> ErrorCode | None:
        work = self.works.get(message.key)
        if self.farewell is not None:
            return ErrorCode.DRAINING
        if isinstance(message, Resume):
            return ErrorCode.UNKNOWN_KEY if work is None else None
        content = message.inputs["prompt"]
        if work is None:
            self.works[message.key] = Work(content)
        elif work.content != content:
            return ErrorCode.KEY_REUSED
        return None

    # -- the wire is cut ----------------------------------------------------------------------

    @rule()
    def lose_the_connection(self) -> None:
        calls, self.calls = self.calls, {}
        if not self.knows_resume:
            for key in self.readers.values():
                if self.works[key].final is None:
                    self.end_work(key, Failure)
        self.readers, self.cancelled, self.farewell, self.client_left = {}, set(), None, False
        self.connect()
        for call in calls.values():
            if self.knows_resume and call.content == self.contents[call.key]:
                stream = self.opener.next_stream()
                self.ask(Resume(stream=stream, key=call.key, next_index=len(call.got)))
                self.calls[stream] = replace(call, resumed=True, is_cancelled=False)

    def finish_everything(self) -> None:
        while self.readers:
            for stream, key in list(self.readers.items()):
                if self.works[key].final is None:
                    self.end_work(key, End)
                if self.lacks(stream):
                    self.tell(stream)
                self.end(stream)
            self.deliver_all()
        assert not self.calls


@dataclass
class Task:
    """What a gateway's journal has of a request that a worker runs."""

    attempt: int = 0
    stream: int = 0
    got: list[int] = field(default_factory=list)
    final: Message | None = None


class WorkerLink(TwoEnds):
    """A gateway that submits, gives attempts up and submits again; a worker that runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks: dict[bytes, Task] = {}
        self.attempts: dict[int, tuple[bytes, int]] = {}  # by the stream on this connection
        self.running: dict[int, Submit] = {}  # at the worker
        self.is_draining = False

    @initialize(knows_bodies=st.booleans())
    def begin(self, knows_bodies: bool) -> None:
        self.knows_bodies = knows_bodies
        self.connect()

    def make_ends(self, nonce: bytes) -> tuple[Connection, Connection]:
        del nonce
        features = [FEATURE_BODY] * self.knows_bodies
        return (
            Connection(Role.DISPATCHER, scratch=SCRATCH, features=features),
            Connection(Role.WORKER, scratch=SCRATCH, features=features),
        )

    # -- the gateway --------------------------------------------------------------------------

    def submit(self, key: bytes) -> None:
        task = self.tasks[key]
        task.attempt += 1
        task.stream = self.opener.next_stream()
        self.attempts[task.stream] = (key, task.attempt)
        self.ask(
            Submit(
                stream=task.stream,
                op="generate",
                key=key,
                attempt=task.attempt,
                inputs={"x": np.zeros([0, 1500, 300_000][key[-1] % 3], np.uint8)},
                so_far=list(task.got),
            )
        )

    @rule()
    def submit_something_new(self) -> None:
        key = (len(self.tasks) + 1).to_bytes(16, "big")
        self.tasks[key] = Task()
        self.submit(key)

    @precondition(lambda self: any(t.final is None for t in self.tasks.values()))
    @rule(data=st.data())
    def give_up_and_submit_again(self, data: st.DataObject) -> None:
        unfinished = [key for key, task in self.tasks.items() if task.final is None]
        key = data.draw(st.sampled_from(unfinished))
        if self.tasks[key].stream in self.asking.next_index:
            self.opener.send(Cancel(stream=self.tasks[key].stream))
        self.submit(key)

    @precondition(lambda self: self.asking.last)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        known = sorted(self.asking.next_index.keys() | self.asking.ends.keys())
        self.opener.send(Cancel(stream=data.draw(st.sampled_from(known))))

    @rule()
    def drain(self) -> None:
        self.opener.send(Drain(grace_ms=1))
        self.is_draining = True

    def opener_hears(self, message: Message) -> None:
        match message:
            case Ack():
                assert message.prompt_ids == [1, 2]
            case Heartbeat():
                assert message.load == {"running": 1}
            case Step():
                events = events_of(message)
                for (stream, index, made), attempt in zip(events, message.attempts, strict=True):
                    key, of_attempt = self.attempts[stream]
                    assert attempt == of_attempt
                    task = self.tasks[key]
                    if attempt == task.attempt and task.final is None:
                        assert index == len(task.got)
                        task.got += made
                        assert task.got == tokens(key, 0, len(task.got))
            case Result() | End() | Failure():
                key, attempt = self.attempts[message.stream]
                task = self.tasks[key]
                if attempt == task.attempt and task.final is None:
                    task.final = message
                    if isinstance(message, End):
                        assert message.count == len(task.got)
                        assert message.checksum == ids_checksum(task.got)

    # -- the worker ---------------------------------------------------------------------------

    @precondition(lambda self: self.running)
    @rule(data=st.data(), one_each=st.booleans())
    def step(self, data: st.DataObject, one_each: bool) -> None:
        streams = data.draw(
            st.lists(st.sampled_from(sorted(self.running)), unique=True, min_size=1)
        )
        counts = [1 if one_each else data.draw(st.integers(0, 3)) for _ in streams]
        firsts = [self.answering.next_index[stream] for stream in streams]
        flat: list[int] = []
        for stream, first, count in zip(streams, firsts, counts, strict=True):
            flat += tokens(self.running[stream].key, first, first + count)
        self.answer(
            Step(
                streams=streams,
                attempts=[self.running[stream].attempt for stream in streams],
                first_indexes=firsts,
                counts=None if one_each else counts,
                tokens=flat,
                texts=["t"] * len(streams),
            )
        )

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(sorted(self.running)))
        self.answer(Ack(stream=stream, prompt_tokens=2, prompt_ids=[1, 2]))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), how=st.sampled_from([End, Result, Failure]))
    def end_one(self, data: st.DataObject, how: type[Message]) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.running))), how)

    def end(self, stream: int, how: type[Message]) -> None:
        key = self.running.pop(stream).key
        if how is Failure:
            self.answer(failure(stream, ErrorCode.MODEL_ERROR))
        elif how is Result:
            num_bytes = [2000, 300_000][key[-1] % 2]
            self.answer(Result(stream=stream, outputs={"x": np.zeros(num_bytes, np.uint8)}))
        else:
            self.answer(ended(stream, tokens(key, 0, self.answering.next_index[stream])))

    @rule(state=st.sampled_from(["loading", "ready"]))
    def beat(self, state: str) -> None:
        self.answerer.send(Heartbeat(state=state, load={"running": 1}))

    def answerer_hears(self, message: Message) -> None:
        match message:
            case Submit():
                assert message.so_far == tokens(message.key, 0, len(message.so_far))
                self.running[message.stream] = message
            case Cancel() if message.stream in self.running:  # a second may come in the same bytes
                self.end(message.stream, End)
            case Drain():
                assert self.is_draining

    @rule()
    def lose_the_worker(self) -> None:
        self.attempts, self.running, self.is_draining = {}, {}, False
        self.connect()
        for key, task in self.tasks.items():
            if task.final is None:
                self.submit(key)

    def finish_everything(self) -> None:
        for stream in list(self.running):
            self.end(stream, End)
        self.deliver_all()
        assert all(task.final is not None for task in self.tasks.values())


pytestmark = pytest.mark.timeout(3600 if IS_LONG else 600)  # for a busy machine, too

TestClientLink = ClientLink.TestCase
TestWorkerLink = WorkerLink.TestCase
TestClientLink.settings = TestWorkerLink.settings = machine_settings()
