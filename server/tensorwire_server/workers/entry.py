"""The process entry: arguments, signals, the bond to the parent, then the loop until it ends."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import errno
import ipaddress
import logging
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING

from tensorwire_server.memory.sharing import Sharing
from tensorwire_server.memory.slab import Borrowed, Slab
from tensorwire_server.workers.exits import ExitCode
from tensorwire_server.workers.host import WorkerHost
from tensorwire_server.workers.spec import WorkerSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tensorwire_protocol.transports.aio import AioTransport

_PR_SET_PDEATHSIG = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run a worker; returns its exit code."""
    args = _parse(argv)
    if args.parent is not None:
        die_with_parent(args.parent)
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    if args.fd is not None:
        # Ctrl-C in a terminal reaches the whole group; it is the server's to act on.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        try:
            code = runner.run(_serve(args))
        except OSError as error:
            sys.exit(_no_way(args, error))
        logging.shutdown()
        sys.stdout.flush()
        # Nothing is left to tidy up, and the compute thread may be inside a step: an ordinary
        # exit would wait for it, or tear torch down under it.
        os._exit(code)


def _no_way(args: argparse.Namespace, error: OSError) -> str:
    """Say in one sentence why there is no way to a gateway."""
    if args.listen is None:
        return f"error: the worker of {args.spec.model!r} has no way to its gateway: {error}"
    where = _shown(*args.listen)
    if error.errno == errno.EADDRINUSE:
        return f"error: {where} is taken; stop what uses it or give another --listen"
    return f"error: cannot listen on {where}: {error.strerror}"


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent is gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:  # it died before the call, which then never fires
        os._exit(1)


async def _serve(args: argparse.Namespace) -> int:
    loop = asyncio.get_running_loop()
    spec: WorkerSpec = args.spec
    if args.fd is not None:
        sharing = _share(*args.shm) if args.shm else None
        host = WorkerHost(spec, is_local=True, sharing=sharing)
        sock = socket.socket(fileno=args.fd)
        sock.setblocking(False)
        await loop.create_unix_connection(_transports(host), sock=sock)
    else:
        name, port = args.listen
        host = WorkerHost(spec, is_local=False, on_ready=lambda: print(ready, flush=True))
        server = await loop.create_server(_transports(host), name, port)
        bound = server.sockets[0].getsockname()
        ready = f"ready {_shown(bound[0], bound[1])} model={spec.model}"
        loop.add_signal_handler(signal.SIGINT, host.drain)
    loop.add_signal_handler(signal.SIGTERM, host.drain)
    host.start()
    code = await host.exit_code
    if args.listen is not None and code == ExitCode.FAILED:
        # A person started this one: a sentence, and the exit code of any command that failed.
        print(f"error: {host.detail}", file=sys.stderr)
        return 1
    return code


def _share(inputs: int, outputs: int) -> Sharing:
    """Return the gateway's memory for reading and this worker's own, by their descriptors."""
    borrowed = Borrowed(inputs)
    os.close(inputs)
    return Sharing(Slab(outputs), borrowed, is_gateway=False)


def _transports(host: WorkerHost) -> Callable[[], AioTransport]:
    return lambda: host.build_link().transport


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    with contextlib.suppress(ImportError):
        import uvloop

        return uvloop.new_event_loop
    return None


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tensorwire-worker", description="Serve one replica of one model to a gateway."
    )
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--fd", type=int, help="an inherited socket to the gateway")
    parser.add_argument("--shm", type=int, nargs=2, help="inherited memory: in and out")
    place.add_argument("--listen", type=parse_listen, metavar="HOST:PORT")
    parser.add_argument("--spec", type=_parse_spec, required=True, metavar="JSON")
    parser.add_argument("--parent", type=int, metavar="PID", help="end when this process ends")
    return parser.parse_args(argv)


def _parse_spec(text: str) -> WorkerSpec:
    try:
        return WorkerSpec.from_json(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_listen(text: str) -> tuple[str, int]:
    """Return host and port of `HOST:PORT`, which must be on the loopback.

    Raises:
        argparse.ArgumentTypeError: any other address, or no address at all.
    """
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise argparse.ArgumentTypeError(
            f"a worker asks nobody who they are, so it listens on a loopback address only,"
            f" not on {host!r}"
        )
    return host, int(port)
