"""Cut connections: a proxy resets the socket at every byte, and no caller may notice."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tensorwire

from .proxy import Proxy
from .serving import RunningServer, assert_oracle, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tensorwire import Delta

pytestmark = pytest.mark.slow

PROMPT, TOKENS = "cut me", 12


def check(deltas: list[Delta], generation: tensorwire.Generation, seed: int) -> None:
    """Fail unless the stream was whole: each token and character once, in order."""
    assert_oracle(generation, PROMPT, seed, TOKENS)
    assert [token for delta in deltas for token in delta.token_ids] == generation.token_ids
    assert "".join(delta.text for delta in deltas) == generation.text
    index = 0
    for delta in deltas:
        assert delta.index == index
        index += len(delta.token_ids)


def stream_sync(address: str, seed: int) -> None:
    """Read one stream with the sync client, and check it."""
    with tensorwire.Client(address, timeout=20.0) as client:
        stream = client.stream("oracle", PROMPT, seed=seed, max_new_tokens=TOKENS)
        check(list(stream), stream.generation, seed)


def stream_async(address: str, seed: int) -> None:
    """Read one stream with the async client, and check it."""

    async def read() -> None:
        async with tensorwire.AsyncClient(address, timeout=20.0) as client:
            stream = client.stream("oracle", PROMPT, seed=seed, max_new_tokens=TOKENS)
            check([delta async for delta in stream], stream.generation, seed)

    asyncio.run(read())


READERS = {"sync": stream_sync, "async": stream_async}


@pytest.fixture(scope="module")
def quick_server() -> Iterator[RunningServer]:
    """A server whose streams are long enough to be cut, and short enough for many."""
    with RunningServer("oracle:step_ms=1", "echo:") as server:
        yield server.ready()


@pytest.fixture
def server(quick_server: RunningServer) -> Iterator[RunningServer]:
    """The shared server; what was cut must be given back."""
    stream_sync(quick_server.address, 0)
    quick_server.watcher.tokenize("oracle", "x" * 1000)
    baseline = quick_server.held()
    yield quick_server
    quick_server.assert_back_at(baseline)


def recorded_bytes(server: RunningServer, read: Callable[[str, int], None]) -> list[int]:
    """Return how many bytes an undisturbed stream sends up and down, at most."""
    most = [0, 0]
    for seed in range(3):
        with Proxy(server.address, []) as proxy:
            read(proxy.address, seed)
            most = [max(a, b) for a, b in zip(most, proxy.num_bytes, strict=True)]
    return most


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("client", READERS)
def test_a_stream_is_whole_wherever_its_connection_is_cut(
    server: RunningServer, client: str, direction: str
) -> None:
    read = READERS[client]
    up, down = recorded_bytes(server, read)
    offsets = range(1, up + 1) if direction == "up" else range(1, down + 1)

    def cut_at(offset: int) -> int:
        cut = (offset, None) if direction == "up" else (None, offset)
        with Proxy(server.address, [cut]) as proxy:
            read(proxy.address, offset)
            return proxy.num_connections

    before = server.stats()["gateway"]["outcomes"]
    with ThreadPoolExecutor(8) as pool:
        connections = list(pool.map(cut_at, offsets))
    after = server.stats()["gateway"]["outcomes"]
    # Each ran once: nothing was stopped and begun anew.
    assert after == before | {"length": before["length"] + len(offsets)}
    # Only the very last bytes may be cut behind everything that matters.
    assert max(connections) <= 3
    assert connections.count(2) >= len(offsets) * 0.7


@pytest.mark.parametrize("client", READERS)
def test_streams_that_share_connections_with_random_cuts_are_whole(
    server: RunningServer, client: str
) -> None:
    chance = random.Random(5)
    count = 200

    def read_sync(address: str) -> None:
        with tensorwire.Client(address, timeout=20.0) as shared, ThreadPoolExecutor(8) as pool:

            def read(seed: int) -> None:
                stream = shared.stream("oracle", PROMPT, seed=seed, max_new_tokens=count)
                assert len(list(stream)) > 1
                assert_oracle(stream.generation, PROMPT, seed, count)

            list(pool.map(read, range(8)))

    def read_async(address: str) -> None:
        async def main() -> None:
            async with tensorwire.AsyncClient(address, timeout=20.0) as shared:

                async def read(seed: int) -> None:
                    stream = shared.stream("oracle", PROMPT, seed=seed, max_new_tokens=count)
                    assert len([delta async for delta in stream]) > 1
                    assert_oracle(stream.generation, PROMPT, seed, count)

                await asyncio.gather(*map(read, range(8)))

        asyncio.run(main())

    for _ in range(10):
        # Behind WELCOME. Twice, because a third cut without an event in between may end a call.
        cuts: list[tuple[int | None, int | None]] = [
            (None, chance.randint(700, 6000)) for _ in range(2)
        ]
        with Proxy(server.address, cuts) as proxy:
            (read_sync if client == "sync" else read_async)(proxy.address)
            assert proxy.num_connections == 3


@pytest.mark.parametrize("client", READERS)
def test_calls_that_share_connections_are_answered_wherever_what_they_send_is_cut(
    server: RunningServer, client: str
) -> None:
    chance = random.Random(7)
    arrays = [np.full(6, number, np.float32) for number in range(64)]  # more than retries in store

    def call_sync(address: str) -> list[Any]:
        with tensorwire.Client(address, timeout=20.0) as shared, ThreadPoolExecutor(64) as pool:
            return list(pool.map(lambda array: shared.infer("echo", {"x": array})["x"], arrays))

    def call_async(address: str) -> list[Any]:
        async def main() -> list[Any]:
            async with tensorwire.AsyncClient(address, timeout=20.0) as shared:
                calls = (shared.infer("echo", {"x": array}) for array in arrays)
                return [answer["x"] for answer in await asyncio.gather(*calls)]

        return asyncio.run(main())

    for most in [200, 1000, 6000] * 4:
        # Before WELCOME or behind it. Twice: a third one without an answer may end a call.
        cuts: list[tuple[int | None, int | None]] = [
            (chance.randrange(most), None) for _ in range(2)
        ]
        with Proxy(server.address, cuts) as proxy:
            answers = (call_sync if client == "sync" else call_async)(proxy.address)
            assert np.array_equal(answers, arrays)


@pytest.mark.parametrize("offset", [0, 60, 120, 160, 200, 240])
def test_an_answer_in_one_piece_comes_once_wherever_its_connection_is_cut(
    server: RunningServer, offset: int
) -> None:
    array = np.arange(6, dtype=np.float32)
    for cut in ((offset, None), (None, offset + 40)):
        with (
            Proxy(server.address, [cut]) as proxy,
            tensorwire.Client(proxy.address, timeout=20.0) as client,
        ):
            assert np.array_equal(client.infer("echo", {"x": array})["x"], array)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [100_000, 1_000_000])  # in one frame, and in a body of several
@pytest.mark.parametrize("client", READERS)
def test_an_answer_that_is_too_large_to_be_kept_is_computed_again(
    server: RunningServer, client: str, size: int
) -> None:
    array = np.arange(size, dtype=np.float32)

    async def call_async(address: str) -> Any:
        async with tensorwire.AsyncClient(address, timeout=20.0) as asking:
            return await asking.infer("echo", {"x": array})

    def call_sync(address: str) -> Any:
        with tensorwire.Client(address, timeout=20.0) as asking:
            return asking.infer("echo", {"x": array})

    before = server.stats()["gateway"]["outcomes"].get("ok", 0)
    with Proxy(server.address, [(None, array.nbytes // 2)]) as proxy:
        answer = (
            call_sync(proxy.address) if client == "sync" else asyncio.run(call_async(proxy.address))
        )
        assert np.array_equal(answer["x"], array)
        assert proxy.num_connections == 2
    assert server.stats()["gateway"]["outcomes"]["ok"] == before + 2


def test_a_client_that_vanishes_costs_the_worker_no_more_than_the_grace(
    serve: Callable[..., RunningServer],
) -> None:
    server = serve("oracle:step_ms=5", "--set", "outcomes.resume_grace_s=0.3").ready()
    server.watcher.health()
    with Proxy(server.address, [(None, 1500)]) as proxy:
        client = tensorwire.Client(proxy.address, max_attempts=1)
        stream = client.stream("oracle", PROMPT, max_new_tokens=4000)
        with pytest.raises(tensorwire.ConnectionLost) as lost:
            list(stream)
        assert lost.value.detail["partial"].token_ids
    assert server.stats()["gateway"]["live_requests"] == 1

    def outcomes() -> Any:
        return server.stats()["gateway"]["outcomes"].get("cancelled") == 1

    wait_until(outcomes, "the request is stopped", 3.0)
    assert server.stats()["gateway"]["live_requests"] == 0


def test_closing_a_client_stops_what_it_left_at_once(server: RunningServer) -> None:
    before = server.stats()["gateway"]["outcomes"].get("cancelled", 0)
    client = tensorwire.Client(server.address)
    stream = client.stream("oracle", PROMPT, max_new_tokens=4000)
    next(stream)
    client.close()

    def is_stopped() -> bool:
        outcomes = server.stats()["gateway"]["outcomes"]
        return bool(outcomes.get("cancelled", 0) == before + 1)

    wait_until(is_stopped, "the stream is cancelled", 2.0)


def test_a_client_finds_the_server_that_took_the_port_over(
    serve: Callable[..., RunningServer],
) -> None:
    """What had not begun to arrive is sent again; SIGTERM of the first one ends in time."""
    first = serve("oracle:step_ms=1").ready()
    port = int(first.address.rpartition(":")[2])
    with tensorwire.Client(first.address, timeout=20.0) as client:
        assert_oracle(client.generate("oracle", "a", seed=1, max_new_tokens=5), "a", 1, 5)
        assert first.terminate() == 0
        serve("oracle:step_ms=1", port=port).ready()
        assert_oracle(client.generate("oracle", "b", seed=2, max_new_tokens=5), "b", 2, 5)
