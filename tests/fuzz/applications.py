"""Honest applications: they say what they may at each end of each link, and keep a book of it.

An action is a number and a seed, so that a case can name it. The same applications make the valid
conversations (at the peer) and keep the end under test busy while it is attacked.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any, TypeAlias

from tensorwire_protocol.errors import BadTensor, ErrorCode, OutputTooLarge, TooLarge
from tensorwire_protocol.messages import (
    TERMINAL,
    Ack,
    Cancel,
    Credit,
    Drain,
    End,
    Event,
    EventBatch,
    Failure,
    Finish,
    Goaway,
    Heartbeat,
    Ping,
    Request,
    Result,
    Resume,
    Step,
    Submit,
)
from tensorwire_protocol.roles import Role

from . import values
from .reference import Book

if TYPE_CHECKING:
    from collections.abc import Callable

    from tensorwire_protocol.connection import Connection
    from tensorwire_protocol.messages import Message

    from .bodies import Places, SharedZeros


_MOST_TOKENS = 1000  # that an answer has had here: nothing can be resumed behind them


class Application:
    """One end's user.

    A gateway does not rely on what a worker says: `routing/replica.py` drops what is not due. So a
    dispatcher's book is kept for what it sends alone.
    """

    def __init__(self, connection: Connection, places: Places, sharing: SharedZeros) -> None:
        self.connection = connection
        self.places, self.sharing = places, sharing
        self.book = Book()
        self._attempts: dict[int, int] = {}  # at the worker
        self.actions = _ACTIONS[connection.role]

    def act(self, number: int, seed: int) -> None:
        """Do one of `actions`; nothing if the connection is closed or has no stream for it."""
        if not self.connection.is_closed:
            self.actions[number % len(self.actions)](self, Random(seed))

    def hear(self, message: Message) -> None:
        """Take what the connection made of the peer's bytes."""
        if self.connection.role is Role.DISPATCHER:
            stream = getattr(message, "stream", 0)
            if isinstance(message, TERMINAL) and stream:
                del self.book.next_index[stream]
        elif not isinstance(message, Failure) or message.stream:
            self.book.note(message)
        if isinstance(message, Submit):
            self._attempts[message.stream] = message.attempt
        elif isinstance(message, Resume) and message.next_index > _MOST_TOKENS:
            self._refuse(message.stream)

    # -- those who ask ------------------------------------------------------------------------

    def _next_stream(self, rng: Random) -> int:
        return self.connection.next_stream() + rng.choice([0, 0, 0, 1, 7])

    def _request(self, rng: Random) -> None:
        op, inputs, params = values.operation(rng)
        self._say(
            Request(
                stream=self._next_stream(rng),
                op=op,
                key=values.key(rng),
                model=rng.choice(["demo", "m@1"]),
                inputs=inputs,
                params=params,
                deadline_ms=rng.choice([None, 0, 30_000]),
                credit=rng.choice([None, 10]),
                priority=rng.choice([0, -100, 100]),
                trace=rng.choice([None, "t"]),
            )
        )

    def _resume(self, rng: Random) -> None:
        if self.connection.can_resume:
            stream, index = self._next_stream(rng), rng.choice([0, 3])
            self._say(Resume(stream=stream, key=values.key(rng), next_index=index, next_char=2))

    def _submit(self, rng: Random) -> None:
        op, inputs, params = values.operation(rng)
        self._say(
            Submit(
                stream=self._next_stream(rng),
                op=op,
                key=values.key(rng),
                attempt=rng.choice([1, 2]),
                model="m",
                inputs=inputs,
                params=params,
                so_far=list(range(rng.choice([0, 0, 4]))),
                tenant=rng.choice(["", "a team"]),
            )
        )

    def _cancel(self, rng: Random) -> None:
        if self.book.last:
            reason = rng.choice(["cancelled", "deadline"])
            self._say(Cancel(stream=rng.randint(1, self.book.last), reason=reason))

    def _allow_events(self, rng: Random) -> None:
        if self.connection.has_credit and self.book.last:
            self._say(Credit(stream=rng.randint(1, self.book.last), amount=rng.choice([1, 100])))

    def _drain(self, rng: Random) -> None:
        self._say(Drain(grace_ms=rng.choice([0, 100])))

    # -- those who answer ---------------------------------------------------------------------

    def _open_stream(self, rng: Random) -> int | None:
        return rng.choice(list(self.book.next_index)) if self.book.next_index else None

    def _ack(self, rng: Random) -> None:
        if stream := self._open_stream(rng):
            ids = [1, 2] if self.connection.role is Role.WORKER else None
            self._say(Ack(stream=stream, prompt_tokens=rng.choice([None, 2]), prompt_ids=ids))

    def _event(self, rng: Random) -> None:
        if stream := self._open_stream(rng):
            made = [rng.choice([0, 7, 2**31 - 1]) for _ in range(rng.randrange(4))]
            index = self.book.next_index[stream]
            self._say(Event(stream=stream, index=index, tokens=made, text="t"))

    def _columns(self, rng: Random) -> dict[str, Any]:
        streams = [s for s in self.book.next_index if rng.random() < 0.7]
        counts = None if rng.random() < 0.5 else [rng.randrange(3) for _ in streams]
        num_tokens = len(streams) if counts is None else sum(counts)
        return {
            "streams": streams,
            "first_indexes": [self.book.next_index[stream] for stream in streams],
            "counts": counts,
            "tokens": [7] * num_tokens,
            "texts": ["t"] * len(streams),
        }

    def _batch(self, rng: Random) -> None:
        self._say(EventBatch(**self._columns(rng)))

    def _step(self, rng: Random) -> None:
        columns = self._columns(rng)
        self._say(Step(attempts=[self._attempts[s] for s in columns["streams"]], **columns))

    def _end(self, rng: Random) -> None:
        if stream := self._open_stream(rng):
            count, finish = self.book.next_index[stream], rng.choice(list(Finish))
            timings = values.numbers(rng)
            self._say(End(stream=stream, finish=finish, count=count, checksum=0, timings=timings))

    def _result(self, rng: Random) -> None:
        if stream := self._open_stream(rng):
            outputs, extra = values.arrays(rng), values.plain_map(rng)
            self._say(Result(stream=stream, outputs=outputs, extra=extra))

    def _failure(self, rng: Random) -> None:
        if stream := self._open_stream(rng):
            code, detail = rng.choice([0x0407, 0x02FF]), values.plain_map(rng)
            self._say(Failure(stream=stream, code=code, message="m", detail=detail))

    def _beat(self, rng: Random) -> None:
        card = rng.choice([None, {"max_tokens": 5}])
        self._say(Heartbeat(state="ready", steps=3, load=values.numbers(rng), card=card))

    # -- within one machine -------------------------------------------------------------------

    def _give_back(self, rng: Random) -> None:
        del rng
        self.sharing.give_back()

    # -- both ---------------------------------------------------------------------------------

    def _ping(self, rng: Random) -> None:
        self._say(Ping(payload=rng.randbytes(8)))

    def _goaway(self, rng: Random) -> None:
        last = self.connection.last_stream
        self._say(Goaway(code=0x0302, last_stream=last, grace_ms=5, alternatives=("a:1",)))

    def _refuse(self, stream: int) -> None:
        if not self.connection.is_closed:
            self._say(Failure(stream=stream, code=ErrorCode.UNKNOWN_KEY, message="m"))

    def _say(self, message: Message) -> None:
        try:
            self.connection.send(message)
        except (TooLarge, OutputTooLarge, BadTensor):
            return  # a side takes less, or fewer arrays, and nothing was sent
        self.book.note(message)


_Action: TypeAlias = "Callable[[Application, Random], None]"
_ASK = (Application._cancel, Application._ping, Application._goaway)
_ANSWER = (
    Application._ack, Application._end, Application._failure, *[Application._result] * 3,
    Application._ping, Application._goaway,
)  # fmt: skip
_ACTIONS: dict[Role, tuple[_Action, ...]] = {
    Role.CLIENT: (
        Application._request, Application._request, Application._resume,
        Application._allow_events, *_ASK,
    ),
    Role.SERVER: (
        Application._event, Application._event, Application._batch,
        *_ANSWER,
    ),
    Role.DISPATCHER: (
        Application._submit, Application._submit, Application._drain, Application._give_back, *_ASK,
    ),
    Role.WORKER: (
        Application._step, Application._step, Application._beat, Application._give_back, *_ANSWER,
    ),
}  # fmt: skip
