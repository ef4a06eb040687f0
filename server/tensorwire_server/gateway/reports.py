"""The operations that the gateway answers itself: models, health, stats."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from tensorwire_protocol.codec.typed import opened
from tensorwire_protocol.errors import BadMeta, TensorwireError
from tensorwire_protocol.messages import Result, Submit

from tensorwire_server.models.lifecycle import ModelState
from tensorwire_server.telemetry.process import process_stats

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tensorwire_protocol.messages import End, PackedResult, Request

    from tensorwire_server.gateway.gateway import Gateway
    from tensorwire_server.gateway.session import Session
    from tensorwire_server.routing.replica import Replica

_WORKER_PATIENCE_S = 2.0
_KEY_BYTES = 16


def answer_report(gateway: Gateway, session: Session, request: Request) -> None:
    """Answer one of the three; `stats` waits for the workers' numbers.

    Raises:
        BadMeta: there is nothing to be put in.
    """
    if not request.inputs.is_empty:
        raise BadMeta(f"{request.op} takes no inputs")

    def answer(extra: dict[str, Any]) -> None:
        if session.transport.connection.is_open(request.stream):
            session.send_terminal(Result(stream=request.stream, extra=extra))

    if request.op == "models":
        answer({"models": [pool.describe() for pool in gateway.models.values()]})
    elif request.op == "health":
        answer(health(gateway))
    else:
        _Gathering(gateway, lambda workers: answer(stats(gateway, workers))).start()


def health(gateway: Gateway) -> dict[str, Any]:
    """Return if the server can serve, and how far each model is."""
    states = {pool.name: pool.state for pool in gateway.models.values()}
    if gateway.is_draining:
        status = "draining"
    elif ModelState.FAILED in states.values():
        status = "degraded"
    else:
        all_ready = not gateway.unnamed and all(s is ModelState.READY for s in states.values())
        status = "ready" if all_ready else "loading"
    return {
        "status": status,
        "uptime_s": round(gateway.now() - gateway.started_at, 3),
        "models": {
            pool.name: {"state": pool.state.value, "detail": pool.detail}
            for pool in gateway.models.values()
        },
        "awaited": {replica.name: replica.detail for replica in gateway.unnamed},
    }


def stats(gateway: Gateway, workers: dict[str, Any]) -> dict[str, Any]:
    """Return what is held right now and what was done since the start."""
    return {
        "gateway": {
            "sessions": len(gateway.sessions),
            "live_requests": gateway.admission.total,
            "live_by_model": gateway.admission.counts(),
            "journal_entries": len(gateway.journal),
            "journal_tokens": gateway.journal.num_tokens,
            "merged_bytes": gateway.merged.num_bytes,
            "detached_bytes": gateway.detached.num_bytes,
            "deadlines": len(gateway.deadlines),
            "outcomes": dict(gateway.outcomes),
            "tokens": gateway.num_tokens,
            "body_bytes": 0 if gateway.bodies is None else gateway.bodies.num_used_bytes,
            "bodies_waiting": 0 if gateway.bodies is None else gateway.bodies.num_waiting,
            "uptime_s": round(gateway.now() - gateway.started_at, 3),
            **process_stats(),
        },
        "workers": workers,
    }


class _Gathering:
    """Asks every worker for its numbers; who does not answer in time is left out."""

    def __init__(self, gateway: Gateway, done: Callable[[dict[str, Any]], None]) -> None:
        self._replicas = gateway.replicas
        self._done = done
        self._answers: dict[str, Any] = {}
        self._missing: dict[Replica, int] = {}  # and on which stream each was asked
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Ask; `done` is called exactly once, maybe before this returns."""
        self._missing = dict.fromkeys(self._replicas, 0)
        for replica in self._replicas:
            question = _Question(self, replica)
            try:
                self._missing[replica] = replica.submit(1, question)
            except TensorwireError as error:
                self.answer(replica, {"unreachable": error.message})
        if self._missing:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_WORKER_PATIENCE_S, self._finish)
        else:
            self._finish()

    def answer(self, replica: Replica, numbers: dict[str, Any]) -> None:
        """Take one worker's numbers."""
        state = {"state": replica.state.value, "in_flight": replica.num_in_flight}
        self._answers[replica.name] = state | numbers
        self._missing.pop(replica, None)
        if not self._missing and self._timer is not None:
            self._finish()

    def _finish(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for replica, stream in tuple(self._missing.items()):
            replica.abandon(stream)  # or it would count as in flight until the worker's end
            self.answer(replica, {"unreachable": "no answer in time"})
        done, self._done = self._done, _nothing
        done(self._answers)


class _Question:
    """The owner of one `stats` attempt."""

    def __init__(self, gathering: _Gathering, replica: Replica) -> None:
        self._gathering = gathering
        self._replica = replica

    def build_submit(self, stream: int) -> Submit:
        return Submit(stream=stream, op="stats", key=os.urandom(_KEY_BYTES), attempt=1)

    def on_ack(self, prompt_ids: Sequence[int] | None) -> None: ...

    def on_tokens(self, first_index: int, tokens: Sequence[int], text: str) -> None: ...

    def on_end(self, end: End) -> None:
        self._gathering.answer(self._replica, {"unreachable": end.finish.value})

    def on_result(self, result: PackedResult) -> None:
        self._gathering.answer(self._replica, opened(result.extra))

    def on_failure(self, error: TensorwireError) -> None:
        self._gathering.answer(self._replica, {"unreachable": error.message})

    def on_replica_lost(self) -> None:
        self._gathering.answer(self._replica, {"unreachable": "the worker died"})


def _nothing(_: dict[str, Any]) -> None:
    """Stand in for `done` once it was called."""
