"""Worker processes: started, killed, restarted, stopped, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tensorwire_server.models
from tensorwire_protocol.errors import ErrorCode
from tensorwire_protocol.messages import Drain, Failure
from tensorwire_server.workers.oracle import oracle_tokens

from .dispatching import LOADS_S, Supervised, is_alive, supervised

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    Runner = Callable[[Coroutine[Any, Any, None]], None]

pytestmark = pytest.mark.slow


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Runner:
    """The loop of the server: uvloop in production, the standard one where it is missing."""
    if request.param == "asyncio":
        return asyncio.run
    runner: Runner = pytest.importorskip("uvloop").run
    return runner


def proc_file(worker: Supervised, name: str) -> bytes:
    """Return what /proc says of a worker."""
    return Path(f"/proc/{worker.process.pid}/{name}").read_bytes()


def test_a_killed_worker_is_restarted_and_serves_again(run: Runner) -> None:
    async def main() -> None:
        async with supervised("oracle:step_ms=1") as worker:
            link = await worker.ready()
            link.generate("Once", max_new_tokens=1000)
            await link.until(lambda: bool(link.steps))
            pid = worker.process.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await link.until(lambda: link.is_lost)
            link = await worker.ready(life=2)
            assert [(e.code, e.is_failure) for e in worker.exits] == [(-9, True)]
            assert worker.exits[0].restart_in_s == pytest.approx(0.1)
            assert worker.process.pid not in (None, pid)
            assert not is_alive(pid)
            answer, _ = await link.ended(link.generate("Once", max_new_tokens=9, seed=1))
            assert answer.tokens == oracle_tokens(b"Once", 1, 9)

    run(main())


def test_the_death_of_one_worker_is_seen_though_others_were_started_beside_it(run: Runner) -> None:
    """A sibling that inherited its socket would keep the link open."""

    async def main() -> None:
        async with supervised("echo:") as first, supervised("echo:") as second:
            link = await first.ready()
            other = await second.ready()
            assert first.process.pid is not None
            os.kill(first.process.pid, signal.SIGKILL)
            await link.until(lambda: link.is_lost, timeout_s=2)
            assert (await other.result("infer", {"x": 1})).outputs == {"x": 1}

    run(main())


def test_a_prompt_can_kill_its_worker() -> None:
    async def main() -> None:
        async with supervised("oracle:") as worker:
            link = await worker.ready()
            link.generate("please !KILL me")
            await link.until(lambda: link.is_lost)
            await worker.until(lambda: bool(worker.exits))
            assert worker.exits[0].code == -9

    asyncio.run(main())


def test_a_hung_worker_still_beats_without_steps_and_dies_by_force() -> None:
    async def main() -> None:
        async with supervised("oracle:") as worker:
            link = await worker.ready()
            link.generate("please !HANG")
            await link.until(lambda: link.beats[-1].load.get("open_streams") == 1)
            steps, num_beats = link.beats[-1].steps, len(link.beats)
            await link.until(lambda: len(link.beats) > num_beats)
            assert link.beats[-1].steps == steps
            await asyncio.wait_for(worker.process.stop(0.1), 5)
            assert worker.exits[-1].code == -9

    asyncio.run(main())


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("oracle:steps=3", "oracle has no option 'steps'"),
        ("echo:service_ms=abc", "service_ms must be a number"),
    ],
)
def test_a_model_that_cannot_be_loaded_says_why_and_stays_down(source: str, words: str) -> None:
    async def main() -> None:
        async with supervised(source) as worker:
            await worker.until(lambda: bool(worker.links))
            link = worker.link
            await link.until(lambda: link.is_lost)
            await worker.until(lambda: bool(worker.exits))
            assert link.beats[-1].state == "failed"
            assert words in (link.beats[-1].detail or "")
            end = worker.exits[0]
            assert (end.code, end.restart_in_s, end.is_failure) == (3, None, True)
            assert worker.process.pid is None

    asyncio.run(main())


def test_requests_while_the_model_loads_may_be_tried_again() -> None:
    async def main() -> None:
        async with supervised("oracle:load_ms=300") as worker:
            await worker.until(lambda: bool(worker.links))
            refusal = await worker.link.refused("generate", {"prompt": "Once"})
            assert refusal.code == ErrorCode.MODEL_LOADING
            assert refusal.retryable
            assert [beat.state for beat in worker.link.beats[:1]] == ["loading"]
            await worker.ready()

    asyncio.run(main())


def test_a_worker_whose_link_closes_ends_and_is_started_again() -> None:
    async def main() -> None:
        async with supervised("echo:") as worker:
            link = await worker.ready()
            link.transport.close()
            await worker.ready(life=2)
            assert worker.exits[0].code == 1

    asyncio.run(main())


def test_a_drained_worker_ends_when_it_is_idle_and_stays_down() -> None:
    async def main() -> None:
        async with supervised("oracle:step_ms=1") as worker:
            link = await worker.ready()
            stream = link.generate("Once", max_new_tokens=100, seed=1)
            await link.until(lambda: bool(link.steps))
            link.transport.send(Drain(grace_ms=10_000))
            answer, _ = await link.ended(stream)
            assert answer.tokens == oracle_tokens(b"Once", 1, 100)
            await worker.until(lambda: bool(worker.exits))
            end = worker.exits[0]
            assert (end.code, end.restart_in_s, end.is_failure) == (0, None, False)

    asyncio.run(main())


def test_stop_lets_what_runs_finish_within_its_grace(run: Runner) -> None:
    async def main() -> None:
        async with supervised("oracle:step_ms=1") as worker:
            link = await worker.ready()
            stream = link.generate("Once", max_new_tokens=100, seed=1)
            await link.until(lambda: bool(link.steps))
            await worker.process.stop(10.0)
            answer, _ = await link.ended(stream)
            assert answer.tokens == oracle_tokens(b"Once", 1, 100)
            end = worker.exits[0]
            assert (end.code, end.restart_in_s, end.is_failure) == (143, None, False)

    run(main())


def test_stop_without_grace_and_stop_before_the_start_are_quick() -> None:
    async def main() -> None:
        async with supervised("oracle:step_ms=1") as worker:
            link = await worker.ready()
            link.generate("Once", max_new_tokens=1000)
            await asyncio.wait_for(worker.process.stop(0.0), 2)
            assert worker.exits[0].code == -9
        async with supervised("echo:") as worker:
            await asyncio.wait_for(worker.process.stop(5.0), 5)
            assert all(not end.is_failure for end in worker.exits)

    asyncio.run(main())


def test_a_worker_that_somebody_else_terminates_is_started_again() -> None:
    async def main() -> None:
        async with supervised("echo:") as worker:
            await worker.ready()
            assert worker.process.pid is not None
            os.kill(worker.process.pid, signal.SIGTERM)
            await worker.ready(life=2)
            assert (worker.exits[0].code, worker.exits[0].is_failure) == (143, True)

    asyncio.run(main())


def test_a_supervisor_that_is_cancelled_leaves_no_process() -> None:
    async def main() -> int:
        worker = Supervised("oracle:")
        worker.process.start()
        await worker.ready()
        pid = worker.process.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)  # it would end by itself when its link closes
        return pid

    pid = asyncio.run(main())
    with contextlib.suppress(ProcessLookupError):
        watched = os.pidfd_open(pid)
        ended, _, _ = select.select([watched], [], [], 2.0)
        os.close(watched)
        os.kill(pid, signal.SIGKILL)
        assert ended


def test_ctrl_c_in_the_terminal_is_the_servers_affair() -> None:
    async def main() -> None:
        async with supervised("echo:") as worker:
            link = await worker.ready()
            assert worker.process.pid is not None
            os.kill(worker.process.pid, signal.SIGINT)
            num_beats = len(link.beats)
            await link.until(lambda: link.is_lost or len(link.beats) > num_beats + 1)
            assert (await link.result("infer", {"x": 1})).outputs == {"x": 1}

    asyncio.run(main())


def test_a_worker_sees_its_threads_and_nothing_of_the_servers_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TENSORWIRE_TOKEN", "secret")

    async def main() -> None:
        async with supervised("echo:", threads=3) as worker:
            await worker.ready()
            environ = proc_file(worker, "environ").split(b"\0")
            assert b"OMP_NUM_THREADS=3" in environ
            assert not any(name.startswith(b"TENSORWIRE_") for name in environ)

    asyncio.run(main())


def test_workers_without_torch_do_not_import_it() -> None:
    async def main() -> None:
        async with supervised("oracle:") as worker:
            await worker.ready()
            assert b"libtorch" not in proc_file(worker, "maps")

    asyncio.run(main())


def test_no_worker_outlives_a_server_that_was_killed() -> None:
    server = textwrap.dedent("""
        import asyncio
        from tensorwire_protocol.connection import Connection
        from tensorwire_protocol.roles import Role
        from tensorwire_server.workers.spec import WorkerSpec
        from tensorwire_server.workers.supervisor import WorkerProcess

        async def main():
            loop = asyncio.get_running_loop()
            connected = loop.create_future()
            spec = WorkerSpec(model="m", source="oracle:")
            worker = WorkerProcess(
                spec, on_socket=lambda sock, _: connected.set_result(sock), on_exit=print
            )
            worker.start()
            sock = await connected
            hello = b"".join(Connection(Role.DISPATCHER).take_output())
            await loop.sock_sendall(sock, hello)
            await loop.sock_recv(sock, 1)
            print(worker.pid, flush=True)
            await asyncio.sleep(60)

        asyncio.run(main())
    """)
    with subprocess.Popen(
        [sys.executable, "-c", server], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        worker_pid = int(parent.stdout.readline())
        # Stopped, it cannot see that its link is closed: what ends it now is the kernel.
        os.kill(worker_pid, signal.SIGSTOP)
        watched = os.pidfd_open(worker_pid)
        try:
            parent.kill()
            ended, _, _ = select.select([watched], [], [], 2.0)  # readable once it has ended
            assert ended, "the worker outlived its server"
        finally:
            os.close(watched)
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker_pid, signal.SIGKILL)


def test_a_failure_of_the_link_reaches_open_requests_as_a_loss_not_as_an_answer() -> None:
    async def main() -> None:
        async with supervised("oracle:step_ms=1") as worker:
            link = await worker.ready()
            stream = link.generate("Once", max_new_tokens=1000)
            await link.until(lambda: bool(link.steps))
            worker.process.kill()
            await link.until(lambda: link.is_lost)
            assert not isinstance(link.answers[stream].terminal, Failure)

    asyncio.run(main())


def test_a_real_model_says_what_takes_the_time_and_serves() -> None:
    pytest.importorskip("torch")
    demo = Path(tensorwire_server.models.__file__).parent / "builtin" / "demo"

    async def main() -> None:
        async with supervised(str(demo), device="cpu") as worker:
            link = await worker.ready(within_s=LOADS_S)
            phases = list(dict.fromkeys(b.detail for b in link.beats if b.state == "loading"))
            assert phases[-3:] == ["importing torch", "loading weights", "first forward"]
            text = "Once upon a time there was a girl. " * 10  # tokenized on the thread
            streams = [link.generate(text, max_new_tokens=20, seed=s) for s in (1, 1, 2)]
            first, same, other = await link.answered(*streams)
            assert first.tokens == same.tokens != other.tokens
            assert first.text == same.text
            assert len(first.text) > len(first.tokens)
            stats = await link.stats()
            while stats["kv_sequences"]:
                stats = await link.stats()
            assert (stats["pages_used"], stats["open_streams"]) == (0, 0)

    asyncio.run(main())
