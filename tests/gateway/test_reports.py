"""models, health and stats: what the gateway answers itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorwire_protocol.messages import Finish
from tensorwire_server.config import AdmissionConfig
from tensorwire_server.routing.replica import Replica

from .house import house
from .loops import pass_time

if TYPE_CHECKING:
    from tensorwire_protocol.messages import Submit

    from .conftest import Run
    from .fake_worker import FakeWorker
    from .house import Client


def report(worker: FakeWorker, submit: Submit) -> None:
    assert submit.op == "stats"
    worker.result(submit.stream, extra={"steps": 42})


async def health(client: Client) -> tuple[str, dict[str, str]]:
    answer = (await client.answered(client.ask("health", None))).extra
    assert answer["uptime_s"] >= 0
    return answer["status"], {name: m["state"] for name, m in answer["models"].items()}


def test_models_lists_what_each_model_is_and_how_far(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            replica = opened.add_replica("a/b")
            opened.add_replica("a/b")
            await opened.add_worker("m")
            client = await opened.connect()
            worker = await opened.add_worker("a/b", replica=replica)
            worker.beat("ready", model="a/b", context_tokens=2048, eos_ids=[1, 2])
            await pass_time()
            answer = await client.answered(client.ask("models", None))
            first, second = answer.extra["models"]
            assert first == {
                "name": "a/b",
                "state": "ready",
                "detail": "",
                "replicas": 2,
                "ready_replicas": 1,
                "tasks": ["chat", "embed", "generate", "infer", "tokenize"],
                "context_tokens": 2048,
            }
            assert second["name"] == "m"

    run_fast(test)


def test_health_follows_the_models(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            client = await opened.connect()
            first, second = opened.add_replica("a"), opened.add_replica("b")
            assert await health(client) == ("loading", {"a": "loading", "b": "loading"})
            await opened.add_worker(replica=first)
            assert await health(client) == ("loading", {"a": "ready", "b": "loading"})
            worker = await opened.add_worker(replica=second)
            assert await health(client) == ("ready", {"a": "ready", "b": "ready"})
            worker.beat("failed", "broken")
            await pass_time()
            assert await health(client) == ("degraded", {"a": "ready", "b": "failed"})
            opened.gateway.is_draining = True
            assert (await health(client))[0] == "draining"

    run_fast(test)


def test_a_remote_worker_that_has_not_said_what_it_holds_is_awaited(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            await opened.add_worker()
            client = await opened.connect()
            far = Replica("far:1", on_change=lambda _: None)
            far.disconnected("no worker answers")
            opened.unnamed.append(far)
            answer = await client.answered(client.ask("health", None))
            assert answer.extra["status"] == "loading"
            assert answer.extra["awaited"] == {"far:1": "no worker answers"}
            opened.unnamed.remove(far)
            answer = await client.answered(client.ask("health", None))
            assert (answer.extra["status"], answer.extra["awaited"]) == ("ready", {})

    run_fast(test)


def test_stats_gathers_the_numbers_of_all_workers(run: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            for _ in range(2):
                await opened.add_worker(on_submit=report)
            client = await opened.connect()
            answer = (await client.answered(client.ask("stats", None))).extra
            expected = {"state": "ready", "in_flight": 0, "steps": 42}
            assert answer["workers"] == {"m/0": expected, "m/1": expected}
            gateway = answer["gateway"]
            assert gateway["sessions"] == 1
            assert gateway["fds"] > 0
            assert gateway["rss_bytes"] > 2**20

    run(test)


def test_stats_counts_what_lives_and_what_has_ended(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(), await opened.connect()
            client.ask(deadline_ms=60_000)
            ended = client.ask(deadline_ms=60_000)
            await pass_time()
            worker.ack(1)
            worker.step({1: [5, 6], 2: [7]})
            worker.end(2)
            await client.ended(ended)
            asked = client.ask("stats", None)
            await pass_time()
            worker.result(worker.submits[-1].stream)
            gateway = (await client.answered(asked)).extra["gateway"]
            assert gateway["live_requests"] == 1
            assert gateway["live_by_model"] == {"m": 1}
            assert (gateway["journal_entries"], gateway["journal_tokens"]) == (1, 4)
            assert gateway["deadlines"] == 1
            assert gateway["outcomes"] == {"stop": 1}
            assert gateway["tokens"] == 1

    run_fast(test)


def test_stats_works_after_requests_that_ran_into_their_deadlines(run_fast: Run) -> None:
    async def test() -> None:
        async with house(AdmissionConfig(stop_grace_s=0.1)) as opened:
            client = await opened.connect()
            worker = await opened.add_worker()
            for _ in range(3):
                stream = client.ask(deadline_ms=100)
                await pass_time(0.5)
                assert (await client.ended(stream)).finish is Finish.DEADLINE
            asked = client.ask("stats", None)
            await pass_time()
            worker.result(worker.submits[-1].stream)
            answer = (await client.answered(asked)).extra["gateway"]
            assert answer["deadlines"] == 0
            assert answer["outcomes"] == {"deadline": 3}

    run_fast(test)


def test_a_worker_that_does_not_answer_is_left_out_after_a_moment(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            await opened.add_worker(on_submit=report)
            hung = await opened.add_worker()
            opened.add_replica()
            client = await opened.connect()
            asked = client.ask("stats", None)
            await pass_time(1.9)
            assert not client.terminals(asked)
            await pass_time(0.2)
            workers = (await client.answered(asked)).extra["workers"]
            assert workers["m/0"] == {"state": "ready", "in_flight": 0, "steps": 42}
            assert workers["m/1"] == {
                "state": "ready",
                "in_flight": 0,
                "unreachable": "no answer in time",
            }
            assert "no connection" in workers["m/2"]["unreachable"]
            # The late answer is dropped, and the worker does not count as busy for ever.
            hung.result(hung.submits[0].stream)
            await pass_time()
            assert [r.num_in_flight for r in opened.pools["m"].replicas] == [0, 0, 0]

    run_fast(test)


def test_a_worker_that_dies_while_it_is_asked_does_not_hold_up_the_answer(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(), await opened.connect()
            asked = client.ask("stats", None)
            await pass_time()
            worker.die()
            await pass_time()
            workers = (await client.answered(asked)).extra["workers"]
            assert workers["m/0"]["unreachable"] == "the worker died"

    run_fast(test)


def test_nobody_is_answered_who_has_left(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(), await opened.connect()
            client.ask("stats", None)
            await pass_time()
            client.transport.close()
            await pass_time()
            worker.result(worker.submits[0].stream)
            await pass_time(5.0)

    run_fast(test)


def test_a_server_without_models_has_stats(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            client = await opened.connect()
            assert (await client.answered(client.ask("stats", None))).extra["workers"] == {}
            assert (await client.answered(client.ask("models", None))).extra == {"models": []}

    run_fast(test)
