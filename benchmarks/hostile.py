"""How much of its throughput a healthy client keeps while somebody attacks the same gateway.

    .venv/bin/python benchmarks/hostile.py --rounds 5

Each round measures the client without and with the attacker, then the attacker alone; ratios are
taken within a round. Attackers come back when they are cut, a bounded number of times a second, and
run at the lowest priority: in truth they would burn somebody else's processor. Where client and
server share two cores, what the attacker's process takes from both looks like what the gateway
loses; the share of a core that the gateway spends on the attacker alone does not have that flaw.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from serving import serving
from tensorwire import AsyncClient
from tensorwire_protocol.codec import encode
from tensorwire_protocol.connection import Connection
from tensorwire_protocol.frames import build_frame
from tensorwire_protocol.limits import CLIENT_LINK
from tensorwire_protocol.messages import Cancel, Kind, Message, Ping, Pong, Request
from tensorwire_protocol.roles import Role

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

_DEPTH = 16  # requests that the healthy client has in flight
_WARM_S = 0.5
_GREETING = b"".join(Connection(Role.CLIENT).take_output())
_TICK_S = os.sysconf("SC_CLK_TCK")


# -- attackers: each is one visit, which ends when the gateway has cut it --------------------------


def _wire(*messages: Message) -> bytes:
    return b"".join(part for message in messages for part in encode(message, CLIENT_LINK))


def _generate(stream: int) -> Request:
    return Request(
        stream=stream,
        op="generate",
        key=os.urandom(16),
        model="oracle",
        inputs={"prompt": "x"},
        params={"max_new_tokens": 3000},
    )


def _flood(make: Callable[[], bytes]) -> Callable[[socket.socket], None]:
    flood = make()

    def visit(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.sendall(_GREETING)
            while True:
                sock.sendall(flood)

    return visit


def _resets() -> bytes:
    return b"".join(_wire(_generate(i), Cancel(stream=i)) for i in range(1, 1000))


def _bombs() -> bytes:
    bomb = b"\xdc\x3f\xf0" + b"\x80" * 0x3FF0
    return b"".join(build_frame(Kind.REQ, i, bomb) for i in range(1, 1000))


def _trickle(first: socket.socket) -> None:
    """Send one byte of a frame on each of 200 connections, and the next when all had one."""
    socks = [first] + [socket.create_connection(first.getpeername()) for _ in range(199)]
    with contextlib.suppress(OSError):
        for sock in socks:
            sock.sendall(_GREETING)
        for byte in _wire(_generate(1)):
            for sock in socks:
                sock.sendall(bytes([byte]))
            time.sleep(1)
    for sock in socks:
        sock.close()


def _gorge(sock: socket.socket) -> None:
    """Ask for large answers and read none."""
    block = np.zeros(128 * 1024, np.float32)
    asked = [
        Request(stream=i, op="infer", key=os.urandom(16), model="echo", inputs={"x": block})
        for i in range(1, 33)
    ]
    with contextlib.suppress(OSError):
        sock.settimeout(5)
        sock.sendall(_GREETING + _wire(*asked))
        while True:
            sock.sendall(_wire(Pong()))  # until it is cut
            time.sleep(0.1)


def _strangers(first: socket.socket) -> None:
    """Be there without a word, six hundred times."""
    socks = [first] + [socket.create_connection(first.getpeername()) for _ in range(600)]
    time.sleep(1)
    for sock in socks:
        sock.close()


ATTACKS: dict[str, Callable[[], Callable[[socket.socket], None]]] = {
    "resets": lambda: _flood(_resets),
    "pings": lambda: _flood(lambda: _wire(*[Ping()] * 1000)),
    "pongs": lambda: _flood(lambda: _wire(*[Pong()] * 1000)),
    "bombs": lambda: _flood(_bombs),
    "trickling": lambda: _trickle,
    "not-reading": lambda: _gorge,
    "strangers": lambda: _strangers,
}


def attack(name: str, address: str, visits_per_s: float) -> None:
    """Visit until killed; say so before the first time."""
    os.nice(19)
    visit = ATTACKS[name]()
    host, _, port = address.rpartition(":")
    print("begun", flush=True)
    while True:
        began = time.monotonic()
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            visit(sock)
        time.sleep(max(0.0, began + 1 / visits_per_s - time.monotonic()))


# -- the healthy client ---------------------------------------------------------------------------


def _cpu_s(pid: int) -> float:
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / _TICK_S


def _rss_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def _measure(client: AsyncClient, seconds: float) -> float:
    num_right = 0
    values = np.arange(16, dtype=np.float32)
    right = values.tobytes()

    async def ask() -> None:
        nonlocal num_right
        while time.monotonic() < until:
            answer = await client.infer("echo", {"x": values})
            assert np.asarray(answer["x"]).tobytes() == right, "a wrong answer"
            num_right += 1

    until = time.monotonic() + _WARM_S
    await asyncio.gather(*[ask() for _ in range(_DEPTH)])
    num_right, began = 0, time.monotonic()
    until = began + seconds
    await asyncio.gather(*[ask() for _ in range(_DEPTH)])
    return num_right / (time.monotonic() - began)


async def _compare(
    name: str, address: str, pid: int, *, rounds: int, seconds: float, visits_per_s: float
) -> None:
    quiet, attacked, shares = [], [], []
    async with AsyncClient(address) as client:
        for _ in range(rounds):
            quiet.append(await _measure(client, seconds))
            async with _attacking(name, address, visits_per_s):
                attacked.append(await _measure(client, seconds))
                cpu_s, began = _cpu_s(pid), time.monotonic()
                await asyncio.sleep(seconds)
                shares.append((_cpu_s(pid) - cpu_s) / (time.monotonic() - began))
    kept = [b / a for a, b in zip(quiet, attacked, strict=True)]
    print(
        f"{name:12} throughput kept {statistics.median(kept):.2f}"
        f" [{min(kept):.2f}..{max(kept):.2f}]   the gateway's share of a core for the attacker"
        f" {statistics.median(shares):.3f} [{min(shares):.3f}..{max(shares):.3f}]"
        f"   gateway {_rss_mib(pid):.0f} MiB",
        flush=True,
    )


@contextlib.asynccontextmanager
async def _attacking(name: str, address: str, visits_per_s: float) -> AsyncIterator[None]:
    attacker = await asyncio.create_subprocess_exec(
        sys.executable, __file__,
        "--attack", name, "--address", address, "--visits-per-s", str(visits_per_s),
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert attacker.stdout is not None
    await attacker.stdout.readline()
    try:
        yield
    finally:
        attacker.kill()
        await attacker.wait()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--visits-per-s", type=float, default=10.0)
    parser.add_argument("--only", nargs="*", default=list(ATTACKS), choices=list(ATTACKS))
    parser.add_argument("--attack", choices=list(ATTACKS), help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.attack:
        attack(given.attack, given.address, given.visits_per_s)
    # Outcomes are kept by design; here they would look like the attackers' doing.
    with serving("echo:", "oracle:", "--set", "outcomes.keys=100") as served:
        for name in given.only:
            asyncio.run(
                _compare(
                    name,
                    served.address,
                    served.pid,
                    rounds=given.rounds,
                    seconds=given.seconds,
                    visits_per_s=given.visits_per_s,
                )
            )


if __name__ == "__main__":
    main()
