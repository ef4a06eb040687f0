"""A worker process: its links, its compute thread, and what it says of itself.

    loading --computed once--> ready --drained--> DRAINED, or TERMINATED by a signal if local
       |                         |
       |                         +--the link broke (local), compute died--> LOST
       +--load failed--> failed: told to every link, then FAILED

A local worker lives and dies with its one link; a listening one outlives its links.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from tensorwire_protocol.messages import Heartbeat
from tensorwire_protocol.transports.polling import BusyPoll

from tensorwire_server.telemetry.process import settle_garbage_collector
from tensorwire_server.workers.arrays import ArrayLoop, InlineArrays
from tensorwire_server.workers.engines import card_map, load_engine, prove, reason_of
from tensorwire_server.workers.exits import ExitCode
from tensorwire_server.workers.handover import Handover
from tensorwire_server.workers.hashing import Hashing
from tensorwire_server.workers.link import Link
from tensorwire_server.workers.loop import GenerateLoop
from tensorwire_server.workers.service import Service

if TYPE_CHECKING:
    from collections.abc import Callable

    from tensorwire_server.memory.sharing import Sharing
    from tensorwire_server.workers.compute import Compute
    from tensorwire_server.workers.spec import WorkerSpec

log = logging.getLogger(__name__)
T = TypeVar("T")

BEAT_S = 1.0
_LAST_WORDS_S = 5.0  # for a gateway that has not greeted yet to hear why the load failed


class WorkerHost:
    """Owns the process.

    Args:
        is_local: lives and dies with its one link.
        on_ready: called once when the model has computed.
        sharing: memory in common with the gateway, for the one link of a local worker.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        is_local: bool,
        on_ready: Callable[[], None] | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        self._spec = spec
        self._is_local = is_local
        self._on_ready = on_ready
        self._loop = asyncio.get_running_loop()
        self._sharing = sharing
        self._service = Service(spec, sharing)
        streams = self._service.registry.streams
        # What computes needs the interpreter more than a loop that looks around does.
        self._poll = BusyPoll(self._loop, spec.busy_poll_us / 1e6, is_free=lambda: not streams)
        self._links: set[Link] = set()
        self._is_draining = False
        self._code_when_drained = ExitCode.DRAINED
        self._state, self._detail = "loading", "starting"
        self._card: dict[str, Any] | None = None
        self.exit_code: asyncio.Future[int] = self._loop.create_future()

    @property
    def detail(self) -> str:
        """How far loading is, or why it failed."""
        return self._detail

    def start(self) -> None:
        """Begin to load, and to beat."""
        threading.Thread(target=self._compute, name="compute", daemon=True).start()
        self._beat_regularly()

    def build_link(self) -> Link:
        """Return a link for a fresh connection from a gateway."""
        link = Link(
            self._service,
            on_greeted=self._greeted,
            on_lost=self._lost,
            sharing=self._sharing,
            poll=self._poll,
        )
        link.is_draining = self._is_draining
        self._links.add(link)
        return link

    def drain(self) -> None:
        """Take nothing new and end when all links are idle: SIGTERM."""
        self._is_draining = True
        if self._is_local:
            self._code_when_drained = ExitCode.TERMINATED
        for link in [*self._links]:
            link.drain(0.0)
        if not self._links or self._state != "ready":
            self._exit(self._code_when_drained)

    # -- the compute thread ---------------------------------------------------------------------

    def _compute(self) -> None:
        """Load, prove, then run for ever: one thread, so that torch's own pools are its own."""
        tell = self._loop.call_soon_threadsafe
        spec, answers = self._spec, self._service.answers
        hashing = Hashing(spec.source)
        try:
            engine = load_engine(spec, self._handed_over(self._on_phase))
            tell(self._on_phase, "first forward")
            prove(engine)
        except BaseException as error:
            reason = reason_of(error)
            if self._is_local:  # the other kind tells the person who started it
                log.error("worker_failed model=%s reason=%r", spec.model, reason)
            log.debug("worker_failed", exc_info=error)
            tell(self._on_failed, reason)
            return
        compute: Compute
        if "generate" in engine.card.tasks:
            handover = Handover(self._loop, answers.on_steps)
            compute = GenerateLoop(engine, spec, post=handover.put)
        elif getattr(engine, "inline", False):
            compute = InlineArrays(engine, spec, take=answers.on_batch)
        else:
            compute = ArrayLoop(engine, spec, post=self._handed_over(answers.on_batch))
        tell(self._on_computed, compute, hashing.revision())
        try:
            compute.run()
        except BaseException as error:
            log.critical("compute_died model=%s", spec.model, exc_info=error)
            os._exit(ExitCode.LOST)

    def _handed_over(self, callback: Callable[[T], None]) -> Callable[[T], None]:
        """Return what has the asyncio side call `callback`; the compute thread calls it."""

        def hand_over(value: T) -> None:
            self._loop.call_soon_threadsafe(callback, value)

        return hand_over

    def _on_phase(self, phase: str) -> None:
        self._detail = phase
        self._beat()

    def _on_computed(self, compute: Compute, revision: str | None) -> None:
        self._service.start(compute)
        self._state, self._detail = "ready", ""
        self._card = {
            "model": self._spec.model,
            "revision": revision,
            **card_map(compute.engine.card),
            **_kv_card(compute),
        }
        settle_garbage_collector()
        self._beat(with_card=True)
        if self._on_ready is not None:
            self._on_ready()

    def _on_failed(self, reason: str) -> None:
        self._state, self._detail = "failed", reason
        self._service.fail(reason)
        waits = self._is_local or self._links
        self._loop.call_later(_LAST_WORDS_S if waits else 0.0, self._exit, ExitCode.FAILED)
        self._beat()

    # -- links ----------------------------------------------------------------------------------

    def _greeted(self, link: Link) -> None:
        self._tell(link, with_card=True)

    def _lost(self, link: Link) -> None:
        self._links.discard(link)
        if self._links or not (self._is_local or self._is_draining or self._state == "failed"):
            return
        if self._state == "failed":
            self._exit(ExitCode.FAILED)
        else:
            self._exit(self._code_when_drained if link.is_draining else ExitCode.LOST)

    def _exit(self, code: ExitCode) -> None:
        if not self.exit_code.done():
            self.exit_code.set_result(code)

    def _beat_regularly(self) -> None:
        self._beat()
        self._loop.call_later(BEAT_S, self._beat_regularly)

    def _beat(self, *, with_card: bool = False) -> None:
        for link in [*self._links]:
            self._tell(link, with_card=with_card)

    def _tell(self, link: Link, *, with_card: bool) -> None:
        link.beat(
            Heartbeat(
                state=self._state,
                steps=self._service.num_steps,
                load=self._service.load(),
                card=self._card if with_card else None,
                detail=self._detail or None,
            )
        )
        if self._state == "failed" and link.is_greeted:
            self._loop.call_soon(link.transport.close)


def _kv_card(compute: Compute) -> dict[str, int]:
    """Return how much of texts fits into the memory for keys and values."""
    if not isinstance(compute, GenerateLoop):
        return {}
    budget = compute.kv_budget
    if budget.num_bytes is None:  # an engine without a cache
        return {}
    return {"kv_bytes": budget.num_bytes, "kv_tokens": budget.num_tokens}
