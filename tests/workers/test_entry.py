"""The command line of a worker process."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys

import pytest
from tensorwire_server.workers.entry import parse_listen
from tensorwire_server.workers.spec import WorkerSpec

from .dispatching import PATIENCE_S, listening

WORKER = [sys.executable, "-m", "tensorwire_server.workers"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("localhost:9000", ("localhost", 9000)),
        ("[::1]:9000", ("::1", 9000)),
    ],
)
def test_loopback_addresses_are_taken(text: str, expected: tuple[str, int]) -> None:
    assert parse_listen(text) == expected


@pytest.mark.parametrize("text", ["0.0.0.0:9000", "10.0.0.1:9000", "example.org:9000", "[::]:1"])
def test_other_addresses_are_refused_because_a_worker_asks_nobody_who_they_are(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="loopback"):
        parse_listen(text)


@pytest.mark.parametrize("text", ["9000", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="HOST:PORT"):
        parse_listen(text)


def test_wrong_usage_is_one_line_and_exit_code_two() -> None:
    spec = WorkerSpec(model="m", source="echo:").to_json()
    for argv, words in (
        (["--listen", "0.0.0.0:1", "--spec", spec], "loopback"),
        (["--listen", "127.0.0.1:0", "--spec", '{"model":"m"}'], "needs source"),
        (["--listen", "127.0.0.1:0", "--spec", '{"modle":"m"}'], "the fields model, source"),
    ):
        done = subprocess.run(WORKER + argv, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 2
        assert words in done.stderr


def test_a_listening_worker_that_cannot_load_says_why_and_fails() -> None:
    spec = WorkerSpec(model="m", source="echo:nonsense=1").to_json()
    argv = [*WORKER, "--listen", "127.0.0.1:0", "--spec", spec]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert "echo has no option 'nonsense'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_listening_worker_ends_orderly(number: signal.Signals) -> None:
    with listening("echo:") as (_, _, pid):
        watched = os.pidfd_open(pid)
        try:
            os.kill(pid, number)
            status = os.waitid(os.P_PIDFD, watched, os.WEXITED)
            assert status is not None
            assert status.si_status == 0
        finally:
            os.close(watched)


def test_an_address_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        spec = WorkerSpec(model="m", source="echo:").to_json()
        argv = [*WORKER, "--listen", f"127.0.0.1:{taken.getsockname()[1]}", "--spec", spec]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert "is taken; stop what uses it or give another --listen" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_process_whose_parent_is_gone_already_ends() -> None:
    spec = WorkerSpec(model="m", source="echo:").to_json()
    argv = [*WORKER, "--listen", "127.0.0.1:0", "--spec", spec, "--parent", "1"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1


def test_a_spec_survives_the_command_line() -> None:
    spec = WorkerSpec(model="a/b", source="oracle:step_ms=5", context_tokens=7, max_wait_ms=0.5)
    assert WorkerSpec.from_json(spec.to_json()) == spec
