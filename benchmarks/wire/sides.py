"""The processes of each side: a server, and a client that does jobs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from serving import serving
from wire.load import Figures, Job
from wire.rows import BARE_ECHO, BARE_GATEWAY, FASTAPI, GRPC, LIBRARY, MOSEC, OURS, PURE, RAW_C

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

BENCHMARKS = Path(__file__).parents[1]
PEERS_ENV = BENCHMARKS.parent / ".cache" / "bench-wire"
PEERS_PYTHON = PEERS_ENV / "bin" / "python"
_COMPILED = BENCHMARKS.parent / ".cache" / "compiled"
# What comes first is imported: compiled modules instead of the sources.
_PATHS = (str(_COMPILED), os.environ.get("PYTHONPATH", ""))
_COMPILED_ENV = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, _PATHS))}
_RAW_SOURCE = Path(__file__).with_name("peers") / "raw_pingpong.c"
_RAW_BINARY = PEERS_ENV / "raw_pingpong"
_PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server that answers."""

    address: str
    pids: dict[str, list[int]]  # by role


@contextmanager
def our_server(*, compiled: bool) -> Iterator[Server]:
    """Start the whole server with its two cheapest models."""
    with serving("echo:", "oracle:", env=_COMPILED_ENV if compiled else None) as served:
        gateway, *workers = family(served.pid)
        yield Server(address=served.address, pids={"gateway": [gateway], "worker": workers})


@contextmanager
def peer_server(*command: str) -> Iterator[Server]:
    """Start a server that is told its port by its last argument."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [*command, str(port)],
        cwd=BENCHMARKS,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_until_answers(process, port)
        pids = family(process.pid)
        yield Server(address=f"127.0.0.1:{port}", pids={"server": pids})
    finally:
        _stop(process)


def _wait_until_answers(process: subprocess.Popen[bytes], port: int) -> None:
    give_up_at = time.monotonic() + _PATIENCE_S
    while True:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
        except OSError:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.05)
        else:
            time.sleep(0.5)  # mosec's front answers before its worker has come
            return


def _stop(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, 15)
    try:
        process.wait(5.0)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()


def family(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(member for child in children for member in family(int(child)))]


class Client:
    """A process that does jobs."""

    def __init__(self, server: Server, *command: str, compiled: bool) -> None:
        self._server = server
        self._process = subprocess.Popen(
            [*command, server.address],
            cwd=BENCHMARKS,
            env=_COMPILED_ENV if compiled else None,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def do(self, job: Job) -> Figures:
        """Do a job; everybody else rests meanwhile."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(replace(job, watch=self._server.pids))) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self._process.args!r} died of {job}")
        return Figures(**json.loads(answer))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


_peer = partial(partial, peer_server, str(PEERS_PYTHON), "-m")
# Side: its server (sides may share one) and its client.
_SERVERS: dict[str, Callable[[], AbstractContextManager[Server]]] = {
    "ours": partial(our_server, compiled=True),
    "ours, pure": partial(our_server, compiled=False),
    "grpc": _peer("wire.peers.grpc_server"),
    "fastapi": _peer("wire.peers.fastapi_server"),
    "mosec": _peer("wire.peers.mosec_server"),
    "raw": partial(peer_server, str(_RAW_BINARY), "server"),
    "library": partial(peer_server, sys.executable, "-m", "wire.library"),
    "echo": partial(peer_server, sys.executable, "-m", "wire.peers.echo_server"),
}
_HERE = (sys.executable, "-m")
_THERE = (str(PEERS_PYTHON), "-m", "wire.peers.clients")
_SIDES: dict[str, tuple[str, tuple[str, ...]]] = {
    OURS: ("ours", (*_HERE, "wire.ours")),
    PURE: ("ours, pure", (*_HERE, "wire.ours")),
    LIBRARY: ("library", (*_HERE, "wire.library", "client")),
    GRPC: ("grpc", (*_THERE, "grpc_aio")),
    FASTAPI: ("fastapi", (*_THERE, "fastapi")),
    MOSEC: ("mosec", (*_THERE, "mosec")),
    RAW_C: ("raw", (*_HERE, "wire.raw", str(_RAW_BINARY))),
    BARE_GATEWAY: ("ours", (*_HERE, "wire.bare", "gateway")),
    BARE_ECHO: ("echo", (*_HERE, "wire.bare", "echo")),
}


def prepare() -> None:
    """Build the side in C; see that everything else is there."""
    for needed in (PEERS_PYTHON, _COMPILED):
        if not needed.exists():
            raise SystemExit(f"there is no {needed}: run `make bench-wire`, which makes it")
    build = ["cc", "-O2", "-pthread", "-o", str(_RAW_BINARY), str(_RAW_SOURCE)]
    subprocess.run(build, check=True)


@contextmanager
def running(sides: set[str]) -> Iterator[dict[str, Client]]:
    """Start the clients of some sides, and the servers they need."""
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        clients: dict[str, Client] = {}
        for side in sorted(sides):
            server, command = _SIDES[side]
            if server not in servers:
                servers[server] = stack.enter_context(_SERVERS[server]())
            client = Client(servers[server], *command, compiled=side == OURS)
            clients[side] = stack.enter_context(client)
        yield clients
