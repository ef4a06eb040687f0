"""Starts a real server for a benchmark, as a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_STOP_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A server that has said `ready`."""

    address: str
    ready_after_s: float
    pid: int  # the gateway's; the workers are its children


@contextmanager
def serving(*models: str, env: Mapping[str, str] | None = None) -> Iterator[Served]:
    """Serve models on a free port; the server is stopped at the end."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "tensorwire", "serve", *models, "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    )
    try:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        if not words:
            raise RuntimeError("the server did not start; run it by hand to see why")
        ready_after_s = time.perf_counter() - began
        yield Served(address=words[1], ready_after_s=ready_after_s, pid=process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(_STOP_S)
