"""What only the async client has: tasks, loops, one dialing for all."""

from __future__ import annotations

import asyncio
import gc
import inspect
import socket
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tensorwire import AsyncClient, AsyncStream, Client, ClientUnusable, ConnectionLost, Stream
from tensorwire_protocol.connection import FEATURE_RESUME, Connection
from tensorwire_protocol.roles import Role

from .fake_server import FakeServer, oracle_tokens

if TYPE_CHECKING:
    from collections.abc import Callable


def test_both_clients_have_the_same_names_and_arguments() -> None:
    for ours, other in ((Client, AsyncClient), (Stream, AsyncStream)):
        names = {name for name in dir(ours) if not name.startswith("_")}
        assert names == {name for name in dir(other) if not name.startswith("_")}
        for name in names:
            if inspect.isfunction(getattr(ours, name)):
                mine = inspect.signature(getattr(ours, name))
                assert mine.parameters == inspect.signature(getattr(other, name)).parameters
    assert inspect.signature(Client).parameters == inspect.signature(AsyncClient).parameters


def test_200_tasks_share_one_connection_that_is_dialed_once(server: FakeServer) -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            made = await asyncio.gather(
                *(client.generate("oracle", str(i), max_new_tokens=5) for i in range(200))
            )
        assert [one.token_ids for one in made] == [oracle_tokens(str(i), 5) for i in range(200)]

    asyncio.run(main())
    assert server.num_connections == 1


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a state of the fake server, which lives on another thread and loop."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def test_cancelling_the_task_sends_cancel(server: FakeServer) -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            task = asyncio.create_task(client.generate("endless", "x"))
            await until(lambda: server.open_runs == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: len(server.cancels) == 1)
            await client.health()

    asyncio.run(main())


def test_cancelling_a_task_that_iterates_sends_cancel(server: FakeServer) -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            begun = asyncio.Event()

            async def iterate() -> None:
                async for _ in client.stream("endless", "x"):
                    begun.set()

            task = asyncio.create_task(iterate())
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            del task
            gc.collect()
            await until(lambda: len(server.cancels) == 1)

    asyncio.run(main())


def test_a_timeout_of_asyncio_sends_cancel(server: FakeServer) -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.generate("silent", "x"), 0.02)
            await until(lambda: len(server.cancels) == 1)

    asyncio.run(main())


def test_leaving_an_async_loop_early_sends_cancel_without_a_with_block(
    server: FakeServer,
) -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            async for _ in client.stream("endless", "x"):
                break
            await until(lambda: len(server.cancels) == 1)

    asyncio.run(main())


def test_a_caller_that_leaves_while_dialing_does_not_stop_the_others(server: FakeServer) -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            first = asyncio.create_task(client.health())
            second = asyncio.create_task(client.health())
            await asyncio.sleep(0)
            first.cancel()
            assert (await second)["status"] == "ready"
            assert first.cancelled()

    asyncio.run(main())
    assert server.num_connections == 1


@pytest.mark.timeout(20)  # what it tests against is a loop that no timer of asyncio's ends
def test_calls_find_the_connection_in_whichever_turn_of_the_loop_they_come(
    server: FakeServer,
) -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            calls = []
            while not client._link.pool.lanes:
                calls.append(asyncio.create_task(client.health()))
                await asyncio.sleep(0)
            answers = await asyncio.gather(*calls)
            assert {answer["status"] for answer in answers} == {"ready"}

    asyncio.run(main())


def test_connecting_that_fails_when_nobody_waits_any_more_is_not_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main(address: str) -> None:
        async with AsyncClient(address) as client:
            call = asyncio.create_task(client.health())
            await asyncio.sleep(0)  # it begins to connect
            dialing = client._link.pool._dialing
            assert dialing is not None
            call.cancel()
            await asyncio.wait([call, dialing])
            assert call.cancelled()
            del call, dialing
            gc.collect()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    asyncio.run(main(address))
    assert caplog.records == []


