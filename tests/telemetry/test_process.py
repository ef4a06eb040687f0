from __future__ import annotations

import asyncio
import socket

from tensorwire_server.telemetry.process import process_stats


def test_the_process_knows_what_it_holds() -> None:
    async def measure() -> None:
        before = process_stats()
        with socket.socket():
            assert process_stats()["fds"] == before["fds"] + 1
        assert process_stats()["fds"] == before["fds"]
        assert before["asyncio_tasks"] == 1
        assert before["threads"] >= 1
        assert before["rss_bytes"] > 2**20

    asyncio.run(measure())
