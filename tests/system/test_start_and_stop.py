"""How a server begins, refuses to begin, turns away what is too much, and ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from tensorwire import (
    Busy,
    Client,
    ConnectionLost,
    DeadlineExceeded,
    Draining,
    Executed,
    ModelLoading,
    TensorwireError,
    UnknownModel,
    UnknownOperation,
)

from .serving import assert_oracle, expected, free_port, is_alive, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .serving import Command, RunningServer

pytestmark = pytest.mark.slow


# -- the beginning ------------------------------------------------------------------------------


def test_the_port_answers_long_before_the_models_have_loaded(
    serve: Callable[..., RunningServer],
) -> None:
    server = serve("oracle:load_ms=2500", "echo:", port=free_port())

    def health() -> dict[str, object] | None:
        try:
            with Client(server.address, connect_timeout=1.0) as client:
                return client.health(timeout=1.0)
        except TensorwireError:
            return None

    first = wait_until(health, "the port answers", 5.0)
    assert first is not None
    print(f"measured port_answers_s={round(time.monotonic() - server.started_at, 3)}")
    assert first["status"] == "loading"
    # A second on an idle machine; here others run beside it, so what counts is the time the
    # processor spent on the server from its start to this answer.
    assert server.cpu_s() < 1.0

    with server.client() as client:

        def states() -> dict[str, str]:
            models: dict[str, dict[str, str]] = client.health()["models"]
            return {name: about["state"] for name, about in models.items()}

        wait_until(lambda: states() == {"oracle": "loading", "echo": "ready"}, "echo is first")
        progress = client.health()["models"]["oracle"]["detail"]
        assert progress
        assert client.infer("echo", {"x": [1, 2]})["x"].tolist() == [1, 2]  # type: ignore[union-attr]

        with pytest.raises(ModelLoading) as refused:
            client.generate("oracle", "at once", max_new_tokens=2, wait=False)
        assert states()["oracle"] == "loading", "it was refused late"
        assert refused.value.retryable
        assert refused.value.executed is Executed.NO

        with pytest.raises(DeadlineExceeded):
            client.generate("oracle", "soon", max_new_tokens=2, timeout=0.1)
        assert "ready" not in server.stdout
        waited = client.generate("oracle", "whenever", seed=1, max_new_tokens=6)
        assert_oracle(waited, "whenever", 1, 6)
        assert states() == {"oracle": "ready", "echo": "ready"}
        assert server.wait_ready() == ["ready", server.address, "models=oracle,echo"]


def test_requests_that_wait_for_a_model_and_give_up_leave_nothing_behind(
    serve: Callable[..., RunningServer],
) -> None:
    server = serve("oracle:load_ms=1500", port=free_port())
    wait_until(lambda: _answers(server.address), "the port answers", 5.0)
    with server.client() as client:
        streams = [client.stream("oracle", "x", max_new_tokens=2) for _ in range(50)]
        wait_until(lambda: server.stats()["gateway"]["live_requests"] == 50, "all wait")
        for stream in streams:
            stream.close()
        wait_until(lambda: server.stats()["gateway"]["live_requests"] == 0, "none waits")
        kept = client.generate("oracle", "kept", seed=2, max_new_tokens=3)
        assert_oracle(kept, "kept", 2, 3)
    gateway = server.stats()["gateway"]
    assert gateway["outcomes"] == {"cancelled": 50, "length": 1}
    assert server.stats()["workers"]["oracle/0"]["steps"] <= 10


def _answers(address: str) -> bool:
    host, _, port = address.partition(":")
    with socket.socket() as sock:
        return sock.connect_ex((host, int(port))) == 0


def test_several_models_stand_behind_one_address(server: RunningServer) -> None:
    with server.client() as client:
        models = client.models()["models"]
        assert [(m["name"], m["state"]) for m in models] == [("oracle", "ready"), ("echo", "ready")]
        with pytest.raises(UnknownModel, match=r"no model 'gpt'; this server has oracle, echo"):
            client.generate("gpt", "x")
        with pytest.raises(UnknownOperation, match="'echo' does not generate"):
            client.generate("echo", "x")
        with pytest.raises(UnknownModel, match="no revision 'abcdef12'"):
            client.generate("oracle@abcdef12", "x")


def test_models_are_served_under_the_names_they_are_given(
    serve: Callable[..., RunningServer],
) -> None:
    server = serve("--model", "quick=oracle:", "--model", "team/slow=oracle:step_ms=20").ready()
    assert server.wait_ready()[2] == "models=quick,team/slow"
    with server.client() as client:
        quick = client.generate("quick", "x", seed=1, max_new_tokens=5)
        slow = client.generate("team/slow", "x", seed=1, max_new_tokens=5)
    assert quick.token_ids == slow.token_ids == expected("x", 1, 5)


# -- refusing to begin --------------------------------------------------------------------------


def _assert_one_sentence(command: Command, code: int, *parts: str) -> None:
    """Fail unless it ends with `code`, and what it says last is one line with `parts`."""
    assert command.wait(15.0) == code, command.stderr
    said = [line for line in command.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, command.stderr
    assert "Traceback" not in command.stderr
    assert command.stdout == ""
    for part in parts:
        assert part in said[0]


def test_a_port_that_is_taken_is_one_sentence(launch: Callable[..., Command]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = launch("serve", "oracle:", "--port", port)
        _assert_one_sentence(command, 1, f"port {port} on 127.0.0.1 is taken", "--port")


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["oracle:", "--prot", "1"], 2, ["No such option", "--prot"]),
        (["oracle:", "--port", "many"], 2, ["--port"]),
        (["oracle:", "--port", "70000"], 2, ["listen.port", "65535", "70000"]),
        (["oracle:", "--host", "0.0.0.0"], 1, ["refusing", "0.0.0.0", "127.0.0.1"]),
        (["oracle:", "--set", "batching.max_item=3"], 2, ["max_item", "did you mean 'max_items'"]),
        (["oracle:", "--set", "batching.max_items=0"], 2, ["batching.max_items must be >= 1"]),
        (["oracle:", "--config", "/no/such.toml"], 2, ["/no/such.toml"]),
        (["oracle:", "--device", "tpu"], 2, ["auto, cpu or cuda", "tpu"]),
        (["oracle:", "oracle:"], 2, ["two models", "oracle", "--model NAME="]),
        (["oracle:steps=3"], 1, ["'oracle'", "no option 'steps'", "step_ms"]),
        (["/no/such/folder"], 2, ["no folder", "/no/such/folder"]),
        (["--model", "a b=oracle:"], 2, ["'a b'", "letters"]),
        (["oracle:", "--remote", "nowhere"], 2, ["HOST:PORT", "nowhere"]),
    ],
    ids=lambda value: "_".join(value)[:40].replace("/", "-") if isinstance(value, list) else "",
)
def test_a_wrong_word_on_the_command_line_is_one_sentence(
    launch: Callable[..., Command], words: list[str], code: int, parts: list[str]
) -> None:
    port = [] if "--port" in words else ["--port", "0"]
    _assert_one_sentence(launch("serve", *words, *port), code, *parts)


def _model_folder(folder: Path, *weights: str) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for name in weights:
        (folder / name).write_bytes(b"\x80\x04K\x01.")
    return str(folder)


def test_a_folder_without_weights_is_one_sentence(
    launch: Callable[..., Command], tmp_path: Path
) -> None:
    folder = _model_folder(tmp_path / "empty")
    _assert_one_sentence(launch("serve", folder), 2, folder, "no weights", "safetensors")


def test_a_folder_without_a_config_is_one_sentence(
    launch: Callable[..., Command], tmp_path: Path
) -> None:
    _assert_one_sentence(launch("serve", str(tmp_path)), 2, str(tmp_path), "no config.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_in_one_sentence(
    launch: Callable[..., Command], tmp_path: Path, name: str
) -> None:
    folder = _model_folder(tmp_path / "old", name)
    command = launch("serve", folder)
    _assert_one_sentence(command, 2, "pickled", "convert them to safetensors")


def test_a_missing_sub_command_is_one_sentence(launch: Callable[..., Command]) -> None:
    _assert_one_sentence(launch("token"), 2, "Missing command", "tensorwire token --help")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["generate", "oracle", "hello"], ["no server answers at", "tensorwire serve"]),
    ],
)
def test_no_server_is_one_sentence(
    launch: Callable[..., Command], words: list[str],
    parts: list[str],
) -> None:  # fmt: skip
    command = launch(*words, "--address", f"127.0.0.1:{free_port()}")
    _assert_one_sentence(command, 1, *parts)


# -- too much, too late -------------------------------------------------------------------------


def test_a_full_queue_says_busy_at_once_and_takes_more_when_there_is_room(
    serve: Callable[..., RunningServer],
) -> None:
    server = serve("oracle:step_ms=5", "echo:", "--set", "admission.max_requests_per_model=4")
    server.ready()
    with server.client() as client:
        streams = [client.stream("oracle", "s", seed=i, max_new_tokens=3000) for i in range(4)]
        for stream in streams:
            next(stream)
        with pytest.raises(Busy, match="4 of 4") as refused:
            client.generate("oracle", "one too many", max_new_tokens=1)
        assert server.stats()["gateway"]["live_requests"] == 4, "it was refused late"
        assert (refused.value.retryable, refused.value.executed) == (True, Executed.NO)
        assert refused.value.retry_after_ms
        # The bound is the model's own.
        assert client.infer("echo", {"x": [1]})["x"].tolist() == [1]  # type: ignore[union-attr]
        streams[0].close()
        wait_until(lambda: server.stats()["gateway"]["live_requests"] == 3, "room")
        made = client.generate("oracle", "now", seed=5, max_new_tokens=4)
        assert_oracle(made, "now", 5, 4)
        for stream in streams:
            stream.close()


def test_a_flood_over_the_bound_is_answered_to_the_last_request(
    serve: Callable[..., RunningServer],
) -> None:
    server = serve("oracle:step_ms=5", "--set", "admission.max_requests=16").ready()
    baseline = server.held()

    def ask(i: int) -> str:
        with server.client() as client:
            try:
                made = client.generate("oracle", "f", seed=i, max_new_tokens=40)
            except Busy:
                return "busy"
            assert_oracle(made, "f", i, 40)
            return "done"

    with ThreadPoolExecutor(48) as threads:
        ends = list(threads.map(ask, range(192)))
    assert set(ends) == {"busy", "done"}
    server.assert_back_at(baseline)


def test_a_deadline_that_passes_in_the_queue_ends_with_an_empty_partial(
    serve: Callable[..., RunningServer],
) -> None:
    server = serve("oracle:step_ms=5", "--set", "batching.max_running=1").ready()
    baseline = server.held()
    with server.client() as client:
        first = client.stream("oracle", "first", seed=1, max_new_tokens=100)
        next(first)
        with pytest.raises(DeadlineExceeded) as over:
            client.generate("oracle", "second", seed=2, max_new_tokens=5, timeout=0.15)
        assert over.value.partial.token_ids == []
        assert over.value.partial.finish_reason == "deadline"
        for _ in first:
            pass
        assert_oracle(first.generation, "first", 1, 100)
    server.assert_back_at(baseline)


def test_a_deadline_that_passes_while_it_runs_ends_with_what_was_made(
    server: RunningServer,
) -> None:
    with server.client() as client:
        with pytest.raises(DeadlineExceeded) as over:
            client.generate("oracle", "long", seed=2, max_new_tokens=3000, timeout=0.5)
        partial = over.value.partial
        assert 0 < len(partial.token_ids) < 3000
        assert partial.token_ids == expected("long", 2, len(partial.token_ids))
        assert partial.finish_reason == "deadline"


# -- the end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once_with_exit_code_0(
    serve: Callable[..., RunningServer], number: signal.Signals
) -> None:
    server = serve("oracle:", "echo:").ready()
    workers = server.children()
    with server.client() as client:
        client.health()
        server.process.send_signal(number)
        assert server.wait(3.0) == 0
    assert not any(map(is_alive, workers))
    assert not _complaints(server)


def _complaints(server: RunningServer) -> list[str]:
    """Return what an operator would have to look at."""
    words = ("Traceback", " ERROR ", " WARNING ", " CRITICAL ", "Exception")
    return [line for line in server.stderr.splitlines() if any(word in line for word in words)]


def test_sigterm_finishes_what_runs_takes_nothing_new_and_exits_0(
    serve: Callable[..., RunningServer],
) -> None:
    server = serve("oracle:step_ms=5", "echo:").ready()
    with server.client() as client, server.client() as late:
        late.health()
        streams = [client.stream("oracle", "s", seed=i, max_new_tokens=200) for i in range(4)]
        for stream in streams:
            next(stream)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not _answers(server.address), "nobody new is let in")
        with pytest.raises((Draining, ConnectionLost)) as refused:
            late.generate("oracle", "too late", max_new_tokens=1)
        assert refused.value.executed is Executed.NO
        assert refused.value.retryable
        for seed, stream in enumerate(streams):
            for _ in stream:
                pass
            assert_oracle(stream.generation, "s", seed, 200)
    assert server.wait() == 0
    assert not _complaints(server)


def test_a_drain_that_takes_too_long_is_cut_and_still_exits_0(
    serve: Callable[..., RunningServer],
) -> None:
    server = serve("oracle:step_ms=20", "--set", "listen.drain_s=0.5").ready()
    with server.client() as client:
        stream = client.stream("oracle", "s", seed=1, max_new_tokens=3000)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(Draining) as cut:
            for _ in stream:
                pass
        ids = cut.value.detail["partial"].token_ids
        assert ids == expected("s", 1, len(ids))
        assert len(ids) >= 10
        assert server.wait() == 0  # long before the stream's end


def test_a_second_sigterm_hurries(serve: Callable[..., RunningServer]) -> None:
    server = serve("oracle:step_ms=20").ready()
    workers = server.children()
    with server.client() as client:
        stream = client.stream("oracle", "s", seed=1, max_new_tokens=3000)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not _answers(server.address), "the first one has come")
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(Draining):
            for _ in stream:
                pass
        assert server.wait() == 0  # long before its 30 s are over
    assert not any(map(is_alive, workers))


def test_sigterm_while_models_load_ends_the_server_at_once(
    serve: Callable[..., RunningServer],
) -> None:
    server = serve("oracle:load_ms=60000", port=free_port())
    workers = wait_until(server.children, "a worker")
    wait_until(lambda: _answers(server.address), "the port answers")
    assert server.terminate(4.0) == 0
    assert not any(map(is_alive, workers))


def test_a_second_sigterm_does_not_wait_for_a_worker_that_stands_still(
    serve: Callable[..., RunningServer],
) -> None:
    server = serve("oracle:").ready()
    (worker,) = server.children()
    os.kill(worker, signal.SIGSTOP)
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: not _answers(server.address), "the first one has come")
    assert server.terminate(2.0) == 0
    assert not is_alive(worker)


def test_a_model_that_cannot_be_loaded_does_not_stay_half_started(
    launch: Callable[..., Command],
) -> None:
    command = launch("serve", "echo:", "oracle:vocab=3", "--port", "0")
    _assert_one_sentence(command, 1, "'oracle'", "vocab must be above 256")
    assert command.children() == []