def test_closing_while_it_connects_is_an_error_and_cancels_no_task_of_the_caller(
    server: FakeServer,
) -> None:
    async def main() -> None:
        client = AsyncClient(server.address)
        stays = asyncio.create_task(client.health())
        leaves = asyncio.create_task(client.health())
        await asyncio.sleep(0)  # they begin to connect
        leaves.cancel()
        await client.close()
        with pytest.raises(ClientUnusable, match="closed"):
            await stays
        with pytest.raises(asyncio.CancelledError):
            await leaves

    asyncio.run(main())


def test_another_event_loop_is_refused(server: FakeServer) -> None:
    client = AsyncClient(server.address)
    asyncio.run(client.health())
    with pytest.raises(ClientUnusable, match="another event loop"):
        asyncio.run(client.health())


def test_another_event_loop_is_refused_while_the_own_one_runs(server: FakeServer) -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            await client.health()
            with pytest.raises(ClientUnusable, match="another event loop"):
                await asyncio.to_thread(asyncio.run, client.health())
            assert (await client.health())["status"] == "ready"

    asyncio.run(main())


def test_one_lost_connection_gives_each_task_an_error_of_its_own(server: FakeServer) -> None:
    async def main() -> list[Any]:
        async with AsyncClient(server.address, max_attempts=1) as client:
            calls = [asyncio.create_task(client.generate("endless", str(i))) for i in range(4)]
            await until(lambda: server.open_runs == 4)
            await asyncio.to_thread(server.abort_all)
            return await asyncio.gather(*calls, return_exceptions=True)

    errors = asyncio.run(main())
    assert all(isinstance(error, ConnectionLost) for error in errors)
    assert len({id(error) for error in errors}) == 4


def test_a_call_that_has_ended_leaves_no_timer_behind(server: FakeServer) -> None:
    async def main() -> int:
        loop: Any = asyncio.get_running_loop()
        async with AsyncClient(server.address) as client:
            await client.health()
            before = sum(not handle.cancelled() for handle in loop._scheduled)
            await client.generate("oracle", ["x"] * 20)
            return sum(not handle.cancelled() for handle in loop._scheduled) - before

    assert asyncio.run(main()) <= 0


def test_two_tasks_may_not_wait_for_one_stream(server: FakeServer) -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client, client.stream("silent", "x") as stream:
            first = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            with pytest.raises(ClientUnusable, match="another task"):
                await anext(stream)
            first.cancel()

    asyncio.run(main())


def test_it_runs_on_uvloop_where_that_is_installed(server: FakeServer) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def main() -> list[int]:
        async with AsyncClient(server.address) as client:
            return (await client.generate("oracle", "x")).token_ids

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()) == oracle_tokens("x")


def test_a_connection_that_nobody_greets_is_closed_with_the_client() -> None:
    async def main() -> None:
        accepted: asyncio.Queue[asyncio.StreamReader] = asyncio.Queue()
        server = await asyncio.start_server(lambda reader, _: accepted.put_nowait(reader), "::1")
        port = server.sockets[0].getsockname()[1]
        client = AsyncClient(f"[::1]:{port}")
        # Large enough for a connection on which nothing is sent before the greeting.
        call = asyncio.create_task(client.infer("m", {"x": np.zeros(1 << 21, np.uint8)}))
        reader = await accepted.get()
        await reader.readexactly(8)  # the client is connected, and waits
        async with asyncio.timeout(2.5):  # the patience with a server that does not greet is 5 s
            await client.close()
            await reader.read()  # to the end
        with pytest.raises(ClientUnusable):
            await call
        server.close()

    asyncio.run(main())


def test_a_connection_that_was_cut_is_replaced_freely_one_that_never_greeted_is_not() -> None:
    async def main() -> None:
        num_accepted = 0

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal num_accepted
            num_accepted += 1
            if num_accepted == 1:
                peer = Connection(Role.SERVER, features=(FEATURE_RESUME,))
                while not peer.num_streams:
                    peer.feed(await reader.read(1 << 16))
                    writer.write(b"".join(peer.take_output()))
            writer.close()

        server = await asyncio.start_server(serve, "::1")
        async with AsyncClient(f"[::1]:{server.sockets[0].getsockname()[1]}") as client:
            while client._link.budget.take(asyncio.get_running_loop().time()):
                pass
            with pytest.raises(ConnectionLost):
                await client.tokenize("m", "x")
        assert num_accepted == 2
        server.close()

    asyncio.run(main())
