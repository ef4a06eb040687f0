from __future__ import annotations

import asyncio
import socket

from tensorwire.loadtest.precise_loop import new_precise_loop


def test_timers_below_a_millisecond_are_kept_and_sockets_still_wake_the_loop() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        mine, other = socket.socketpair()
        with mine, other:
            reader, writer = await asyncio.open_connection(sock=mine)
            loop.call_later(0.001, other.send, b"x")
            assert await asyncio.wait_for(reader.read(1), 10) == b"x"
            writer.close()
        waits = []
        for _ in range(50):
            began = loop.time()
            await asyncio.sleep(0.0002)
            waits.append(loop.time() - began)
        return min(waits)

    with asyncio.Runner(loop_factory=new_precise_loop) as runner:
        # epoll would take a whole millisecond every time. The quickest of many: others may run.
        assert 0.0002 <= runner.run(main()) < 0.0009
