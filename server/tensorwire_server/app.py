"""The composition root: from a configuration to a running server. The only file that knows all."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorwire_protocol.limits import CLIENT_LINK
from tensorwire_protocol.transports.polling import BusyPoll

from tensorwire_server import __version__
from tensorwire_server.config import parse_bytes
from tensorwire_server.gateway.auth import load_credentials
from tensorwire_server.gateway.gateway import Gateway
from tensorwire_server.gateway.listener import Listener, bind, is_loopback
from tensorwire_server.gateway.tls import load_tls
from tensorwire_server.memory.intake import IntakeMemory
from tensorwire_server.memory.slab import Slab, make_shared
from tensorwire_server.models.lifecycle import ModelState
from tensorwire_server.models.spec import SpecError, parse_spec
from tensorwire_server.routing.pool import ModelPool
from tensorwire_server.routing.remote import keep_connected, parse_address
from tensorwire_server.routing.replica import Replica
from tensorwire_server.telemetry.process import raise_descriptor_limit, settle_garbage_collector
from tensorwire_server.workers.spec import WorkerSpec
from tensorwire_server.workers.supervisor import WorkerProcess

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Coroutine, Iterable

    from tensorwire_server.config import Config
    from tensorwire_server.memory.sharing import Sharing
    from tensorwire_server.models.spec import ModelSpec
    from tensorwire_server.workers.supervisor import WorkerExit

log = logging.getLogger(__name__)

SOFTWARE = f"tensorwire/{__version__}"
_WORKER_STOP_S = 5.0
_OTHER_DESCRIPTORS = 1024  # workers, the loop, and connections that are being closed


class StartError(RuntimeError):
    """The server could not start; the message is one sentence for a person."""


class Server:
    """Gateway, workers and links of one machine.

    Args:
        specs: the models to load here; may be empty if there are remote workers.
        on_change: called with the server whenever a model's state or progress has changed.

    Raises:
        ListenError, SpecError, RemoteAddressError, CredentialsError, TlsError: at construction,
            before anything is started.
    """

    def __init__(
        self,
        config: Config,
        specs: Iterable[ModelSpec],
        *,
        on_change: Callable[[Server], None] = lambda server: None,
    ) -> None:
        self.config = config
        self.pools: dict[str, ModelPool] = {}
        self._specs = list(specs)
        self._remotes = [parse_address(address) for address in config.workers.remote]
        self._unnamed: list[Replica] = []  # remote ones that have not said which model they hold
        self._workers: list[WorkerProcess] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._on_change = on_change
        self._loaded = asyncio.Event()  # every model has computed, or one can not
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        file = config.auth.file
        self._credentials = None if file is None else load_credentials(Path(file))
        self._tls = load_tls(config.tls)
        self._slab = Slab(make_shared(config.bodies.memory_bytes))
        self._sock = bind(config.listen, has_auth=self._credentials is not None)

    @property
    def address(self) -> str:
        """Where clients connect, as HOST:PORT."""
        return self._listener.address

    # -- life ---------------------------------------------------------------------------------

    async def run(self, on_ready: Callable[[Server], None]) -> None:
        """Serve until SIGTERM or SIGINT, then drain.

        Raises:
            StartError: a model cannot be loaded.
        """
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self.stop)
        self._poll = BusyPoll(loop, self.config.listen.busy_poll_us / 1e6)
        self._gateway = Gateway(
            self.config.admission,
            replace(
                CLIENT_LINK,
                message_bytes=self.config.bodies.message_bytes,
                client_meta_bytes=self.config.admission.meta_bytes,
            ),
            self.pools,
            SOFTWARE,
            outcomes=self.config.outcomes,
            unnamed=self._unnamed,
            credentials=self._credentials,
            bodies=IntakeMemory(self._slab),
            poll=self._poll,
        )
        if self._tls is None and not is_loopback(self.config.listen.host):
            log.warning("listening_in_plain host=%s", self.config.listen.host)
        self._allow_descriptors()
        self._listener = Listener(self._gateway, self._sock, self.config.listen, self._tls)
        await self._listener.start()
        self._spawn(self._gateway.run_timers())
        try:
            self._start_workers()
            if await self._wait_until_loaded():
                settle_garbage_collector()
                on_ready(self)
                await self._stop.wait()
            await self._drain()
        finally:
            await self._end()

    def _allow_descriptors(self) -> None:
        # Shells allow 1,024 by default, which would be the real bound on connections.
        wanted = self.config.listen.max_connections + _OTHER_DESCRIPTORS
        allowed = raise_descriptor_limit(wanted)
        if 0 <= allowed < wanted:
            log.warning("descriptors_are_few allowed=%d wanted=%d", allowed, wanted)

    def stop(self) -> None:
        """Begin to drain; called again, hurry."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def _wait_until_loaded(self) -> bool:
        """Wait for every model; False if the server was stopped before."""
        waits = {asyncio.ensure_future(e.wait()) for e in (self._loaded, self._stop)}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        for pool in self.pools.values():
            if pool.state is ModelState.FAILED:
                raise StartError(f"model {pool.name!r} could not be loaded: {pool.detail}")
        return not self._stop.is_set()

    async def _drain(self) -> None:
        self._listener.close()
        log.info("drain_started grace_s=%.1f", self.config.listen.drain_s)
        cut = await self._gateway.drain(self.config.listen.drain_s, self._hurry)
        if cut:
            log.error("drain_cut requests=%d", cut)

    async def _end(self) -> None:
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        stopping = asyncio.gather(*(worker.stop(_WORKER_STOP_S) for worker in self._workers))
        hurried = asyncio.ensure_future(self._hurry.wait())
        waits: set[asyncio.Future[Any]] = {stopping, hurried}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not stopping.done():
            for worker in self._workers:
                worker.kill()
        await stopping

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_log_crash)

    # -- workers ------------------------------------------------------------------------------

    def _start_workers(self) -> None:
        counts = {spec.name: self._num_replicas(spec.name) for spec in self._specs}
        threads = max(1, len(os.sched_getaffinity(0)) // max(1, sum(counts.values())))
        for spec in self._specs:
            pool = self.pools[spec.name] = ModelPool(spec.name)
            for i in range(counts[spec.name]):
                self._start_local(spec, pool, i, threads)
        for host, port in self._remotes:
            replica = Replica(f"{host}:{port}", on_change=self._on_replica_change, poll=self._poll)
            self._unnamed.append(replica)
            self._spawn(keep_connected(replica, host, port))

    def _num_replicas(self, name: str) -> int:
        own = self.config.models.get(name)
        return (own.workers if own else None) or self.config.workers.count

    def _start_local(self, spec: ModelSpec, pool: ModelPool, index: int, threads: int) -> None:
        replica = Replica(
            f"{spec.name}/{index}",
            on_change=self._on_replica_change,
            model=spec.name,
            poll=self._poll,
        )
        pool.replicas.append(replica)
        own = self.config.models.get(spec.name)
        batching, workers = self.config.batching, self.config.workers
        kv_memory = (own.kv_memory if own else None) or workers.kv_memory
        num_local = sum(self._num_replicas(spec.name) for spec in self._specs)
        worker = WorkerProcess(
            WorkerSpec(
                model=spec.name,
                source=spec.source,
                device=workers.device,
                threads=(own.threads if own else None) or workers.threads or threads,
                backend=(own.backend if own else None) or workers.backend,
                quantize=(own.quantize if own else None) or workers.quantize,
                max_running=batching.max_running,
                step_tokens=batching.step_tokens,
                max_waiting=batching.max_waiting,
                max_items=batching.max_items,
                max_batch_tokens=batching.max_batch_tokens,
                max_wait_ms=batching.max_wait_ms,
                max_slowdown=batching.max_slowdown,
                share_prefixes=batching.share_prefixes,
                busy_poll_us=self.config.listen.busy_poll_us,
                kv_bytes=parse_bytes(kv_memory, "kv_memory"),
                kv_share=1 / num_local,
            ),
            on_socket=lambda *link: self._connect_local(replica, worker, *link),
            on_exit=lambda end: self._on_worker_exit(replica, end),
            slab=self._slab,
        )
        self._workers.append(worker)
        worker.start()

    def _connect_local(
        self,
        replica: Replica,
        worker: WorkerProcess,
        sock: socket.socket,
        sharing: Sharing | None,
    ) -> None:
        def link_lost() -> None:
            # A worker that lives ends by itself when its link does. One that hangs would neither
            # answer nor end, and its place would stay empty.
            if not self._stop.is_set():
                worker.kill()

        async def connect() -> None:
            loop = asyncio.get_running_loop()
            build = partial(replica.build_transport, link_lost, sharing)
            await loop.create_unix_connection(build, sock=sock)

        self._spawn(connect())

    def _on_worker_exit(self, replica: Replica, end: WorkerExit) -> None:
        if end.is_failure and end.restart_in_s is None and not replica.is_permanently_failed:
            replica.fail(f"its worker ended with exit code {end.code} before it could say why")

    def _on_replica_change(self, replica: Replica) -> None:
        pool = self._pool_of(replica)
        if pool is not None:
            self._gateway.on_replica_change(replica, pool)
        if self._stop.is_set():
            return  # workers that end now are meant to
        self._on_change(self)
        states = [pool.state for pool in self.pools.values()]
        all_ready = not self._unnamed and all(state is ModelState.READY for state in states)
        if all_ready or ModelState.FAILED in states:
            self._loaded.set()

    def _pool_of(self, replica: Replica) -> ModelPool | None:
        """Return the replica's pool; a remote one says which model it holds once it is ready."""
        for pool in self.pools.values():
            if replica in pool.replicas:
                return pool
        name = replica.model
        if name is None:
            return None
        self._unnamed.remove(replica)
        pool = self.pools.setdefault(name, ModelPool(name))
        pool.replicas.append(replica)
        return pool


def build_specs(sources: Iterable[str], config: Config) -> list[ModelSpec]:
    """Return what to serve: what the command names, what the file names, else the default.

    Raises:
        SpecError: a name twice, or a source that cannot be served.
    """
    specs = [parse_spec(source) for source in sources]
    named = {spec.name for spec in specs}
    specs += [
        parse_spec(f"{name}={own.source}")
        for name, own in config.models.items()
        if own.source and name not in named
    ]
    for name, own in config.models.items():
        if not own.source and name not in named:
            raise SpecError(f"models.{name} is configured, but nothing is served by that name")
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise SpecError(f"two models would be called {name!r}; name one with --model NAME=…")
    return specs


def _log_crash(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("task_crashed", exc_info=task.exception())
