"""`make test-compiled` tests the compiled form: nothing of it may be the pure one by mistake."""

from __future__ import annotations

import importlib
import os
import tomllib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from .serving import Command, RunningServer, wait_until

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
LIBRARY = f"tensorwire__mypyc{EXTENSION_SUFFIXES[0]}"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "TENSORWIRE_TEST_COMPILED" not in os.environ, reason="only in `make test-compiled`"
    ),
]


def compiled_modules() -> list[str]:
    """Return the names of the list that the build reads."""
    wheel = tomllib.loads(PYPROJECT.read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    names: list[str] = wheel["hooks"]["custom"]["modules"]
    return names


def runs_compiled(pid: int) -> bool:
    """Say if a process has mapped the library with the code of all compiled modules."""
    return LIBRARY in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize("name", compiled_modules())
def test_the_module_is_loaded_from_its_extension(name: str) -> None:
    file = importlib.import_module(name).__file__
    assert file is not None
    assert file.endswith(EXTENSION_SUFFIXES[0])


def test_gateway_worker_and_the_load_testers_processes_run_compiled(server: RunningServer) -> None:
    for pid in (server.pid, *server.worker_pids().values()):
        assert runs_compiled(pid)
    words = ("--task", "infer:echo[4]", "--duration", "60s")
    with Command("bench", "--address", server.address, *words) as bench:
        (child, *_) = wait_until(bench.children, "a process that sends")
        wait_until(lambda: runs_compiled(child), "compiled modules in it")
