"""The gateway: decides about every request, and keeps the books of the live ones."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import TYPE_CHECKING, Any, Final

from tensorwire_protocol.auth import NONCE_BYTES
from tensorwire_protocol.errors import (
    Draining,
    ErrorCode,
    Executed,
    KeyReused,
    ModelError,
    ModelLoading,
    TensorwireError,
    UnknownKey,
    UnknownModel,
    UnknownOperation,
)
from tensorwire_protocol.messages import Ack, EncodedTerminal, Kind
from tensorwire_protocol.operations import check_request
from tensorwire_protocol.receive_memory import ReceiveMemory
from tensorwire_protocol.tensors import pack_ids, unpack_ids

from tensorwire_server.config import OutcomesConfig
from tensorwire_server.gateway.admission import Admission
from tensorwire_server.gateway.alarm import Alarm
from tensorwire_server.gateway.auth import check_right
from tensorwire_server.gateway.bounds import SharedBytes
from tensorwire_server.gateway.deadlines import Deadlines
from tensorwire_server.gateway.journal import Journal
from tensorwire_server.gateway.outcomes import (
    MAX_RESULT_BYTES,
    Outcome,
    Outcomes,
    fingerprint,
    name_of,
)
from tensorwire_server.gateway.reports import answer_report
from tensorwire_server.gateway.requests import LiveRequest, tail
from tensorwire_server.gateway.session import Session
from tensorwire_server.models.lifecycle import ModelState
from tensorwire_server.models.manifest import MIN_DIGITS
from tensorwire_server.models.spec import parse_model_id

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tensorwire_protocol.limits import Limits
    from tensorwire_protocol.messages import Request, Resume
    from tensorwire_protocol.transports.polling import BusyPoll

    from tensorwire_server.config import AdmissionConfig
    from tensorwire_server.gateway.auth import Credentials
    from tensorwire_server.memory.intake import IntakeMemory
    from tensorwire_server.routing.pool import ModelPool
    from tensorwire_server.routing.replica import Replica

log = logging.getLogger(__name__)

_END: Final = Kind.END  # see the protocol's `roles`
_TICK_S = 1.0
_SESSION_ID_BYTES = 16
_RECEIVE_SHARE = 4  # a quarter of the budget
_FAREWELL_S = 5.0  # for the last frames to leave


class Gateway:
    """Owns sessions, live requests and model pools; runs on one event loop.

    Args:
        software: what WELCOME says of this server.
        models: the models to serve, by name.
        outcomes: how long what can be asked for, by request key.
        unnamed: remote replicas that have not said yet which model they hold; the owner of the
            list takes them out.
        credentials: whom to serve; None for everybody who can connect.
        bodies: where large requests land.
        poll: keeps the loop awake while answers are near.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: AdmissionConfig,
        limits: Limits,
        models: dict[str, ModelPool],
        software: str,
        *,
        outcomes: OutcomesConfig | None = None,
        unnamed: Sequence[Replica] = (),
        credentials: Credentials | None = None,
        bodies: IntakeMemory | None = None,
        poll: BusyPoll | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.models = models
        self.unnamed = unnamed
        self.sessions: dict[Session, Callable[[Session], None]] = {}  # and who is told of its end
        self.journal = Journal()
        self.outcomes: dict[str, int] = {}  # how requests ended
        self.num_tokens = 0  # sent since the start
        self.is_draining = False
        self._config = config
        self._limits = limits
        self._software = software
        self._credentials = credentials
        self.bodies = bodies
        self._poll = poll
        self._loop = asyncio.get_running_loop()
        self.now = clock
        self.started_at = clock()
        self.admission = Admission(config)
        self.receive_memory = ReceiveMemory(config.memory_bytes // _RECEIVE_SHARE)
        self.deadlines = Deadlines()
        self._alarm = Alarm(self.deadlines, self._loop, clock)
        self._live: dict[LiveRequest, None] = {}  # in the order of arrival
        # Where what a client asks for goes: found once, forgotten when a replica changes.
        self._routes: dict[tuple[str, str | None], ModelPool] = {}
        self._give_up_timers: dict[LiveRequest, asyncio.TimerHandle] = {}
        self._outcomes_config = outcomes or OutcomesConfig()
        self.by_key: Outcomes[LiveRequest] = Outcomes(self._outcomes_config)
        self._grace_timers: dict[LiveRequest, asyncio.TimerHandle] = {}  # of the detached
        self.detached: SharedBytes[LiveRequest] = SharedBytes(self._outcomes_config.detached_bytes)
        self.merged: SharedBytes[Session] = SharedBytes(config.merged_bytes)
        # In the order of arrival. A dict, because what ends while it waits leaves from the middle.
        self._waiting: dict[str, dict[LiveRequest, None]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._deserted = asyncio.Event()
        self._deserted.set()

    @property
    def replicas(self) -> list[Replica]:
        """All workers' handles."""
        named = [replica for pool in self.models.values() for replica in pool.replicas]
        return [*named, *self.unnamed]

    # -- sessions -----------------------------------------------------------------------------

    def open_session(
        self,
        *,
        is_private: bool = True,
        on_closed: Callable[[Session], None] = lambda session: None,
    ) -> Session:
        """Return the driver for a fresh client connection.

        Args:
            is_private: nobody else can read it, so it may carry a token.
            on_closed: told of its end.
        """
        credentials = self._credentials
        session = Session(
            self,
            self._loop,
            limits=self._limits,
            memory=self.receive_memory,
            session_id=os.urandom(_SESSION_ID_BYTES),
            software=self._software,
            authenticator=None if credentials is None else credentials.over(is_private=is_private),
            nonce=b"" if credentials is None else os.urandom(NONCE_BYTES),
            bodies=self.bodies,
            poll=self._poll,
        )
        self.sessions[session] = on_closed
        self._deserted.clear()
        return session

    def on_session_closed(self, session: Session) -> None:
        """Forget a client that is gone."""
        self.sessions.pop(session)(session)
        self.merged.forget(session)
        if not self.sessions:
            self._deserted.set()

    def on_merged(self, session: Session, num_bytes: int) -> None:
        """Keep the bound on what clients do not take: the largest heaps go first."""
        self.merged.add(session, num_bytes)
        while (largest := self.merged.take_largest()) is not None:
            largest.give_up("too much waits for clients that do not take it, most for this one")

    # -- requests -----------------------------------------------------------------------------

    def accept(self, session: Session, request: Request) -> LiveRequest | None:
        """Take a request, or answer it at once.

        Raises:
            TensorwireError: it is refused; nothing was executed.
        """
        operation = check_request(request)
        check_right(session.principal, operation)
        if not operation.needs_model:
            answer_report(self, session, request)
            return None
        tenant = session.principal_name
        name = name_of(tenant, request.key)
        now = self.now()
        known = self.by_key.find(name, now)
        if known is not None:
            return self._join(session, request, known)
        if self.is_draining:
            raise Draining("the server is shutting down; use another or come back")
        pool = self._routes.get((request.op, request.model)) or self._find_model(request)
        replica = pool.pick()
        if replica is None:
            _check_can_wait(request, pool)
        self.admission.admit(pool.name)
        live = LiveRequest(
            self.journal.open(request),
            model=pool.name,
            name=name,
            tenant=tenant,
            reader=session,
            keeper=self,
            arrived_at=now,
        )
        self._begin(live, pool, replica)
        return live

    def _join(
        self, session: Session, request: Request, known: LiveRequest | Outcome
    ) -> LiveRequest | None:
        """Answer a request whose key is known with that very request, from its beginning."""
        before = fingerprint(known.entry.request) if isinstance(known, LiveRequest) else known.asked
        if fingerprint(request) != before:
            raise KeyReused("this request key was used before, for another request")
        return self._hand_over(session, request.stream, known)

    def resume(self, session: Session, message: Resume) -> LiveRequest | None:
        """Go on with a request where its client says, on another connection.

        Raises:
            UnknownKey: it was never here, or is forgotten.
            BadMeta: the client cannot have as much as it says.
        """
        known = self.by_key.find(name_of(session.principal_name, message.key), self.now())
        if known is None:
            raise UnknownKey("no request is known under this key (any more)")
        return self._hand_over(
            session, message.stream, known, message.next_index, message.next_char
        )

    def _hand_over(
        self,
        session: Session,
        stream: int,
        known: LiveRequest | Outcome,
        next_index: int = 0,
        next_char: int = 0,
    ) -> LiveRequest | None:
        if isinstance(known, LiveRequest):
            known.attach(session, stream, next_index, next_char)
            return known
        _replay(session, stream, known, next_index, next_char)
        return None

    def _find_model(self, request: Request) -> ModelPool:
        name, revision = parse_model_id(request.model or "")
        pool = self.models.get(name)
        if pool is None:
            raise UnknownModel(
                f"there is no model {name!r}; this server has {', '.join(self.models)}"
            )
        _check_card(request.op, revision, pool)
        if pool.card:
            self._routes[request.op, request.model] = pool
        return pool

    def _begin(self, live: LiveRequest, pool: ModelPool, replica: Replica | None) -> None:
        self.by_key.begin(live.name, live)
        if not self._live:
            self._idle.clear()
        self._live[live] = None
        if live.deadline is not None:
            live.deadline_number = self.deadlines.add(live.deadline, live)
            self._alarm.set(live.deadline)
        if replica is None:
            self._waiting.setdefault(pool.name, {})[live] = None
        else:
            live.dispatch(replica)

    def on_replica_change(self, replica: Replica, pool: ModelPool) -> None:
        """A replica became ready, failed, or was lost: look at what waits for its model."""
        self._routes.clear()
        waiting = self._waiting.get(pool.name, {})
        if pool.state is ModelState.FAILED:
            reason = f"model {pool.name!r} failed: {pool.detail}"
            for live in tuple(waiting):
                live.fail(ModelError(reason, executed=Executed.NO))
            return
        for live in tuple(waiting):
            chosen = pool.pick()
            if chosen is None:
                return
            del waiting[live]
            try:
                # What the model is was not known when the request came.
                request = live.entry.request
                _check_card(request.op, parse_model_id(request.model or "")[1], pool)
            except TensorwireError as error:
                live.fail(error)
            else:
                live.dispatch(chosen)

    # -- the keeper of live requests ----------------------------------------------------------

    def on_stopping(self, live: LiveRequest) -> None:
        """Give the worker a moment to confirm, then end the request without it."""
        self.on_attached(live)  # its grace is of no interest any more
        timer = self._loop.call_later(self._config.stop_grace_s, live.give_up)
        self._give_up_timers[live] = timer

    def on_detached(self, live: LiveRequest) -> None:
        """Wait for its client for a while."""
        grace_s = self._outcomes_config.resume_grace_s
        if grace_s == 0 or self.is_draining:  # nobody can come back to a server that leaves
            live.desert()
        else:
            self._grace_timers[live] = self._loop.call_later(grace_s, live.desert)
            self.on_kept(live, live.entry.num_bytes)

    def on_kept(self, live: LiveRequest, num_bytes: int) -> None:
        """Keep the bound on what runs without readers: the largest are stopped first."""
        self.detached.add(live, num_bytes)
        while (largest := self.detached.take_largest()) is not None:
            largest.desert()

    def on_attached(self, live: LiveRequest) -> None:
        """Its client has come back."""
        self.detached.forget(live)
        timer = self._grace_timers.pop(live, None)
        if timer is not None:
            timer.cancel()

    def on_deserted(self, live: LiveRequest) -> None:
        """Forget its key: whoever still comes with it finds nothing, and may begin anew."""
        self.on_attached(live)
        self.by_key.forget(live.name, live)

    def on_closed(
        self, live: LiveRequest, terminal: EncodedTerminal, outcome: str, *, may_be_kept: bool
    ) -> None:
        """Close the books of a request, and keep its outcome."""
        self._keep_outcome(live, terminal if may_be_kept else None)
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        self.num_tokens += len(live.entry.tokens)
        self.journal.close(live.entry)
        self.admission.leave(live.model)
        del self._live[live]
        if live.deadline_number is not None:
            self.deadlines.forget(live.deadline_number)
        if self._grace_timers:
            self.on_attached(live)
        if self._waiting:
            waiting = self._waiting.get(live.model)
            if waiting is not None:
                waiting.pop(live, None)
        if self._give_up_timers:
            timer = self._give_up_timers.pop(live, None)
            if timer is not None:
                timer.cancel()  # or it would keep the request, with its arrays, until it fires
        if not self._live:
            self._idle.set()

    def _keep_outcome(self, live: LiveRequest, terminal: EncodedTerminal | None) -> None:
        name = live.name
        if terminal is None:
            self.by_key.forget(name, live)
            return
        if not self.by_key.holds(name, live):
            return
        entry = live.entry
        # An END is bounded by its own limit, and a stream of which all but it has come needs it.
        is_end = terminal.KIND is _END
        is_small = is_end or terminal.num_bytes <= MAX_RESULT_BYTES
        outcome = Outcome(
            fingerprint(entry.request),
            live.prompt_tokens,
            pack_ids(entry.tokens) if entry.tokens else b"",
            entry.text,
            terminal.joined() if is_small else None,
        )
        self.by_key.keep(name, live, outcome, self.now())

    # -- time and the end ---------------------------------------------------------------------

    async def run_timers(self) -> None:
        """Let time pass for connections and kept outcomes, until cancelled."""
        while True:
            await asyncio.sleep(_TICK_S)
            now = self.now()
            self.by_key.expire(now)
            if self.bodies is not None:
                self.bodies.on_timer(now)
            for session in tuple(self.sessions):
                session.on_timer(now)
            for replica in self.replicas:
                replica.on_timer()

    async def drain(self, grace_s: float, hurry: asyncio.Event) -> int:
        """Take nothing new, let what runs finish, close the sessions; return how many were cut.

        Args:
            grace_s: how long what runs may take.
            hurry: set to end the patience early.
        """
        self.is_draining = True
        for session in tuple(self.sessions):
            session.go_away(int(ErrorCode.DRAINING), grace_s)
        for live in tuple(self._live):
            live.desert()
        await _wait_for_either(self._idle, hurry, grace_s)
        cut = tuple(self._live)
        for live in cut:
            executed = Executed.MAYBE if live.entry.attempt else Executed.NO
            live.cut(Draining("the server was shut down before the end", executed=executed))
        for session in tuple(self.sessions):
            session.close()
        # The loop must not end before the last frames have left.
        await _wait_for_either(self._deserted, hurry, _FAREWELL_S)
        return len(cut)


async def _wait_for_either(event: asyncio.Event, hurry: asyncio.Event, patience_s: float) -> None:
    waits = {asyncio.ensure_future(e.wait()) for e in (event, hurry)}
    await asyncio.wait(waits, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


def _replay(
    session: Session, stream: int, outcome: Outcome, next_index: int, next_char: int
) -> None:
    """Tell how a request ended, and what its client does not have yet."""
    if outcome.terminal is None:
        raise UnknownKey(
            "the request was executed; its result was too large to be kept, ask under a new key",
            executed=Executed.YES,
        )
    tokens, text = tail(unpack_ids(outcome.tokens), outcome.text, next_index, next_char)
    terminal = EncodedTerminal.of(outcome.terminal, stream)
    if terminal.KIND is _END or outcome.prompt_tokens is not None:
        session.send_ack(Ack(stream=stream, prompt_tokens=outcome.prompt_tokens))
    if tokens or text:
        session.send_tokens(stream, next_index, tokens, text)
    session.settle(stream)
    session.send_terminal(terminal)


def _check_can_wait(request: Request, pool: ModelPool) -> None:
    """Refuse what no replica will take, or will not take at once."""
    if pool.state is ModelState.FAILED:
        raise ModelError(
            f"model {pool.name!r} could not be loaded: {pool.detail}", executed=Executed.NO
        )
    if not request.params.get("wait", True):
        raise ModelLoading(
            f"model {pool.name!r} is loading ({pool.detail}); wait or try again",
            retry_after_ms=1000,
        )


def _check_card(op: str, revision: str | None, pool: ModelPool) -> None:
    """Refuse what the model is not, or does not do; while it loads that is not known."""
    card = pool.card
    if revision is not None:
        _check_revision(revision, pool)
    tasks = card.get("tasks")
    if tasks and op not in tasks:
        raise UnknownOperation(f"model {pool.name!r} does not {op}; it does {_list(tasks)}")


def _check_revision(revision: str, pool: ModelPool) -> None:
    if len(revision) < MIN_DIGITS:
        raise UnknownModel(
            f"a revision is given by at least {MIN_DIGITS} of its digits, not {revision!r}"
        )
    if pool.card and not (pool.card.get("revision") or "").startswith(revision):
        held = str(pool.card.get("revision") or "")[:12]
        has = f"revision {held}, not {revision!r}" if held else f"no revision {revision!r}"
        raise UnknownModel(f"model {pool.name!r} has {has}")


def _list(names: Any) -> str:
    return ", ".join(map(str, names))
