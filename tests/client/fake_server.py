"""A small server for the client's tests: the real protocol on a real socket, models by script.

The model's name says what happens to a request, so that a test needs nothing else:

    oracle            tokens that are a pure function of prompt, seed and index, one a tick
    endless           the same, until it is cancelled or late
    silent            accepted, then nothing until it is cancelled or late
    deaf              accepted, then nothing at all, whatever happens
    cut:N             the socket is aborted after N tokens
    eof:N             the socket is closed in good order after N tokens, without an END
    torn:N            the socket is aborted after N tokens, once; RESUME and REQ find the stream
    held:N            N tokens, and the rest once the connection was torn
    flaky:N           refused with BUSY N times, then `oracle`
    gap:N             the token after the first N is left out
    count:N           END says one token more than came
    short             END has fewer log-probabilities than tokens
    checksum:N        END carries a wrong checksum
    failed:N          ERR worker_lost after N tokens
    busy, broken      refused at once; broken has a log id
    picky             fails on the prompt "bad", and is endless on all others
    cat               embed, tokenize, infer: answered by arithmetic (a text's bytes are its ids)
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from tensorwire_protocol.connection import FEATURE_RESUME, Connection
from tensorwire_protocol.errors import (
    Busy,
    InternalError,
    TensorwireError,
    UnknownKey,
    UnknownModel,
    WorkerLost,
)
from tensorwire_protocol.limits import CLIENT_LINK, Limits
from tensorwire_protocol.messages import (
    Ack,
    Cancel,
    End,
    Event,
    EventBatch,
    Failure,
    Finish,
    Goaway,
    Hello,
    Request,
    Result,
    Resume,
    changed,
)
from tensorwire_protocol.operations import (
    STREAMED,
    check_inputs,
    check_request,
    read_ids,
    read_text,
    read_texts,
)
from tensorwire_protocol.roles import Role
from tensorwire_protocol.tensors import ids_checksum, pack_ids
from tensorwire_protocol.transports.aio import AioTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from tensorwire_protocol.messages import Message

T = TypeVar("T")
_TICK_S = 0.0005
_DEFAULT_TOKENS = 8
_SCRIPTS = (
    "oracle", "endless", "silent", "deaf", "cut", "eof", "torn", "held", "flaky", "gap", "count",
    "checksum", "short", "failed", "busy", "broken", "picky", "cat",
)  # fmt: skip


def oracle_token(prompt: str, seed: int, index: int) -> int:
    """Return the token at `index`."""
    return zlib.crc32(f"{prompt}|{seed}|{index}".encode()) % 50_000


def oracle_tokens(prompt: str, num_tokens: int = _DEFAULT_TOKENS, seed: int = 0) -> list[int]:
    """Return what the model `oracle` makes of a prompt."""
    return [oracle_token(prompt, seed, i) for i in range(num_tokens)]


def oracle_text(tokens: Sequence[int]) -> str:
    """Return the text of tokens."""
    return "".join(f"{token} " for token in tokens)


def cat_vectors(texts: Sequence[str]) -> NDArray[np.float32]:
    """Return what the model `cat` embeds texts as: (n, 4)."""
    numbers = [[len(t), sum(t.encode()), zlib.crc32(t.encode()) % 1000, 1] for t in texts]
    return np.asarray(numbers, dtype=np.float32).reshape(len(texts), 4)


@dataclass(slots=True, eq=False)
class Run:
    """One accepted stream."""

    request: Request
    script: str
    at: int  # how many tokens the script's event waits for
    prompt: str
    seed: int
    num_tokens: int
    due: float | None  # the loop's clock
    tokens: list[int] = field(default_factory=list)
    skipped: int = 0


class Session:
    """One client's connection."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self.loop = asyncio.get_running_loop()
        self.transport = AioTransport(
            Connection(
                Role.SERVER,
                software="fake",
                features=("passive", FEATURE_RESUME),
                limits=server.limits,
            ),
            self,
        )
        self.runs: dict[int, Run] = {}
        self.features: tuple[str, ...] = ()
        self.is_lost = False

    def on_messages(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if isinstance(message, Hello):
                self.features = message.features
            elif isinstance(message, Request):
                self._admit(message)
            elif isinstance(message, Resume):
                self._resume(message)
            elif isinstance(message, Cancel):
                self._cancel(message)

    def on_writable(self) -> None: ...

    def on_lost(self, error: TensorwireError | None) -> None:
        self.is_lost = True
        self.runs.clear()
        self.server.note_lost(self)

    def _admit(self, request: Request) -> None:
        self.server.note_request(request)
        try:
            check_inputs(check_request(request), request.inputs)
            if request.key in self.server.torn:
                self._attach(request.key, request.stream, 0, 0)
            else:
                self._begin(request)
        except TensorwireError as error:
            self.transport.send(Failure.of(request.stream, error))

    def _resume(self, message: Resume) -> None:
        self.server.resumes.append(message)
        if message.key in self.server.torn:
            self._attach(message.key, message.stream, message.next_index, message.next_char)
        else:
            error = UnknownKey("no request is known under this key")
            self.transport.send(Failure.of(message.stream, error))

    def _attach(self, key: bytes, stream: int, next_index: int, next_char: int) -> None:
        run = self.server.torn.pop(key)
        run.request, run.script = changed(run.request, stream=stream), "oracle"
        self.runs[stream] = run
        self.transport.send(Ack(stream=stream, prompt_tokens=len(run.prompt)))
        text = oracle_text(run.tokens)[next_char:]
        tokens = run.tokens[next_index:]
        self.transport.send(Event(stream=stream, index=next_index, tokens=tokens, text=text))
        self.server.wake_ticker()

    def _begin(self, request: Request) -> None:
        script, _, number = (request.model or "cat").partition(":")
        if script not in _SCRIPTS:
            raise UnknownModel(f"there is no model {request.model!r}; there are: oracle, cat")
        if script == "busy":
            raise Busy("the queue is full (8 of 8)", retry_after_ms=50)
        if script == "flaky" and self.server.refusals[request.key] < int(number):
            self.server.refusals[request.key] += 1
            raise Busy("the queue is full (8 of 8)", retry_after_ms=1)
        if script == "broken":
            raise InternalError("something broke; the log has it under 'abc123'", log_id="abc123")
        if request.op not in STREAMED and script in ("cat", "oracle", "flaky"):
            self.transport.send(self._answer(request))
            return
        prompt = _prompt(request)
        params = request.params
        deadline_ms = request.deadline_ms
        if script == "picky" and prompt == "bad":
            raise InternalError("the prompt is bad")
        endless = script in ("endless", "silent", "deaf", "picky")
        run = Run(
            request=request,
            script=script,
            at=int(number or 0),
            prompt=prompt,
            seed=params.get("seed", 0),
            num_tokens=10**9 if endless else params.get("max_new_tokens", _DEFAULT_TOKENS),
            due=None if deadline_ms is None else self.loop.time() + deadline_ms / 1000,
        )
        self.runs[request.stream] = run
        self.transport.send(Ack(stream=request.stream, prompt_tokens=len(prompt)))
        self.server.wake_ticker()

    def _answer(self, request: Request) -> Result:
        inputs, stream = request.inputs, request.stream
        if request.op == "embed":
            return Result(
                stream=stream, outputs={"embeddings": cat_vectors(read_texts(inputs["texts"]))}
            )
        if request.op == "tokenize":
            ids = np.frombuffer(read_text(inputs["prompt"], "prompt").encode(), dtype=np.uint8)
            return Result(stream=stream, outputs={"ids": ids.astype(np.int32)})
        if request.op == "infer":
            return Result(stream=stream, outputs=dict(inputs))
        answers: dict[str, dict[str, Any]] = {
            "models": {
                "models": [
                    {"name": "oracle", "state": "ready", "tasks": ["generate", "chat"]},
                    {"name": "cat", "state": "ready", "tasks": ["embed", "tokenize", "infer"]},
                ]
            },
            "health": {"status": self.server.status, "uptime_s": 1.5, "models": {}},
            "stats": {"gateway": {"sessions": len(self.server.sessions)}, "workers": {}},
        }
        return Result(stream=stream, extra=answers[request.op])

    def _cancel(self, cancel: Cancel) -> None:
        run = self.runs.get(cancel.stream)
        self.server.note_cancel(cancel)
        if run is not None and run.script != "deaf":
            self._end(run, Finish.CANCELLED)

    # -- the ticks ----------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Make one token for each stream, send them as one frame, and end what is over."""
        columns: list[tuple[int, int, int, str]] = []
        for run in list(self.runs.values()):
            if self.transport.connection.is_closed:  # `on_lost` is on its way
                return
            if run.script == "deaf":
                continue
            if run.due is not None and now >= run.due:
                self._flush(columns)
                self._end(run, Finish.DEADLINE)
            elif run.script != "silent":
                self._step(run, columns)
        if self.is_lost:
            return
        self._flush(columns)
        for run in list(self.runs.values()):
            if len(run.tokens) >= run.num_tokens:
                self._end(run, Finish.LENGTH)

    def _step(self, run: Run, columns: list[tuple[int, int, int, str]]) -> None:
        if run.script in ("cut", "eof", "torn", "failed") and len(run.tokens) == run.at:
            self._flush(columns)
            self._break(run)
            return
        if run.script == "held" and len(run.tokens) == run.at:
            return
        if run.script == "gap" and len(run.tokens) == run.at:
            run.skipped = 1
        index = len(run.tokens) + run.skipped
        token = oracle_token(run.prompt, run.seed, index)
        run.tokens.append(token)
        columns.append((run.request.stream, index, token, oracle_text([token])))

    def _break(self, run: Run) -> None:
        if run.script == "failed":
            del self.runs[run.request.stream]
            lost = WorkerLost("the worker died", detail={"attempt": 1})
            self.transport.send(Failure.of(run.request.stream, lost))
            return
        self.transport.flush()
        if run.script == "torn":
            self.tear()
            return
        if run.script == "cut":
            self.abort()
        else:
            self.transport.close()
        self.on_lost(None)

    def _flush(self, columns: list[tuple[int, int, int, str]]) -> None:
        if columns:
            streams, firsts, tokens, texts = (list(column) for column in zip(*columns, strict=True))
            columns.clear()
            self.transport.send(
                EventBatch(
                    streams=streams, first_indexes=firsts, counts=None, tokens=tokens, texts=texts
                )
            )

    def _end(self, run: Run, finish: Finish) -> None:
        del self.runs[run.request.stream]
        checksum, count = ids_checksum(run.tokens), len(run.tokens)
        if run.script == "checksum":
            checksum ^= 1
        if run.script == "count":
            count += 1
        self.transport.send(
            End(
                stream=run.request.stream,
                finish=finish,
                count=count,
                checksum=checksum,
                usage={"prompt_tokens": len(run.prompt), "completion_tokens": count},
                timings={"queued_ms": 0.5, "largest_batch": 1, "new_in_v2": 7},
                extra=_reports(run),
            )
        )

    def tear(self) -> None:
        """Cut the socket, and keep what ran on it."""
        self.server.torn |= {run.request.key: run for run in self.runs.values()}
        self.abort()
        self.on_lost(None)

    def abort(self) -> None:
        """Cut the socket as a crash does."""
        raw = self.transport._transport
        assert raw is not None
        raw.abort()

    def reset(self) -> None:
        """Cut the socket as a middlebox does, which forgets connections."""
        raw = self.transport._transport
        assert raw is not None
        no_farewell = struct.pack("ii", 1, 0)
        raw.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_farewell)
        raw.abort()


