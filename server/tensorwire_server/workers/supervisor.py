"""Keeps one worker process alive: spawn by exec, watch, restart with backoff, stop for certain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tensorwire_server.memory.sharing import Sharing
from tensorwire_server.memory.slab import Borrowed, make_shared
from tensorwire_server.workers.backoff import RestartPolicy
from tensorwire_server.workers.exits import ExitCode

if TYPE_CHECKING:
    from collections.abc import Callable

    from tensorwire_server.memory.slab import Slab
    from tensorwire_server.workers.spec import WorkerSpec

log = logging.getLogger(__name__)

_STDERR = 2
_SEND_BUFFER_BYTES = 2 * 1024 * 1024  # a mebibyte in one go, however the kernel counts
_OURS = "TENSORWIRE_"  # the server's settings and tokens are none of a worker's business


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerExit:
    """How a worker process ended, and what comes next."""

    code: int  # below 0: minus the signal that killed it
    restart_in_s: float | None  # None: it stays down
    is_failure: bool  # False: it was stopped, or drained


class WorkerProcess:
    """One replica's process over all its lives.

    Args:
        on_socket: gets this side of the link of each new process, non-blocking and connected, and
            the memory in common with it; the owner closes the link, which ends the process.
        on_exit: is told of each end.
        slab: where what is sent to the process lies, to be read there; None: no shared memory.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        on_socket: Callable[[socket.socket, Sharing | None], None],
        on_exit: Callable[[WorkerExit], None],
        slab: Slab | None = None,
    ) -> None:
        self.spec = spec
        self._on_socket = on_socket
        self._on_exit = on_exit
        self._slab = slab
        self._policy = RestartPolicy()
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_stopping = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """The process that lives now, or None."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Begin to keep a process alive. Call it on the main thread's loop: the kernel ends a
        worker with the *thread* that spawned it."""
        assert self._task is None
        self._task = asyncio.create_task(self._keep_alive(), name=f"worker {self.spec.model}")

    def kill(self) -> None:
        """End the process that lives now; it is restarted like any that died."""
        self._signal(signal.SIGKILL)

    async def stop(self, grace_s: float) -> None:
        """Stop for good: SIGTERM, which drains, and after `grace_s` SIGKILL."""
        self._is_stopping.set()
        if self._task is None:
            return
        self._signal(signal.SIGTERM if grace_s > 0 else signal.SIGKILL)
        _, running = await asyncio.wait([self._task], timeout=grace_s)
        if running:
            self._signal(signal.SIGKILL)
        await self._task

    async def _keep_alive(self) -> None:
        while not self._is_stopping.is_set():
            born_at = time.monotonic()
            code = await self._live_once()
            end = self._judge(code, time.monotonic() - born_at)
            self._on_exit(end)
            if end.restart_in_s is None:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_stopping.wait(), end.restart_in_s)

    async def _live_once(self) -> int:
        """Spawn a process and wait for its end; return its exit code."""
        ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        # New for each process: what a dead one has left cannot reach the next.
        answers = None if self._slab is None else make_shared(self._slab.size)
        try:
            self._process = await self._spawn(theirs, answers)
            sharing = self._share(answers)
        except OSError as error:
            log.error("worker_not_spawned model=%s error=%s", self.spec.model, error)
            ours.close()
            return ExitCode.LOST
        finally:
            theirs.close()
            if answers is not None:
                os.close(answers)
        if self._is_stopping.is_set():
            self._signal(signal.SIGKILL)
        ours.setblocking(False)
        try:
            self._on_socket(ours, sharing)
            return await self._process.wait()
        finally:
            self._signal(signal.SIGKILL)  # a no-op unless this task was cancelled
            self._process = None

    def _share(self, answers: int | None) -> Sharing | None:
        if self._slab is None or answers is None:
            return None
        return Sharing(self._slab, Borrowed(answers), is_gateway=True)

    async def _spawn(
        self, theirs: socket.socket, answers: int | None
    ) -> asyncio.subprocess.Process:
        memory = () if self._slab is None or answers is None else (self._slab.fd, answers)
        return await asyncio.create_subprocess_exec(
            sys.executable,
            # -P: nothing in the current folder is imported in place of an installed module.
            *("-P", "-X", "faulthandler", "-m", "tensorwire_server.workers"),
            *("--fd", str(theirs.fileno()), "--parent", str(os.getpid())),
            *("--spec", self.spec.to_json()),
            *(("--shm", *map(str, memory)) if memory else ()),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=_STDERR,
            env=self._environment(),
            pass_fds=(theirs.fileno(), *memory),
        )

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
        threads = str(self.spec.threads)
        return kept | {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",  # one text at a time, on a thread of its own
        }

    def _judge(self, code: int, lived_s: float) -> WorkerExit:
        model = self.spec.model
        if self._is_stopping.is_set() or code == ExitCode.DRAINED:
            return WorkerExit(code=code, restart_in_s=None, is_failure=False)
        if code in (ExitCode.FAILED, ExitCode.USAGE):
            log.error("worker_failed model=%s exit=%d", model, code)
            return WorkerExit(code=code, restart_in_s=None, is_failure=True)
        backoff_s = self._policy.after_death(time.monotonic(), lived_s=lived_s)
        log.warning("worker_restarted model=%s exit=%d backoff_s=%.1f", model, code, backoff_s)
        if self._policy.is_breaker_open:
            log.warning("worker_breaker_open model=%s backoff_s=%.1f", model, backoff_s)
        return WorkerExit(code=code, restart_in_s=backoff_s, is_failure=True)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
