"""The gateway: decides about every request, and keeps the books of the live ones."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter, defaultdict, deque
from typing import TYPE_CHECKING, Any

from tensorwire_protocol.errors import (
    Draining,
    ErrorCode,
    ModelError,
    ModelLoading,
    UnknownModel,
    UnknownOperation,
)
from tensorwire_protocol.operations import check_request

from tensorwire_server.gateway.admission import Admission
from tensorwire_server.gateway.deadlines import Deadlines
from tensorwire_server.gateway.journal import Journal
from tensorwire_server.gateway.reports import answer_report
from tensorwire_server.gateway.requests import LiveRequest, Phase
from tensorwire_server.gateway.session import Session
from tensorwire_server.models.lifecycle import ModelState
from tensorwire_server.models.spec import parse_model_id

if TYPE_CHECKING:
    from tensorwire_protocol.limits import Limits
    from tensorwire_protocol.messages import Request

    from tensorwire_server.config import AdmissionConfig
    from tensorwire_server.routing.pool import ModelPool
    from tensorwire_server.routing.replica import Replica

log = logging.getLogger(__name__)

_DEADLINE_STEP_S = 0.02  # how late a deadline may be noticed
_TICK_S = 1.0
_SESSION_ID_BYTES = 16


class Gateway:
    """Owns sessions, live requests and model pools; runs on one event loop.

    Args:
        software: what WELCOME says of this server.
        models: the models to serve, by name.
    """

    def __init__(
        self, config: AdmissionConfig, limits: Limits, models: dict[str, ModelPool], software: str
    ) -> None:
        self.models = models
        self.sessions: set[Session] = set()
        self.journal = Journal()
        self.outcomes: Counter[str] = Counter()  # how requests ended
        self.num_tokens = 0  # sent since the start
        self.is_draining = False
        self._config = config
        self._limits = limits
        self._software = software
        self._loop = asyncio.get_running_loop()
        self.started_at = time.monotonic()
        self.admission = Admission(config)
        self.deadlines = Deadlines()
        self._live: set[LiveRequest] = set()
        self._waiting: defaultdict[str, deque[LiveRequest]] = defaultdict(deque)
        self._idle = asyncio.Event()
        self._idle.set()

    # -- sessions -----------------------------------------------------------------------------

    def open_session(self) -> Session:
        """Return the driver for a fresh client connection."""
        session = Session(
            self,
            self._loop,
            limits=self._limits,
            session_id=os.urandom(_SESSION_ID_BYTES),
            software=self._software,
        )
        self.sessions.add(session)
        return session

    def on_session_closed(self, session: Session) -> None:
        """Forget a client that is gone."""
        self.sessions.discard(session)

    # -- requests -----------------------------------------------------------------------------

    def accept(self, session: Session, request: Request) -> LiveRequest | None:
        """Take a request, or answer it at once.

        Raises:
            TensorwireError: it is refused; nothing was executed.
        """
        operation = check_request(request)
        if not operation.needs_model:
            answer_report(self, session, request)
            return None
        if self.is_draining:
            raise Draining("the server is shutting down; use another or come back")
        pool = self._find_model(request)
        state = pool.state
        if state is ModelState.FAILED:
            raise ModelError(f"model {pool.name!r} could not be loaded: {pool.detail}")
        if state is ModelState.LOADING and not request.params.get("wait", True):
            raise ModelLoading(
                f"model {pool.name!r} is loading ({pool.detail}); wait or try again",
                retry_after_ms=1000,
            )
        self.admission.admit(pool.name)
        return self._begin(session, request, pool)

    def _find_model(self, request: Request) -> ModelPool:
        name, revision = parse_model_id(request.model or "")
        pool = self.models.get(name)
        if pool is None:
            raise UnknownModel(
                f"there is no model {name!r}; this server has {', '.join(self.models)}"
            )
        if revision is not None and not pool.card.get("revision", "").startswith(revision):
            raise UnknownModel(
                f"model {name!r} has no revision {revision!r}; ask for {name!r} without one"
            )
        tasks = pool.card.get("tasks")
        if tasks and request.op not in tasks:
            raise UnknownOperation(f"model {name!r} does not {request.op}; it does {_list(tasks)}")
        return pool

    def _begin(self, session: Session, request: Request, pool: ModelPool) -> LiveRequest:
        deadline = None
        if request.deadline_ms is not None:
            deadline = self.now() + request.deadline_ms / 1000
        live = LiveRequest(
            self.journal.open(request),
            model=pool.name,
            reader=session,
            keeper=self,
            deadline=deadline,
        )
        self._live.add(live)
        self._idle.clear()
        if deadline is not None:
            self.deadlines.add(deadline, live)
        replica = pool.pick()
        if replica is None:
            self._waiting[pool.name].append(live)
        else:
            live.dispatch(replica)
        return live

    def on_replica_change(self, replica: Replica, pool: ModelPool) -> None:
        """A replica became ready, failed, or was lost: look at what waits for its model."""
        waiting = self._waiting[pool.name]
        if pool.state is ModelState.FAILED:
            while waiting:
                live = waiting.popleft()
                if not live.is_closed:
                    live.fail(ModelError(f"model {pool.name!r} failed: {pool.detail}"))
            return
        while waiting:
            chosen = pool.pick()
            if chosen is None:
                return
            live = waiting.popleft()
            if not live.is_closed:
                live.dispatch(chosen)

    # -- the keeper of live requests ----------------------------------------------------------

    def now(self) -> float:
        """Return monotonic seconds."""
        return time.monotonic()

    def on_stopping(self, live: LiveRequest) -> None:
        """Give the worker a moment to confirm, then end the request without it."""
        self._loop.call_later(self._config.stop_grace_s, live.give_up)

    def on_closed(self, live: LiveRequest, outcome: str) -> None:
        """Close the books of a request."""
        self.outcomes[outcome] += 1
        self.num_tokens += len(live.entry.tokens)
        self.journal.close(live.entry)
        self.admission.leave(live.model)
        self._live.discard(live)
        if live.deadline is not None:
            self.deadlines.forget_one()
        if not self._live:
            self._idle.set()

    # -- time and the end ---------------------------------------------------------------------

    async def run_timers(self) -> None:
        """Let time pass for deadlines and connections, until cancelled."""
        next_tick = self.now()
        while True:
            await asyncio.sleep(_DEADLINE_STEP_S)
            now = self.now()
            self.deadlines.expire(now)
            if now >= next_tick:
                next_tick = now + _TICK_S
                for session in tuple(self.sessions):
                    session.transport.on_timer()
                for pool in self.models.values():
                    for replica in pool.replicas:
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
        idle = asyncio.ensure_future(self._idle.wait())
        hurried = asyncio.ensure_future(hurry.wait())
        await asyncio.wait({idle, hurried}, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        hurried.cancel()
        cut = 0
        for live in tuple(self._live):
            if live.phase is not Phase.CLOSED:
                cut += 1
                live.fail(Draining("the server was shut down before the end"))
        for session in tuple(self.sessions):
            session.close()
        return cut


def _list(names: Any) -> str:
    return ", ".join(map(str, names))