class Mute(asyncio.Protocol):
    """A client's connection that is cut before the greeting, behind so many requests."""

    def __init__(self, num_requests: int) -> None:
        self._num_requests = num_requests
        self._connection = Connection(Role.SERVER, features=(FEATURE_RESUME,))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._connection.feed(data)
        if self._connection.num_streams >= self._num_requests:
            self._transport.abort()


def _reports(run: Run) -> dict[str, Any]:
    """Log-probabilities by arithmetic: the i-th token has -i, the likeliest are 0, 1, …"""
    reports = {}
    for name, count in (("logprobs", len(run.tokens)), ("prompt_logprobs", len(run.prompt) - 1)):
        num_top = run.request.params.get(name)
        if num_top is not None:
            own = -np.arange(count, dtype="<f4")
            reports[name] = {
                "token_logprobs": own.tobytes(),
                "top_ids": np.tile(np.arange(num_top, dtype="<i4"), count).tobytes(),
                "top_logprobs": np.repeat(own, num_top).tobytes(),
                **({"token_ids": pack_ids(range(count))} if name == "prompt_logprobs" else {}),
            }
            if run.script == "short":
                reports[name]["token_logprobs"] = b"\0" * 4
    return reports


def _prompt(request: Request) -> str:
    inputs = request.inputs
    if "prompt" in inputs:
        return read_text(inputs["prompt"], "prompt")
    if "ids" in inputs:
        return ",".join(map(str, read_ids(inputs["ids"])))
    texts = read_texts(inputs["texts"])
    return "\n".join(f"{r}: {t}" for r, t in zip(inputs.get("roles", texts), texts, strict=True))


