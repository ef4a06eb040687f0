"""Servers as real processes: one that quiet tests share, and fresh ones for those that break it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, TypeVar

import models_zoo
import pytest
import torch

from .serving import Command, RunningServer
from .strangers import Innocent

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

C = TypeVar("C", bound=Command)
# References are computed here while servers compute: two threads on cores that are busy take forty
# times as long as one (measured).
torch.set_num_threads(1)

MODELS_LOAD_S = 120.0  # seven processes import torch at once
_alive: list[Command] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a failure what the processes had to say."""
    report = yield
    if report.failed:
        for command in _alive:
            arguments = " ".join(map(str, command.process.args[3:]))  # type: ignore[index]
            report.sections.append((f"stderr of `tensorwire {arguments}`", command.stderr))
    return report


@pytest.fixture
def launch() -> Iterator[Callable[..., Command]]:
    """Start `tensorwire` with the given words; ends all of them after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *words: _enter(stack, Command(*words))


@pytest.fixture
def serve() -> Iterator[Callable[..., RunningServer]]:
    """Start `tensorwire serve` with the given words; ends all of them after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *words, **options: _enter(stack, RunningServer(*words, **options))


@pytest.fixture(scope="session")
def quiet_server() -> Iterator[RunningServer]:
    """A text model and an array model, for tests that leave the server as it was."""
    with contextlib.ExitStack() as stack:
        server = _enter(stack, RunningServer("oracle:step_ms=2", "echo:"))
        yield server.ready()


@pytest.fixture
def server(quiet_server: RunningServer) -> Iterator[RunningServer]:
    """The shared server; whatever a test took must be given back, to the last descriptor."""
    # What exists once it was first needed is part of the baseline: a tokenizer's thread.
    quiet_server.watcher.tokenize("oracle", "x" * 1000)
    quiet_server.watcher.tokenize("echo", "x" * 1000)
    baseline = quiet_server.held()
    yield quiet_server
    quiet_server.assert_back_at(baseline)


@pytest.fixture(scope="session")
def real_models() -> Iterator[RunningServer]:
    """`demo`, `minilm` and a tiny model of each family, for tests that compare answers."""
    named = [f"--model={name}={models_zoo.tiny_model(name)}" for name in models_zoo.FAMILIES]
    # One thread each, as a server with so many models on so few cores would choose.
    words = ("demo", "minilm", *named, "--set", "workers.threads=1")
    with contextlib.ExitStack() as stack:
        yield _enter(stack, RunningServer(*words)).ready(MODELS_LOAD_S)


@pytest.fixture
def innocent(server: RunningServer) -> Iterator[Innocent]:
    """Somebody well-behaved who must notice nothing."""
    client = Innocent(server)
    client.start()
    yield client
    client.see_another()
    client.end()


def _enter(stack: contextlib.ExitStack, command: C) -> C:
    _alive.append(command)
    stack.callback(_alive.remove, command)
    stack.enter_context(command)
    return command
