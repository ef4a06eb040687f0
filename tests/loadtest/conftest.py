"""One server for the tests that leave it as it was, and the load tester as a command."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from system.serving import Command, RunningServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Bench = Callable[..., "Ran"]

BENCH_S = 60.0


@dataclass(frozen=True, slots=True)
class Ran:
    """What a command came to."""

    exit_code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """What `--json` printed."""
        found: dict[str, Any] = json.loads(self.out)
        return found


@pytest.fixture(scope="session")
def oracle_server() -> Iterator[RunningServer]:
    """The oracle as fast as it goes, and echo."""
    with RunningServer("oracle:", "echo:") as server:
        yield server.ready()


@pytest.fixture
def bench(oracle_server: RunningServer, tmp_path: Path) -> Bench:
    """Run `tensorwire bench` to its end; the server is `oracle_server` unless said otherwise."""

    def run(*words: str, address: str = oracle_server.address) -> Ran:
        environ = {"TENSORWIRE_ADDRESS": address}
        with Command("bench", *words, environ=environ) as command:
            exit_code = command.wait(BENCH_S)
            return Ran(exit_code, command.stdout, command.stderr)

    return run


def number(result: dict[str, Any], name: str, group: str = "load") -> int:
    """Return one of a result's counts; 0 if it was never counted."""
    counts: dict[str, int] = result["groups"][group]["counts"]
    return counts.get(name, 0)
