"""The server's sub-commands: `tensorwire serve`, `tensorwire worker` and `tensorwire token`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tensorwire_server.config import (
    Config,
    ConfigError,
    WorkersConfig,
    load_config,
    parse_bytes,
)
from tensorwire_server.gateway.auth import CredentialsError, add_credential
from tensorwire_server.gateway.listener import ListenError
from tensorwire_server.gateway.tls import TlsError
from tensorwire_server.models.lifecycle import ModelState
from tensorwire_server.models.spec import DEFAULT_MODEL, SpecError
from tensorwire_server.routing.remote import RemoteAddressError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from tensorwire_server.app import Server

FAILED, WRONG_USAGE = 1, 2

_Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL]…", help="Folders, hub names, or the built-in 'demo' and 'minilm'."
    ),
]
_Named = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="NAME=PATH", help="Serve PATH under another name."),
]
_Host = Annotated[str | None, typer.Option(help="Address to listen on (127.0.0.1).")]
_Port = Annotated[int | None, typer.Option(help="Port to listen on (8947); 0: any free one.")]
_Workers = Annotated[int | None, typer.Option(help="Worker processes per model (1).")]
_Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda (auto).")]
_Backend = Annotated[
    str | None, typer.Option(help="auto, any or fused: what runs the models (auto).")
]
_Quantize = Annotated[
    str | None, typer.Option(help="none or int8: in which numbers products are computed (none).")
]
_KVMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for each worker's keys and values, like 2GiB (half of what is free).",
    ),
]
_Remote = Annotated[
    list[str] | None, typer.Option(metavar="HOST:PORT", help="A worker that runs elsewhere.")
]
_AuthFile = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Serve only who has a token in FILE (`tensorwire token`)."),
]
_TlsCert = Annotated[
    str | None, typer.Option(metavar="FILE", help="Speak TLS 1.3 with this PEM certificate.")
]
_TlsKey = Annotated[str | None, typer.Option(metavar="FILE", help="The certificate's key, PEM.")]
_File = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="A TOML file.")]
_Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting, for example listen.drain_s=5."),
]


def serve(
    models: _Models = None,
    model: _Named = None,
    host: _Host = None,
    port: _Port = None,
    workers: _Workers = None,
    device: _Device = None,
    backend: _Backend = None,
    quantize: _Quantize = None,
    kv_memory: _KVMemory = None,
    remote: _Remote = None,
    auth_file: _AuthFile = None,
    tls_cert: _TlsCert = None,
    tls_key: _TlsKey = None,
    config: _File = None,
    set_: _Set = None,
) -> None:
    """Serve models; without arguments the built-in 'demo'. Ends on SIGTERM or Ctrl-C."""
    flags = {
        "listen.host": host,
        "listen.port": port,
        "workers.count": workers,
        "workers.device": device,
        "workers.backend": backend,
        "workers.quantize": quantize,
        "workers.kv_memory": kv_memory,
        "workers.remote": ",".join(remote) if remote else None,
        "auth.file": auth_file,
        "tls.cert": tls_cert,
        "tls.key": tls_key,
    }
    settings = [f"{key}={value}" for key, value in flags.items() if value is not None]
    try:
        tree = load_config(config, os.environ, [*(set_ or []), *settings])
        sources = [*(models or []), *(model or [])]
        if not sources and not tree.models and not tree.workers.remote:
            sources = [DEFAULT_MODEL]
    except ConfigError as error:
        _exit(str(error), WRONG_USAGE)
    _log_to_stderr()
    # The composition root brings uvloop and the whole server: only now, not for --help.
    run_server(tree, sources)


def run_server(config: Config, sources: list[str]) -> None:
    """Run a server to its end; exits with a sentence if it cannot start."""
    from tensorwire_server.app import Server, StartError, build_specs

    async def main() -> None:
        progress = Progress()
        server = Server(config, build_specs(sources, config), on_change=progress.update)
        with progress:
            await server.run(progress.ready)

    try:
        _run(main())
    except (SpecError, RemoteAddressError, CredentialsError, TlsError) as error:
        _exit(str(error), WRONG_USAGE)
    except (ListenError, StartError) as error:
        _exit(str(error), FAILED)


class Progress:
    """Shows how far loading is: a live line on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._shown: dict[str, str] = {}
        self._status: object = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            # rich costs memory for the life of the process; only a terminal gets it.
            from rich.console import Console

            self._status = Console(stderr=True).status("starting")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        status, self._status = self._status, None
        if status is not None:
            status.stop()  # type: ignore[attr-defined]

    def update(self, server: Server) -> None:
        """Show what has changed."""
        now = {name: pool.detail or pool.state.value for name, pool in server.pools.items()}
        if self._status is not None:
            text = "  ".join(f"{name}: {detail}" for name, detail in now.items())
            self._status.update(text)  # type: ignore[attr-defined]
            return
        for name, detail in now.items():
            # Why a model failed is told once, when the server ends with it.
            is_failed = server.pools[name].state is ModelState.FAILED
            if self._shown.get(name) != detail and not is_failed:
                logging.getLogger(__name__).info("model_progress model=%s state=%s", name, detail)
        self._shown = now

    def ready(self, server: Server) -> None:
        """Say that every model has computed; scripts wait for this line."""
        self._end()
        print(f"ready {server.address} models={','.join(server.pools)}", flush=True)


