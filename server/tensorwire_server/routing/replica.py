"""A replica: the gateway's handle on one worker, wherever it runs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, Protocol

from tensorwire_protocol.bodies import FEATURE_BODY, FEATURE_SHM
from tensorwire_protocol.codec.typed import PACKING
from tensorwire_protocol.connection import Connection
from tensorwire_protocol.errors import Executed, TensorwireError, WorkerLost
from tensorwire_protocol.messages import (
    Ack,
    Cancel,
    Drain,
    End,
    Failure,
    Heartbeat,
    PackedResult,
    Step,
)
from tensorwire_protocol.roles import Role, State
from tensorwire_protocol.transports.aio import AioTransport, shared_scratch

from tensorwire_server.models.lifecycle import ModelState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tensorwire_protocol.bodies import Sharing
    from tensorwire_protocol.messages import Message, Submit
    from tensorwire_protocol.transports.polling import BusyPoll

log = logging.getLogger(__name__)
_CLOSED: Final = State.CLOSED  # see `roles`
_READY: Final = ModelState.READY


class AttemptOwner(Protocol):
    """Who is told what becomes of one attempt. After a final call there is no other."""

    def build_submit(self, stream: int) -> Submit:
        """Return the message for the worker."""

    def on_ack(self, prompt_ids: Sequence[int] | None) -> None:
        """The worker has accepted it."""

    def on_tokens(self, first_index: int, tokens: Sequence[int], text: str) -> None:
        """Tokens, the first of them at `first_index` of the whole request."""

    def on_end(self, end: End) -> None:
        """Final: the stream ended."""

    def on_result(self, result: PackedResult) -> None:
        """Final: the answer of a unary operation."""

    def on_failure(self, error: TensorwireError) -> None:
        """Final: refused or failed in the worker."""

    def on_replica_lost(self) -> None:
        """Final: the worker is gone."""


_Attempt = tuple[int, AttemptOwner]  # its number, and who is told


class Replica:
    """One worker as the gateway sees it; it outlives the worker's processes and connections.

    Args:
        name: for logs and `stats`, for example "demo/0".
        model: what it must hold; None for a remote one, which says it the first time it is ready.
        on_change: called when `state`, `card` or `detail` have changed.
        poll: keeps the loop awake while answers are near.
    """

    def __init__(
        self,
        name: str,
        *,
        on_change: Callable[[Replica], None],
        model: str | None = None,
        poll: BusyPoll | None = None,
    ) -> None:
        self.name = name
        self.model = model
        self.state = ModelState.LOADING
        self.detail = "starting"
        self.card: dict[str, Any] = {}
        self.load: dict[str, Any] = {}
        self.steps = 0
        self.is_permanently_failed = False
        self.has_beaten = False  # on the present connection: what answers is a worker
        self._on_change = on_change
        self._poll = poll
        self._on_link_lost: Callable[[], None] | None = None
        self._transport: AioTransport | None = None
        self._attempts: dict[int, _Attempt] = {}

    # -- what the router asks -----------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """Say if it can take a request now."""
        return self.state is _READY and self._open_transport() is not None

    @property
    def num_in_flight(self) -> int:
        """How many attempts it has been given and not ended."""
        return len(self._attempts)

    def _open_transport(self) -> AioTransport | None:
        # A violation closes the connection a moment before `on_lost` tells of it.
        transport = self._transport
        if transport is None or transport.connection.state is _CLOSED:
            return None
        return transport

    # -- the worker's side --------------------------------------------------------------------

    def build_transport(
        self, on_lost: Callable[[], None] | None = None, sharing: Sharing | None = None
    ) -> AioTransport:
        """Return a transport for a fresh connection to the worker.

        Args:
            on_lost: is told its end.
            sharing: memory in common with the worker, where it runs on this machine.
        """
        self._on_link_lost = on_lost
        self.has_beaten = False
        connection = Connection(
            Role.DISPATCHER,
            scratch=shared_scratch(),
            software="tensorwire-gateway",
            features=(FEATURE_BODY,) if sharing is None else (FEATURE_BODY, FEATURE_SHM),
            sharing=sharing,
            codec=PACKING,
        )
        self._transport = AioTransport(connection, self, self._poll)
        return self._transport

    def on_messages(self, messages: Sequence[Message]) -> None:
        """Take what the worker sent."""
        for message in messages:
            if type(message) is PackedResult:
                self._on_result(message)
            elif type(message) is Step:
                self._on_step(message)
            elif type(message) is Ack:
                attempt = self._attempts.get(message.stream)
                if attempt:
                    attempt[1].on_ack(message.prompt_ids)
            elif type(message) is Heartbeat:
                self._on_heartbeat(message)
            elif type(message) is End or type(message) is Failure:
                self._on_last(message)

    def _on_step(self, step: Step) -> None:
        at = 0
        counts = step.counts
        for i, stream in enumerate(step.streams):
            count = 1 if counts is None else counts[i]
            tokens = step.tokens[at : at + count]
            at += count
            attempt = self._attempts.get(stream)
            # What is not of the current attempt is dropped: somebody else makes these tokens now.
            if attempt is not None and attempt[0] == step.attempts[i]:
                attempt[1].on_tokens(step.first_indexes[i], tokens, step.texts[i])

    def _on_result(self, result: PackedResult) -> None:
        attempt = self._attempts.pop(result.stream, None)
        if attempt is not None:
            attempt[1].on_result(result)

    def _on_last(self, message: End | Failure) -> None:
        attempt = self._attempts.pop(message.stream, None)
        if attempt is None:
            return
        if isinstance(message, End):
            attempt[1].on_end(message)
        else:
            attempt[1].on_failure(message.to_error())

    def _on_heartbeat(self, beat: Heartbeat) -> None:
        self.has_beaten = True
        self.steps = beat.steps
        self.load = dict(beat.load)
        before = (self.state, self.detail, self.card)
        if beat.card is not None:
            self.card = dict(beat.card)
        # A state that only a newer worker knows is none in which it takes requests.
        known = beat.state in (state.value for state in ModelState)
        self.state = ModelState(beat.state) if known else ModelState.LOADING
        self.detail = beat.detail or ""
        self._check_model()
        # A worker elsewhere may have been repaired.
        self.is_permanently_failed = self.state is ModelState.FAILED
        if (self.state, self.detail, self.card) != before:
            self._on_change(self)

    def _check_model(self) -> None:
        """Refuse a worker that holds another model than the one clients know it by."""
        holds = self.card.get("model")
        if not isinstance(holds, str):
            return
        if self.model is None:
            self.model = holds
        elif holds != self.model:
            self.state = ModelState.FAILED
            self.detail = f"the worker at {self.name} now holds {holds!r}"

    def on_writable(self) -> None:
        """Nothing is held back on this link."""

    def on_lost(self, error: TensorwireError | None) -> None:
        """The worker, or the way to it, is gone: whoever waits for it is told."""
        self._transport = None
        attempts, self._attempts = self._attempts, {}
        if not self.is_permanently_failed and self.has_beaten:
            self.state, self.detail = ModelState.LOADING, "restarting"
        if attempts or (error and self.has_beaten):
            log.warning(
                "replica_lost replica=%s in_flight=%d reason=%s", self.name, len(attempts), error
            )
        for _, owner in attempts.values():
            owner.on_replica_lost()
        self._on_change(self)
        if self._on_link_lost is not None:
            self._on_link_lost()

    # -- the gateway's side -------------------------------------------------------------------

    def submit(self, number: int, owner: AttemptOwner) -> int:
        """Send the owner's attempt of that number; return the stream of this link it runs on.

        Raises:
            TensorwireError: the worker is gone, or the request does not fit the link.
        """
        transport = self._open_transport()
        if transport is None:
            raise WorkerLost(f"{self.name} has no connection to its worker", executed=Executed.NO)
        stream = transport.connection.next_stream()
        transport.send(owner.build_submit(stream))
        self._attempts[stream] = (number, owner)
        return stream

    def cancel(self, stream: int, reason: str) -> None:
        """Ask the worker to stop; its terminal frame is the answer."""
        transport = self._open_transport()
        if transport is not None and stream in self._attempts:
            transport.send(Cancel(stream=stream, reason=reason))

    def abandon(self, stream: int) -> None:
        """Stop listening to an attempt; what still comes of it is dropped."""
        self._attempts.pop(stream, None)

    def disconnected(self, reason: str) -> None:
        """Say why there is no connection at present."""
        if not self.is_permanently_failed and self.detail != reason:
            log.warning("replica_unreachable replica=%s reason=%s", self.name, reason)
            self.state, self.detail = ModelState.LOADING, reason
            self._on_change(self)

    def fail(self, reason: str) -> None:
        """Give the replica up for good."""
        self.is_permanently_failed = True
        self.state, self.detail = ModelState.FAILED, reason
        self._on_change(self)

    def drain(self, grace_s: float) -> None:
        """Ask the worker to take nothing new and to end when it is idle."""
        transport = self._open_transport()
        if transport is not None:
            transport.send(Drain(grace_ms=int(grace_s * 1000)))

    def close(self) -> None:
        """End the connection to the worker."""
        if self._transport is not None:
            self._transport.close()

    def on_timer(self) -> None:
        """Let time pass on the link."""
        if self._transport is not None:
            self._transport.on_timer()
