from __future__ import annotations

import asyncio
import socket
import subprocess
import sys

import pytest
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


@pytest.mark.parametrize(("wanted", "allowed"), [(50, 64), (100, 100), (200, 128)])
def test_the_bound_on_descriptors_is_raised_as_far_as_it_goes(wanted: int, allowed: int) -> None:
    # In a process of its own: a hard bound cannot be taken back.
    code = (
        "import resource as r\n"
        "from tensorwire_server.telemetry.process import raise_descriptor_limit as raise_it\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (64, 128))\n"
        f"print(raise_it({wanted}), r.getrlimit(r.RLIMIT_NOFILE)[0])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [str(allowed)] * 2
