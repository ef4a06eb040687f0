"""A worker that runs elsewhere, here on another port, serves like one of the server's own."""

from __future__ import annotations

import os
import signal
import socket
from typing import TYPE_CHECKING

import pytest
from tensorwire import ModelLoading, WorkerLost

from .serving import assert_oracle, expected, free_port, is_alive, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from .serving import Command, RunningServer

pytestmark = pytest.mark.slow


class Place:
    """Where a remote worker is, was, and will be again."""

    def __init__(self, launch: Callable[..., Command]) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._launch = launch

    def start_worker(self, source: str = "oracle:step_ms=2") -> Command:
        worker = self._launch("worker", source, "--listen", self.address)
        name = source.partition(":")[0]
        assert worker.wait_ready() == ["ready", self.address, f"model={name}"]
        return worker


@pytest.fixture
def place(launch: Callable[..., Command]) -> Place:
    """A place for a remote worker."""
    return Place(launch)


def test_a_remote_worker_serves_like_a_local_one(
    place: Place, serve: Callable[..., RunningServer]
) -> None:
    worker = place.start_worker()
    server = serve("echo:", "--remote", place.address).ready()
    assert sorted(server.wait_ready()[2].removeprefix("models=").split(",")) == ["echo", "oracle"]
    server.watcher.tokenize("oracle", "x" * 1000)
    baseline = server.held()
    with server.client() as client:
        models = {about["name"]: about["state"] for about in client.models()["models"]}
        assert models == {"echo": "ready", "oracle": "ready"}
        prompts = [f"far away {i}" for i in range(64)]
        answers = client.generate("oracle", prompts, seed=3, max_new_tokens=20)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert_oracle(answer, prompt, 3, 20)
        left = client.stream("oracle", "left", seed=4, max_new_tokens=3000)
        assert next(left).token_ids == expected("left", 4, 1)
        left.close()
        assert client.infer("echo", {"x": [1, 2]})["x"].tolist() == [1, 2]  # type: ignore[union-attr]
        assert server.worker_pids()[place.address] == worker.pid
    server.assert_back_at(baseline)


def test_a_remote_worker_that_is_killed_and_started_again_is_found_again(
    place: Place, serve: Callable[..., RunningServer]
) -> None:
    worker = place.start_worker()
    server = serve("echo:", "--remote", place.address).ready()
    with server.client() as client:
        streams = [client.stream("oracle", "s", seed=i, max_new_tokens=3000) for i in range(8)]
        for stream in streams:
            next(stream)
        os.kill(worker.pid, signal.SIGKILL)
        for seed, stream in enumerate(streams):
            with pytest.raises(WorkerLost) as lost:
                for _ in stream:
                    pass
            ids = lost.value.detail["partial"].token_ids
            assert ids == expected("s", seed, len(ids))
        with pytest.raises(ModelLoading):
            client.generate("oracle", "now", max_new_tokens=1, wait=False)
        assert client.infer("echo", {"x": [1]})["x"].tolist() == [1]  # type: ignore[union-attr]
        waiting = client.stream("oracle", "waits", seed=7, max_new_tokens=5)
        place.start_worker()
        for _ in waiting:
            pass
        assert_oracle(waiting.generation, "waits", 7, 5)
    gateway = server.stats()["gateway"]
    assert gateway["outcomes"]["WORKER_LOST"] == 8
    assert (gateway["live_requests"], gateway["journal_entries"]) == (0, 0)


def test_a_server_waits_for_a_remote_worker_that_comes_later(
    place: Place, serve: Callable[..., RunningServer]
) -> None:
    server = serve("--remote", place.address, port=free_port())
    wait_until(lambda: _accepts(server.address), "the port answers")
    with server.client() as client:
        health = client.health()
        assert health["status"] == "loading"
        assert list(health["awaited"]) == [place.address]
        place.start_worker()
        assert server.wait_ready()[2] == "models=oracle"
        assert client.health()["status"] == "ready"
        made = client.generate("oracle", "x", seed=1, max_new_tokens=5)
        assert_oracle(made, "x", 1, 5)


def _accepts(address: str) -> bool:
    host, _, port = address.partition(":")
    with socket.socket() as sock:
        return sock.connect_ex((host, int(port))) == 0


def test_a_killed_gateway_leaves_a_remote_worker_free_for_the_next_one(
    place: Place, serve: Callable[..., RunningServer]
) -> None:
    worker = place.start_worker("oracle:step_ms=5")
    first = serve("--remote", place.address).ready()
    with first.client() as client:
        streams = [client.stream("oracle", "s", seed=i, max_new_tokens=3000) for i in range(8)]
        for stream in streams:
            next(stream)
        os.kill(first.pid, signal.SIGKILL)
    second = serve("--remote", place.address).ready()

    def is_idle() -> bool:
        counts = second.stats()["workers"][place.address]
        return all(counts[n] == 0 for n in ("open_streams", "running", "pages_used", "kv_tokens"))

    wait_until(is_idle, "what nobody waits for is dropped")
    made = second.watcher.generate("oracle", "next", seed=1, max_new_tokens=5)
    assert_oracle(made, "next", 1, 5)
    assert worker.process.poll() is None


def test_sigterm_lets_a_remote_worker_finish_what_runs(
    place: Place, serve: Callable[..., RunningServer]
) -> None:
    worker = place.start_worker("oracle:step_ms=5")
    server = serve("--remote", place.address).ready()
    with server.client() as client:
        stream = client.stream("oracle", "s", seed=1, max_new_tokens=100)
        next(stream)
        worker.process.send_signal(signal.SIGTERM)
        for _ in stream:
            pass
        assert_oracle(stream.generation, "s", 1, 100)
    assert worker.wait() == 0
    assert server.process.poll() is None


def test_the_end_of_a_server_does_not_end_its_remote_worker(
    place: Place, serve: Callable[..., RunningServer]
) -> None:
    worker = place.start_worker()
    server = serve("--remote", place.address).ready()
    assert server.terminate(3.0) == 0
    assert is_alive(worker.pid)
    second = serve("--remote", place.address).ready()
    made = second.watcher.generate("oracle", "x", seed=1, max_new_tokens=5)
    assert_oracle(made, "x", 1, 5)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["oracle:", "--listen", "nowhere"], "HOST:PORT"),
        (["oracle:", "--listen", "0.0.0.0:1"], "loopback"),
        (["oracle:steps=1"], "no option 'steps'"),
        (["/no/such/folder"], "no folder"),
    ],
)
def test_a_worker_that_cannot_start_says_why_in_one_line(
    launch: Callable[..., Command], words: list[str], part: str
) -> None:
    listen = [] if "--listen" in words else ["--listen", f"127.0.0.1:{free_port()}"]
    _assert_one_line(launch("worker", *words, *listen), part)


def test_a_worker_whose_port_is_taken_says_so_in_one_line(
    launch: Callable[..., Command],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = launch("worker", "oracle:", "--listen", f"127.0.0.1:{port}")
        _assert_one_line(command, str(port))


def test_a_worker_may_listen_on_any_free_port(launch: Callable[..., Command]) -> None:
    word, address, _ = launch("worker", "oracle:", "--listen", "127.0.0.1:0").wait_ready()
    assert word == "ready"
    assert _accepts(address)


def _assert_one_line(command: Command, part: str) -> None:
    assert command.wait() in (1, 2, 3)
    (line,) = command.stderr.splitlines()
    assert part in line
    assert command.stdout == ""
