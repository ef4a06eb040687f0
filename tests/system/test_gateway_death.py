"""The gateway killed with no chance to tidy up: its workers must not outlive it."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from tensorwire import ConnectionLost

from .serving import assert_oracle, expected, free_port, is_alive, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from .serving import RunningServer

pytestmark = pytest.mark.slow

_NO_WORKER_S = 2.0


def _kill(server: RunningServer) -> None:
    os.kill(server.pid, signal.SIGKILL)
    server.process.wait(2)


def _wait_until_gone(workers: list[int]) -> None:
    wait_until(lambda: not any(map(is_alive, workers)), f"{workers} are gone", _NO_WORKER_S)


def test_a_killed_gateway_leaves_no_worker_and_its_port_can_be_used_again(
    serve: Callable[..., RunningServer],
) -> None:
    port = free_port()
    server = serve("oracle:step_ms=5", "echo:", port=port).ready()
    workers = server.children()
    assert sorted(server.worker_pids().values()) == workers
    with server.client() as client:
        streams = [client.stream("oracle", "s", seed=i, max_new_tokens=3000) for i in range(8)]
        for stream in streams:
            next(stream)
        _kill(server)
        _wait_until_gone(workers)
        for seed, stream in enumerate(streams):
            with pytest.raises(ConnectionLost) as lost:
                for _ in stream:
                    pass
            ids = lost.value.detail["partial"].token_ids
            assert ids == expected("s", seed, len(ids))

        serve("oracle:", port=port).ready()
        # The same client finds the new server by itself.
        assert_oracle(client.generate("oracle", "again", seed=3, max_new_tokens=9), "again", 3, 9)


def test_workers_that_are_still_loading_go_with_a_killed_gateway(
    serve: Callable[..., RunningServer],
) -> None:
    server = serve("oracle:load_ms=60000", "--workers", "2")
    workers = wait_until(lambda: len(server.children()) == 2 and server.children(), "two workers")
    assert workers
    _kill(server)
    _wait_until_gone(workers)


def test_a_worker_that_stands_still_goes_with_a_killed_gateway(
    serve: Callable[..., RunningServer],
) -> None:
    server = serve("oracle:").ready()
    workers = server.children()
    os.kill(workers[0], signal.SIGSTOP)
    _kill(server)
    _wait_until_gone(workers)