def worker(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What to serve, as in `serve`.")],
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where the gateway connects.")
    ] = "127.0.0.1:8948",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Compute threads (all cores).")] = None,
    backend: Annotated[str, typer.Option(help="auto, any or fused.")] = "auto",
    quantize: Annotated[str, typer.Option(help="none or int8.")] = "none",
    kv_memory: _KVMemory = None,
    busy_poll_us: Annotated[
        int, typer.Option(min=0, max=10_000, help="As listen.busy_poll_us of `serve`.")
    ] = 80,
) -> None:
    """Run one worker for a gateway elsewhere, which names it with `serve --remote`."""
    from tensorwire_server.models.spec import parse_spec
    from tensorwire_server.workers.entry import parse_listen
    from tensorwire_server.workers.spec import WorkerSpec

    try:
        spec = parse_spec(model)
        parse_listen(listen)
        # The rules of `serve` hold here too.
        WorkersConfig(
            device=device, threads=threads, backend=backend, quantize=quantize, kv_memory=kv_memory
        )
    except (SpecError, ConfigError, argparse.ArgumentTypeError) as error:
        _exit(str(error), WRONG_USAGE)
    if threads is None:
        threads = len(os.sched_getaffinity(0))
    worker_spec = WorkerSpec(
        model=spec.name,
        source=spec.source,
        device=device,
        threads=threads,
        backend=backend,
        quantize=quantize,
        kv_bytes=parse_bytes(kv_memory, "--kv-memory"),
        busy_poll_us=busy_poll_us,
    )
    # Threads are read from the environment when torch is loaded: a fresh process, as everywhere.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    arguments = ["--spec", worker_spec.to_json(), "--listen", listen]
    os.execv(sys.executable, [sys.executable, "-m", "tensorwire_server.workers", *arguments])


token = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    help="Make the tokens with which clients log in.",
)


@token.callback()
def _token() -> None: ...


@token.command("new")
def token_new(
    name: Annotated[str, typer.Option(metavar="NAME", help="Whose it is, for your eyes.")],
    file: Annotated[Path, typer.Option(metavar="FILE", help="Where `serve --auth-file` looks.")],
    rights: Annotated[
        str, typer.Option(metavar="LIST", help="Of infer, admin, upload, with commas.")
    ] = "infer",
) -> None:
    """Print a new token, once; FILE gets its hashes. A server that runs must be started anew."""
    try:
        made = add_credential(file, name, [right.strip() for right in rights.split(",")])
    except CredentialsError as error:
        _exit(str(error), WRONG_USAGE)
    print(made)


def _run(main: Coroutine[None, None, None]) -> None:
    runner: Callable[[Coroutine[None, None, None]], None]
    try:
        import uvloop
    except ImportError:
        runner = asyncio.run
    else:
        runner = uvloop.run
    runner(main)


def _log_to_stderr() -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )


def _exit(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(code)
