"""Many requests at once: all answered, all right, and nothing kept afterwards."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tensorwire import AsyncClient

from .serving import assert_oracle, expected, wait_until

if TYPE_CHECKING:
    from .serving import RunningServer

pytestmark = pytest.mark.slow

REQUESTS = 256
CONNECTIONS = 64


def _prompt(i: int) -> str:
    """Return a prompt of its own for each request; every eighth is long enough for a thread."""
    return f"request {i} " + "padding " * (64 if i % 8 == 0 else i % 5)


def _count(i: int) -> int:
    return 8 + i % 17


async def _ask(client: AsyncClient, i: int) -> None:
    """Make one request, of a kind that depends on `i`, and check the answer."""
    if i % 4 == 3:
        array = np.full((4, 4), i, np.float32)
        answer = await client.infer("echo", {"x": array})
        np.testing.assert_array_equal(np.asarray(answer["x"]), array)
    else:
        made = await client.generate("oracle", _prompt(i), seed=i, max_new_tokens=_count(i))
        assert_oracle(made, _prompt(i), i, _count(i))


def test_256_requests_at_once_on_one_connection_are_all_answered_right(
    server: RunningServer,
) -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            await asyncio.gather(*(_ask(client, i) for i in range(REQUESTS)))
            assert (await client.stats())["gateway"]["sessions"] == 2

    asyncio.run(main())


def test_256_requests_at_once_on_64_connections_are_all_answered_right(
    server: RunningServer,
) -> None:
    async def main() -> None:
        clients = [AsyncClient(server.address) for _ in range(CONNECTIONS)]
        asking = (_ask(clients[i % CONNECTIONS], i) for i in range(REQUESTS))
        await asyncio.gather(*asking)
        assert (await clients[0].stats())["gateway"]["sessions"] == CONNECTIONS + 1
        for client in clients:
            await client.close()

    asyncio.run(main())


def test_256_prompts_of_one_blocking_call_run_together(server: RunningServer) -> None:
    prompts = [_prompt(i) for i in range(REQUESTS)]
    with server.client() as client:
        answers = client.generate("oracle", prompts, seed=7, max_new_tokens=12)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_oracle(answer, prompt, 7, 12)
    assert max(answer.timings.largest_batch or 0 for answer in answers) == 64


def test_64_threads_with_a_blocking_client_each_get_their_own_answers(
    server: RunningServer,
) -> None:
    def work(thread: int) -> None:
        with server.client() as client:
            for i in range(thread, REQUESTS, CONNECTIONS):
                stream = client.stream("oracle", _prompt(i), seed=i, max_new_tokens=_count(i))
                ids = [token for delta in stream for token in delta.token_ids]
                assert ids == expected(_prompt(i), i, _count(i))

    _in_threads(CONNECTIONS, work)


def test_32_threads_may_share_one_blocking_client(server: RunningServer) -> None:
    with server.client() as client:

        def work(thread: int) -> None:
            for i in range(thread, 128, 32):
                made = client.generate("oracle", _prompt(i), seed=i, max_new_tokens=_count(i))
                assert_oracle(made, _prompt(i), i, _count(i))

        _in_threads(32, work)


def _in_threads(number: int, work: object) -> None:
    assert callable(work)
    with ThreadPoolExecutor(number) as threads:
        for done in [threads.submit(work, i) for i in range(number)]:
            done.result(timeout=30)


def test_32_streams_at_once_share_their_steps(server: RunningServer) -> None:
    with server.client() as client:
        answers = client.generate("oracle", ["together"] * 32, seed=1, max_new_tokens=64)
    assert min(answer.timings.largest_batch or 0 for answer in answers) >= 24


@pytest.mark.parametrize("connections", [1, CONNECTIONS])
def test_cancelling_half_of_256_at_random_frees_everything_and_disturbs_nobody(
    server: RunningServer, connections: int
) -> None:
    # The fixture compares block pool, journal, tasks and descriptors afterwards.
    cancelled_before = _num_cancelled(server)
    chance = random.Random(connections)
    leavers = set(chance.sample(range(REQUESTS), REQUESTS // 2))
    stop_after = {i: chance.randrange(0, 6) for i in leavers}

    async def leave_early(client: AsyncClient, i: int) -> None:
        ids: list[int] = []
        async with client.stream("oracle", _prompt(i), seed=i, max_new_tokens=3500) as stream:
            if stop_after[i]:
                async for delta in stream:
                    ids += delta.token_ids
                    if len(ids) >= stop_after[i]:
                        break
        assert ids == expected(_prompt(i), i, len(ids))

    async def main() -> None:
        clients = [AsyncClient(server.address) for _ in range(connections)]
        await asyncio.gather(
            *(
                (leave_early if i in leavers else _ask)(clients[i % connections], i)
                for i in range(REQUESTS)
            )
        )
        for client in clients:
            await client.close()

    asyncio.run(main())
    wait_until(
        lambda: _num_cancelled(server) - cancelled_before == REQUESTS // 2, "half are cancelled"
    )


def test_a_cancel_ends_the_work_and_not_only_the_answer(server: RunningServer) -> None:
    with server.client() as client:
        streams = [client.stream("oracle", "x", seed=i, max_new_tokens=3500) for i in range(64)]
        for stream in streams:
            next(stream)
        for stream in streams:
            stream.close()

        def is_idle() -> bool:
            counts = server.stats()["workers"]["oracle/0"]
            return all(counts[n] == 0 for n in ("running", "pages_used", "kv_sequences"))

        wait_until(is_idle, "nothing runs for nobody", 2.0)


def test_tasks_that_are_cancelled_at_random_times_free_everything(server: RunningServer) -> None:
    chance = random.Random(3)

    async def main() -> None:
        async with AsyncClient(server.address) as client:
            await client.health()
            tasks = [asyncio.create_task(_ask(client, i)) for i in range(REQUESTS)]
            loop = asyncio.get_running_loop()
            for task in chance.sample(tasks, REQUESTS // 2):
                loop.call_later(chance.random() * 0.5, task.cancel)
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            assert {type(end) for end in ends} <= {type(None), asyncio.CancelledError}

    asyncio.run(main())


def test_clients_that_vanish_in_the_middle_free_everything(server: RunningServer) -> None:
    cancelled_before = _num_cancelled(server)
    clients = [server.client() for _ in range(32)]
    streams = [
        client.stream("oracle", _prompt(i), seed=i, max_new_tokens=3500)
        for i, client in enumerate(clients * 4)
    ]
    assert next(streams[0]).index == 0
    for client in clients:
        client.close()
    wait_until(lambda: _num_cancelled(server) - cancelled_before == 128, "all are cancelled")


def _num_cancelled(server: RunningServer) -> int:
    return int(server.stats()["gateway"]["outcomes"].get("cancelled", 0))


def test_deadlines_that_pass_under_load_free_everything(server: RunningServer) -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            ends = await asyncio.gather(
                *(
                    client.generate(
                        "oracle", _prompt(i), seed=i, max_new_tokens=3000, timeout=0.05 + i / 500
                    )
                    for i in range(REQUESTS // 2)
                ),
                return_exceptions=True,
            )
        assert {type(end).__name__ for end in ends} == {"DeadlineExceeded"}

    asyncio.run(main())
