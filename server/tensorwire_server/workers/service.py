"""The asyncio side of all requests of a worker, as its links and its process see it.

    SUBMIT -> intake: check, tokenize, validate, ACK -> commands, once per turn -> compute
    STEP, END, RES, ERR <- answers: detokenize, stop strings <- outcome, once per step <- compute

`registry` lies between: what is open, and the one gate through which it ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorwire_protocol.messages import Finish, Result

from tensorwire_server.telemetry.process import process_stats
from tensorwire_server.workers.answers import Answers
from tensorwire_server.workers.intake import Intake
from tensorwire_server.workers.registry import Registry

if TYPE_CHECKING:
    from tensorwire_protocol.messages import Cancel, Submit

    from tensorwire_server.memory.sharing import Sharing
    from tensorwire_server.workers.compute import Compute
    from tensorwire_server.workers.link import Link
    from tensorwire_server.workers.spec import WorkerSpec


class Service:
    """Every open request of this process, over all links."""

    def __init__(self, spec: WorkerSpec, sharing: Sharing | None = None) -> None:
        self._sharing = sharing
        self.registry = Registry(spec.model, max_requests=spec.max_requests)
        self.answers = Answers(self.registry)
        self._intake = Intake(self.registry)

    def start(self, compute: Compute) -> None:
        """Take requests from now on."""
        self.registry.compute = compute

    def fail(self, reason: str) -> None:
        """Refuse everything for good: the model could not be loaded."""
        self._intake.load_failure = reason

    @property
    def num_steps(self) -> int:
        """Steps and batches so far: as long as something runs, they must grow."""
        return self.registry.compute.num_steps if self.registry.compute else 0

    def load(self) -> dict[str, float]:
        """Return what heartbeats say of the queues."""
        loads = self.registry.compute.load() if self.registry.compute else {}
        return {"open_streams": len(self.registry.streams), **loads}

    def submit(self, link: Link, submit: Submit, now: float) -> None:
        """Take one request; `registry.flush` hands it on."""
        if submit.op == "stats":
            link.send(Result(stream=submit.stream, extra=self._stats()))
        else:
            self._intake.submit(link, submit, now)

    def cancel(self, link: Link, cancel: Cancel) -> None:
        """End a stream at once, with what it has."""
        stream = link.streams.get(cancel.stream)
        if stream is not None:
            is_late = cancel.reason == Finish.DEADLINE.value
            self.registry.cut(stream, Finish.DEADLINE if is_late else Finish.CANCELLED)

    def _stats(self) -> dict[str, Any]:
        shared_bytes = 0 if self._sharing is None else self._sharing.num_used_bytes
        numbers = {"steps": self.num_steps, "shared_bytes": shared_bytes}
        return {**numbers, **self.load(), **process_stats()}
