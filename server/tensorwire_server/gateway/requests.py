"""The life of one request, from its REQ to exactly one terminal frame.

WAITING   for the model to load, or for a replica
   | dispatched
   v
RUNNING   queued or running in a worker; a worker's END, RES or ERR closes it
   | CANCEL, deadline, lost socket
   v
STOPPING  the worker was told; it confirms, finishes first, or is given up after a grace
   |
   v
CLOSED    one terminal frame was sent (none if the client is gone)

A request that waits or runs may be without a reader for a while: DETACHED. Whoever comes for it in
time (RESUME, or REQ with its key) becomes its reader; after the grace it is stopped. Whoever comes
while it has a reader takes over from that one: of two connections of one client the newer lives.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Protocol

from tensorwire_protocol.codec.typed import PACKING, extended
from tensorwire_protocol.errors import (
    BadMeta,
    InternalError,
    RequestCancelled,
    TensorwireError,
    WorkerLost,
)
from tensorwire_protocol.limits import CLIENT_LINK
from tensorwire_protocol.messages import (
    Ack,
    EncodedTerminal,
    End,
    Failure,
    Finish,
    PackedResult,
    Submit,
)
from tensorwire_protocol.tensors import ids_checksum

from tensorwire_server.gateway.journal import kept_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensorwire_server.gateway.journal import Entry
    from tensorwire_server.gateway.outcomes import Name
    from tensorwire_server.routing.replica import AttemptOwner


_PASSED_ON = ("logprobs", "prompt_logprobs")  # of END's `extra`


class Phase(Enum):
    """Where a request is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    STOPPING = "stopping"
    CLOSED = "closed"


# See `roles`: an enum's member is dear where it is asked for with every request.
_WAITING: Final = Phase.WAITING
_RUNNING: Final = Phase.RUNNING
_STOPPING: Final = Phase.STOPPING
_CLOSED: Final = Phase.CLOSED
_CANCELLED: Final = Finish.CANCELLED


class Reader(Protocol):
    """Who gets the frames of a request."""

    def send_ack(self, ack: Ack) -> None: ...

    def send_tokens(
        self, stream: int, first_index: int, tokens: Sequence[int], text: str
    ) -> None: ...

    def settle(self, stream: int) -> float: ...

    def send_terminal(self, message: EncodedTerminal | Failure) -> None: ...

    def dismiss(self, stream: int, error: TensorwireError) -> None:
        """Another reader has taken over: end the stream, drop what it has not sent."""


class Worker(Protocol):
    """Who does the work of a request: a replica."""

    def submit(self, number: int, owner: AttemptOwner) -> int: ...

    def cancel(self, stream: int, reason: str) -> None: ...

    def abandon(self, stream: int) -> None: ...


class Keeper(Protocol):
    """Who keeps the books of live requests: the gateway."""

    def now(self) -> float: ...

    def on_stopping(self, live: LiveRequest) -> None:
        """It must be given up if the worker does not confirm in time."""

    def on_detached(self, live: LiveRequest) -> None:
        """It has lost its reader, who may come back; it must not wait for ever."""

    def on_kept(self, live: LiveRequest, num_bytes: int) -> None:
        """What it keeps for a reader to come has grown."""

    def on_deserted(self, live: LiveRequest) -> None:
        """Nobody may come back for it any more; it is about to be stopped."""

    def on_attached(self, live: LiveRequest) -> None:
        """It has a reader again, or another one."""

    def on_closed(
        self, live: LiveRequest, terminal: EncodedTerminal, outcome: str, *, may_be_kept: bool
    ) -> None:
        """It has ended; `outcome` is a finish reason, "ok", or an error's name.

        What may not be kept is a failure that a retry may cure: it must not meet the same again.
        """


