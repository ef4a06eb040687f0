"""Real commands in process groups of their own, what they hold, and conditions to wait for."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tensorwire
from tensorwire_server.workers.oracle import oracle_text, oracle_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self

    from tensorwire import Generation

T = TypeVar("T")

START_S = 30.0  # for a process to say that it is ready, on a machine that is busy
PATIENCE_S = 10.0  # for everything else
_POLL_S = 0.01

# What must be exactly as before once everything has ended.
_GATEWAY_HELD = (
    "sessions", "live_requests", "live_by_model", "journal_entries", "journal_tokens",
    "deadlines", "asyncio_tasks", "fds", "threads", "body_bytes", "bodies_waiting",
)  # fmt: skip
_WORKER_HELD = (
    "in_flight", "open_streams", "waiting", "running", "pages_used", "kv_sequences", "kv_tokens",
    "asyncio_tasks", "fds", "threads", "pid", "shared_bytes",
)  # fmt: skip


def wait_until(condition: Callable[[], T], what: str, within_s: float = PATIENCE_S) -> T:
    """Return the first true value of `condition`; fail, naming `what`, if none comes in time."""
    deadline = time.monotonic() + within_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        time.sleep(_POLL_S)


def free_port() -> int:
    """Return a port that was free just now, for tests that must know it before the server does."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def is_alive(pid: int) -> bool:
    """Say if a process runs; one that only nobody has waited for does not."""
    with contextlib.suppress(OSError):
        return _stat_fields(pid)[0] != "Z"
    return False


def _stat_fields(pid: int) -> list[str]:
    """Return state, parent, … of a process, as /proc/PID/stat has them behind the name."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


class Command:
    """`tensorwire …` in a process group of its own, which ends with the `with` block."""

    def __init__(self, *arguments: str, environ: Mapping[str, str] | None = None) -> None:
        self._out, self._err = (tempfile.NamedTemporaryFile() for _ in range(2))  # noqa: SIM115
        kept = {k: v for k, v in os.environ.items() if not k.startswith("TENSORWIRE_")}
        self.started_at = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tensorwire", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            env=kept | dict(environ or {}),
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stdout(self) -> str:
        return Path(self._out.name).read_text()

    @property
    def stderr(self) -> str:
        return Path(self._err.name).read_text()

    def wait_ready(self, within_s: float = START_S) -> list[str]:
        """Return the words of the line that begins with `ready`."""

        def words() -> list[str]:
            assert self.process.poll() is None, f"it ended instead:\n{self.stderr}"
            lines = [line.split() for line in self.stdout.splitlines(keepends=True)]
            return next((line for line in lines if line[:1] == ["ready"]), [])

        return wait_until(words, "the ready line", within_s)

    def wait(self, within_s: float = PATIENCE_S) -> int:
        """Return the exit code."""
        return self.process.wait(within_s)

    def cpu_s(self) -> float:
        """Return the processor's time that the process has used since its start."""
        fields = _stat_fields(self.pid)
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def children(self) -> list[int]:
        """Return the processes that it has started and that are alive."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                state, parent, *_ = _stat_fields(int(entry.name))
                if int(parent) == self.pid and state != "Z":
                    found.append(int(entry.name))
        return sorted(found)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait(PATIENCE_S)
        for file in (self._out, self._err):
            file.close()


class RunningServer(Command):
    """`tensorwire serve …` on a free port."""

    def __init__(
        self, *arguments: str, port: int = 0, environ: Mapping[str, str] | None = None
    ) -> None:
        super().__init__("serve", *arguments, "--port", str(port), environ=environ)
        self.address = f"127.0.0.1:{port}"
        self._watcher: tensorwire.Client | None = None

    def ready(self, within_s: float = START_S) -> Self:
        """Wait until every model has computed."""
        self.address = self.wait_ready(within_s)[1]
        return self

    def client(self, timeout: float = 30.0) -> tensorwire.Client:
        """Return a client of its own, for a `with` block."""
        return tensorwire.Client(self.address, timeout=timeout)

    @property
    def watcher(self) -> tensorwire.Client:
        """A client that stays connected, so that it is part of every baseline."""
        if self._watcher is None:
            self._watcher = self.client(PATIENCE_S)
        return self._watcher

    def stats(self) -> dict[str, Any]:
        """Return what `stats` says."""
        return self.watcher.stats()

    def held(self) -> dict[str, dict[str, Any]]:
        """Return only what must be the same whenever nothing runs."""
        stats = self.stats()
        held = {name: _only(counts, _WORKER_HELD) for name, counts in stats["workers"].items()}
        return {"gateway": _only(stats["gateway"], _GATEWAY_HELD), **held}

    def assert_back_at(self, baseline: dict[str, dict[str, Any]]) -> None:
        """Fail unless everything is released, soon and exactly."""
        deadline = time.monotonic() + PATIENCE_S
        while (held := self.held()) != baseline and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        assert held == baseline

    def worker_pids(self) -> dict[str, int]:
        """Return the process of each replica."""
        return {name: counts["pid"] for name, counts in self.stats()["workers"].items()}

    def terminate(self, within_s: float = PATIENCE_S) -> int:
        """Send SIGTERM; return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait(within_s)

    def __exit__(self, *details: object) -> None:
        if self._watcher is not None:
            self._watcher.close()
        super().__exit__(*details)


def _only(counts: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: counts[name] for name in names if name in counts}


def expected(prompt: str, seed: int, count: int) -> list[int]:
    """Return the tokens that the oracle must make of a prompt."""
    return oracle_tokens(list(prompt.encode()), seed, count)


def assert_oracle(generation: Generation, prompt: str, seed: int, count: int) -> None:
    """Fail unless a generation is what the oracle makes, all of it and nothing else."""
    assert generation.token_ids == expected(prompt, seed, count)
    assert generation.text == oracle_text(generation.token_ids)
    assert generation.finish_reason == "length"
    assert generation.usage.completion_tokens == count
    assert generation.usage.prompt_tokens == len(prompt.encode())