class FakeServer:
    """Runs sessions on an event loop in a thread of its own; use it in a `with` block."""

    def __init__(self, limits: Limits = CLIENT_LINK) -> None:
        self.limits = limits
        self.port = 0
        self.requests: list[Request] = []
        self.resumes: list[Resume] = []
        self.torn: dict[bytes, Run] = {}  # streams without a connection, by key
        self.refusals: Counter[bytes] = Counter()
        self.cancels: list[Cancel] = []
        self.sessions: list[Session] = []
        self.num_connections = 0
        self.mutes: list[int] = []  # the next connections: not greeted, cut behind so many requests
        self.status = "ready"
        self._changed = threading.Condition()
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    @property
    def open_runs(self) -> int:
        """How many streams are accepted and not ended."""
        return sum(len(session.runs) for session in self.sessions)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._has_runs = asyncio.Event()
        self._listener = await self._loop.create_server(self._accept, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]
        ticker = asyncio.create_task(self._tick())
        self._started.set()
        await self._stopping.wait()
        ticker.cancel()
        self._listener.close()
        for session in list(self.sessions):
            session.transport.close()
        await asyncio.sleep(0)

    def _accept(self) -> asyncio.BaseProtocol:
        self.num_connections += 1
        if self.mutes:
            return Mute(self.mutes.pop(0))
        session = Session(self)
        self.sessions.append(session)
        return session.transport

    async def _tick(self) -> None:
        while True:
            await self._has_runs.wait()
            now = self._loop.time()
            for session in list(self.sessions):
                session.tick(now)
            if not self.open_runs:
                self._has_runs.clear()
            await asyncio.sleep(_TICK_S)

    # -- for sessions -------------------------------------------------------------------------

    def wake_ticker(self) -> None:
        """Say that a session has a stream."""
        self._has_runs.set()

    def note_request(self, request: Request) -> None:
        """Keep a request for the test."""
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()

    def note_cancel(self, cancel: Cancel) -> None:
        """Keep a CANCEL for the test."""
        with self._changed:
            self.cancels.append(cancel)
            self._changed.notify_all()

    def note_lost(self, session: Session) -> None:
        """Forget a connection."""
        with self._changed:
            if session in self.sessions:
                self.sessions.remove(session)
            self._changed.notify_all()

    # -- for tests, on any thread -------------------------------------------------------------

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
        """Wait until what was noted fulfils `condition`; False when it does not in time."""
        with self._changed:
            return self._changed.wait_for(condition, timeout_s)

    def do(self, action: Callable[[], T]) -> T:
        """Run `action` on the server's loop, and wait for it."""

        async def run() -> T:
            return action()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    def reset_all(self) -> None:
        """Reset every connection; the listener stays."""

        def reset() -> None:
            for session in list(self.sessions):
                session.reset()

        self.do(reset)

    def abort_all(self) -> None:
        """Cut every connection as a crash does; the listener stays."""

        def abort() -> None:
            for session in list(self.sessions):
                session.abort()

        self.do(abort)
        assert self.wait_until(lambda: not self.sessions)

    def tear_all(self) -> None:
        """Cut every connection; RESUME and REQ find what ran on them."""

        def tear() -> None:
            for session in list(self.sessions):
                session.tear()

        self.do(tear)

    def say_goaway(self) -> None:
        """Tell every client to take its next request elsewhere; streams go on."""

        def say() -> None:
            for session in self.sessions:
                last = session.transport.connection.last_stream
                session.transport.send(Goaway(last_stream=last))

        self.do(say)

    def stop_listening(self) -> None:
        """Refuse new connections."""
        self.do(self._listener.close)