class LiveRequest:
    """One accepted request; the owner of its attempts."""

    __slots__ = (
        "arrived_at",
        "deadline",
        "deadline_number",
        "entry",
        "is_acked",
        "keeper",
        "model",
        "name",
        "phase",
        "prompt_tokens",
        "reader",
        "replica",
        "stalled_s",
        "stop_reason",
        "stream",
        "tenant",
        "worker_stream",
    )

    def __init__(
        self,
        entry: Entry,
        *,
        model: str,
        name: Name,
        tenant: str,
        reader: Reader,
        keeper: Keeper,
        arrived_at: float,
    ) -> None:
        request = entry.request
        self.entry = entry
        self.model = model
        self.name = name  # under which it is found by its key
        self.tenant = tenant  # who asked
        self.stream = request.stream
        self.reader: Reader | None = reader
        self.keeper = keeper
        self.arrived_at = arrived_at  # monotonic s
        self.deadline: float | None = None
        if request.deadline_ms is not None:
            self.deadline = arrived_at + request.deadline_ms / 1000
        self.deadline_number: int | None = None  # in the keeper's book of deadlines
        self.phase = _WAITING
        self.is_acked = False
        self.prompt_tokens: int | None = None
        self.replica: Worker | None = None
        self.worker_stream = 0
        self.stop_reason = _CANCELLED
        self.stalled_s = 0.0  # of readers that are gone, because they did not read

    @property
    def is_closed(self) -> bool:
        """Say if the terminal frame was sent."""
        return self.phase is _CLOSED

    @property
    def is_detached(self) -> bool:
        """Say if it goes on without a reader."""
        return self.reader is None and self.phase in (_WAITING, _RUNNING)

    # -- from the gateway ---------------------------------------------------------------------

    def dispatch(self, replica: Worker) -> None:
        """Give the request to a worker."""
        number = self.entry.next_attempt()
        self.phase = _RUNNING
        self.replica = replica
        try:
            self.worker_stream = replica.submit(number, self)
        except TensorwireError as error:
            self.fail(error)

    def build_submit(self, stream: int) -> Submit:
        """Return the present attempt as a worker is given it."""
        entry = self.entry
        request = entry.request
        params = request.params
        if "wait" in params:  # concerns the gateway alone
            params = {name: value for name, value in params.items() if name != "wait"}
        return Submit(
            stream,
            request.op,
            request.key,
            entry.attempt,
            request.model,
            request.inputs,
            params,
            self._remaining_ms(),
            request.priority,
            entry.tokens,
            self.tenant,
        )

    def _remaining_ms(self) -> int | None:
        if self.deadline is None:
            return None
        return max(1, int((self.deadline - self.keeper.now()) * 1000))

    # -- from the client ----------------------------------------------------------------------

    def stop(self, reason: Finish) -> None:
        """Stop the work: CANCEL, or the deadline has passed."""
        if self.phase is _WAITING:
            self.stop_reason = reason
            self.finish_here()
        elif self.phase is _RUNNING:
            assert self.replica is not None
            self.phase = _STOPPING
            self.stop_reason = reason
            self.replica.cancel(self.worker_stream, reason.value)
            self.keeper.on_stopping(self)

    def on_deadline(self) -> None:
        """The deadline has passed."""
        self.stop(Finish.DEADLINE)

    def lose_reader(self, *, may_come_back: bool = False) -> None:
        """The client's connection is gone: stop and tell nobody, or go on for a while."""
        self.reader = None
        if may_come_back and self.is_detached:
            self.keeper.on_detached(self)
        else:
            self.desert()

    def desert(self) -> None:
        """Stop, if nobody has come for it meanwhile."""
        if self.is_detached:
            self.keeper.on_deserted(self)
            self.stop(Finish.CANCELLED)

    def attach(self, reader: Reader, stream: int, next_index: int = 0, next_char: int = 0) -> None:
        """Go on with another reader, which has so many tokens and characters.

        Raises:
            BadMeta: it cannot have that many; nothing changed.
        """
        tokens, text = tail(self.entry.tokens, self.entry.text, next_index, next_char)
        old, old_stream = self.reader, self.stream
        self.reader, self.stream = reader, stream
        self.keeper.on_attached(self)
        if old is not None:
            old.dismiss(old_stream, RequestCancelled("another connection took over this request"))
        if self.is_acked:
            reader.send_ack(Ack(stream=stream, prompt_tokens=self.prompt_tokens))
        if tokens or text:
            reader.send_tokens(stream, next_index, tokens, text)

    def give_up(self) -> None:
        """Close without the worker, which did not confirm in time."""
        if self.phase is _STOPPING:
            assert self.replica is not None
            self.replica.abandon(self.worker_stream)
            self.finish_here()

    def cut(self, error: TensorwireError) -> None:
        """End the stream with an error, whatever the worker still does for it."""
        if self.phase is _CLOSED:
            return
        if self.replica is not None:
            self.replica.cancel(self.worker_stream, Finish.CANCELLED.value)
            self.replica.abandon(self.worker_stream)
        self.fail(error)

    def finish_here(self) -> None:
        """End the stream with what the journal has."""
        tokens = self.entry.tokens
        end = End(
            stream=self.stream,
            finish=self.stop_reason,
            count=len(tokens),
            checksum=ids_checksum(tokens),
            usage={
                "prompt_tokens": len(self.entry.prompt_ids),
                "completion_tokens": len(tokens),
            },
            timings=self._timings({}),
        )
        self._close(end, self.stop_reason.value)

    def fail(self, error: TensorwireError) -> None:
        """End the stream with an error."""
        if self.reader is not None:
            self.reader.settle(self.stream)
        self._close(Failure.of(self.stream, error), error.code.name)

    # -- from the worker (AttemptOwner) -------------------------------------------------------

    def on_ack(self, prompt_ids: Sequence[int] | None) -> None:
        """The worker has accepted it: keep the prompt's ids, tell the client their number."""
        self.entry.prompt_ids = prompt_ids or ()
        self.is_acked = True
        self.prompt_tokens = None if prompt_ids is None else len(prompt_ids)
        if self.reader is not None:
            self.reader.send_ack(Ack(stream=self.stream, prompt_tokens=self.prompt_tokens))

    def on_tokens(self, first_index: int, tokens: Sequence[int], text: str) -> None:
        """Keep the tokens, then pass them on."""
        if not self.entry.append(first_index, tokens, text):
            had = len(self.entry.tokens)
            self.cut(InternalError(f"the worker went on at token {first_index}, {had} had come"))
        elif self.reader is not None:
            self.reader.send_tokens(self.stream, first_index, tokens, text)
        elif self.is_detached:
            self.keeper.on_kept(self, kept_bytes(tokens, text))

    def on_end(self, end: End) -> None:
        """The worker ended the stream."""
        if not self.entry.agrees(end.count, end.checksum):
            self.fail(InternalError("the worker's count of tokens differs from what it sent"))
            return
        passed_on = End(
            stream=self.stream,
            finish=end.finish,
            count=end.count,
            checksum=end.checksum,
            usage=end.usage,
            timings=self._timings(end.timings),
            extra={name: end.extra[name] for name in _PASSED_ON if name in end.extra},
        )
        self._close(passed_on, end.finish.value)

    def on_result(self, result: PackedResult) -> None:
        """The worker answered a unary operation."""
        timings = extended(result.timings, self._own_timings())
        passed_on = PackedResult(self.stream, result.outputs, result.usage, timings, result.extra)
        self._close(passed_on, "ok")

    def on_failure(self, error: TensorwireError) -> None:
        """The worker refused it, or failed on it."""
        self.fail(error)

    def on_replica_lost(self) -> None:
        """The worker died under it."""
        if self.phase is _STOPPING:
            self.finish_here()
            return
        made = len(self.entry.tokens)
        self.fail(
            WorkerLost(
                f"the worker died after {made} tokens of this request; send it again",
                detail={"attempt": self.entry.attempt, "tokens": made},
            )
        )

    # -- the end ------------------------------------------------------------------------------

    def _timings(self, worker: Any) -> dict[str, float]:
        return {**worker, **self._own_timings()}

    def _own_timings(self) -> dict[str, float]:
        stalled_s = self.stalled_s
        if self.reader is not None and self.entry.has_begun:
            stalled_s += self.reader.settle(self.stream)
        total_s = self.keeper.now() - self.arrived_at
        return {
            "write_stall_ms": stalled_s * 1000,
            "gateway_ms": total_s * 1000,
        }

    def _close(self, terminal: End | PackedResult | Failure, outcome: str) -> None:
        if self.phase is _CLOSED:
            return
        self.phase = _CLOSED
        reader, self.reader = self.reader, None
        # Encoded once, for the reader and for whoever asks again.
        buffers = PACKING.encode(terminal, CLIENT_LINK)
        encoded = EncodedTerminal(terminal.KIND, self.stream, buffers)
        may_be_kept = not (isinstance(terminal, Failure) and terminal.retryable)
        self.keeper.on_closed(self, encoded, outcome, may_be_kept=may_be_kept)
        if reader is not None:
            reader.send_terminal(encoded)


def tail(
    tokens: Sequence[int], text: str, next_index: int, next_char: int
) -> tuple[Sequence[int], str]:
    """Return what a reader that has so many tokens and characters does not have yet.

    Raises:
        BadMeta: it cannot have that many.
    """
    if next_index > len(tokens) or next_char > len(text):
        raise BadMeta(
            f"RESUME goes on behind token {next_index} and character {next_char};"
            f" {len(tokens)} and {len(text)} were made"
        )
    return tokens[next_index:], text[next_char:]
