"""How much of its throughput a healthy client keeps while somebody attacks the same gateway.

    .venv/bin/python benchmarks/hostile.py --rounds 5

Fails where it keeps less than 90 %, or where an attack leaves the gateway more than 16 MiB larger.
The server asks for a login; attackers have one, but for those that are there before it. Each round
measures the client without and with the attacker, then the attacker alone; ratios are taken within
a round. Attackers come back when they are cut, a bounded number of times a second, and run at the
lowest priority: in truth they would burn somebody else's processor.

Where client and server share two cores, what the attacker's process and the kernel's work for it
take from both looks like what the gateway loses. So each round has a control as well: the same
client of the same gateway, while the attacker visits a bare listener instead (`sink.py`), which
reads and cuts where the gateway does. Only what is kept counts; beside it stands what was kept
beside the bare listener, and the ratio of the two, which is the gateway's own part.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from soak.ground import MIB, Ground, ground
from tensorwire import AsyncClient
from tensorwire_protocol.codec import encode
from tensorwire_protocol.frames import HEADER, build_frame
from tensorwire_protocol.limits import CLIENT_LINK
from tensorwire_protocol.messages import Cancel, Kind, Message, Ping, Pong, Request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    Visit = Callable[[socket.socket, bytes], None]  # a fresh connection, and a greeting for it

_DEPTH = 16  # requests that the healthy client has in flight
_WARM_S = 0.5
_LEAST_KEPT = 0.9
_MOST_GROWTH_BYTES = 16 * MIB
_SINK = Path(__file__).with_name("sink.py")
_TCP_INFO_ACKED = struct.Struct("@120xQ")  # tcpi_bytes_acked
_VARIABLES = ("TENSORWIRE_ADDRESS", "TENSORWIRE_TOKEN")  # of the attacker: others see arguments


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


def _flood(make: Callable[[], bytes]) -> Visit:
    flood = make()

    def visit(sock: socket.socket, greeting: bytes) -> None:
        with contextlib.suppress(OSError):
            sock.sendall(greeting)
            while True:
                sock.sendall(flood)

    return visit


def _resets() -> bytes:
    return b"".join(_wire(_generate(i), Cancel(stream=i)) for i in range(1, 1000))


def _bombs() -> bytes:
    bomb = b"\xdc\x3f\xf0" + b"\x80" * 0x3FF0
    return b"".join(build_frame(Kind.REQ, i, bomb) for i in range(1, 1000))


def _header_bombs() -> bytes:
    """Return the longest table that fits: 65,535 segments, of which each is refused."""
    table = bytes(8 * 65535)
    return b"".join(
        HEADER.pack(len(table) + 1, Kind.REQ, 0, 65535, i, 1) + table + b"\xc0"
        for i in range(1, 300)
    )


def _trickle(first: socket.socket, greeting: bytes) -> None:
    """Send one byte of a frame on each of 200 connections, and the next when all had one."""
    socks = [first] + [socket.create_connection(first.getpeername()) for _ in range(199)]
    with contextlib.suppress(OSError):
        for sock in socks:
            sock.sendall(greeting)
        for byte in _wire(_generate(1)):
            for sock in socks:
                sock.sendall(bytes([byte]))
            time.sleep(1)
    for sock in socks:
        sock.close()


def _gorge(sock: socket.socket, greeting: bytes) -> None:
    """Ask for large answers and read none: the window is zero soon."""
    block = np.zeros(128 * 1024, np.float32)
    asked = [
        Request(stream=i, op="infer", key=os.urandom(16), model="echo", inputs={"x": block})
        for i in range(1, 33)
    ]
    with contextlib.suppress(OSError):
        sock.settimeout(0.3)  # a server that stops reading is left, and visited again
        sock.sendall(greeting + _wire(*asked))
        while True:
            sock.sendall(_wire(Pong()))  # until it is cut
            time.sleep(0.1)


def _strangers(first: socket.socket, _: bytes) -> None:
    """Be there without a word, six hundred times."""
    socks = [first] + [socket.create_connection(first.getpeername()) for _ in range(600)]
    time.sleep(1)
    for sock in socks:
        sock.close()


def _ask_before_login(first: socket.socket, _: bytes) -> None:
    """Ask without a login on a hundred connections, and read no refusal."""
    asked = Ground.greeting_of(None) + _wire(*map(_generate, range(1, 50)))
    socks = [first] + [socket.create_connection(first.getpeername()) for _ in range(99)]
    for sock in socks:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with contextlib.suppress(OSError):
            sock.sendall(asked)
    time.sleep(0.5)
    for sock in socks:
        sock.close()


ATTACKS: dict[str, Callable[[], Visit]] = {
    "resets": lambda: _flood(_resets),
    "pings": lambda: _flood(lambda: _wire(*[Ping()] * 1000)),
    "pongs": lambda: _flood(lambda: _wire(*[Pong()] * 1000)),
    "bombs": lambda: _flood(_bombs),
    "header-bombs": lambda: _flood(_header_bombs),
    "trickling": lambda: _trickle,
    "not-reading": lambda: _gorge,
    "strangers": lambda: _strangers,
    "before-login": lambda: _ask_before_login,
}
_LEAVING = ("trickling", "strangers", "before-login")


def attack(name: str, visits_per_s: float) -> None:
    """Visit until killed; say so before the first time."""
    os.nice(19)
    address, token = (os.environ[variable] for variable in _VARIABLES)
    visit, greeting = ATTACKS[name](), Ground.greeting_of(token)
    host, _, port = address.rpartition(":")
    print("begun", flush=True)
    while True:
        began = time.monotonic()
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            visit(sock, greeting)
        time.sleep(max(0.0, began + 1 / visits_per_s - time.monotonic()))


def bytes_of_visit(name: str, place: Ground) -> int | None:
    """Return how many bytes of one visit are taken before it is cut; None: it leaves by itself."""
    if name in _LEAVING:
        return None
    with place.connect() as sock:
        ATTACKS[name]()(sock, place.greeting())
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_ACKED.size)
        acked: int = _TCP_INFO_ACKED.unpack(info)[0]
        return acked


# -- the healthy client ---------------------------------------------------------------------------


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
    name: str, place: Ground, *, rounds: int, seconds: float, visits_per_s: float
) -> bool:
    """Print what an attack does; say if that is within the bounds."""
    quiet, attacked, control, shares = [], [], [], []
    cut_after = await asyncio.to_thread(bytes_of_visit, name, place)
    async with (
        AsyncClient(place.address, token=place.token) as client,
        _sink(cut_after) as sink,
    ):
        async with _attacking(name, place.address, place.token, visits_per_s):
            await _measure(client, seconds)  # what a first time needs is not counted
        before_bytes = place.rss_bytes
        for _ in range(rounds):
            quiet.append(await _measure(client, seconds))
            async with _attacking(name, sink, place.token, visits_per_s):
                control.append(await _measure(client, seconds))
            async with _attacking(name, place.address, place.token, visits_per_s):
                attacked.append(await _measure(client, seconds))
                cpu_s, began = place.cpu_s, time.monotonic()
                await asyncio.sleep(seconds)
                shares.append((place.cpu_s - cpu_s) / (time.monotonic() - began))
    kept, kept_beside_sink, of_that = (
        [b / a for a, b in zip(before, after, strict=True)]
        for before, after in ((quiet, attacked), (quiet, control), (control, attacked))
    )
    growth_bytes = place.rss_bytes - before_bytes
    is_met = statistics.median(kept) >= _LEAST_KEPT and growth_bytes <= _MOST_GROWTH_BYTES
    print(
        f"{name:12} {'met   ' if is_met else 'MISSED'}"
        f" throughput kept {_spread(kept)}   beside a bare listener {_spread(kept_beside_sink)}"
        f"   of that {_spread(of_that)}"
        f"   the gateway's share of a core for the attacker {_spread(shares)}"
        f"   growth {growth_bytes / MIB:+.1f} MiB",
        flush=True,
    )
    return is_met


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}..{max(values):.2f}]"


@contextlib.asynccontextmanager
async def _sink(cut_after: int | None) -> AsyncIterator[str]:
    """Yield the address of a bare listener."""
    bound = [] if cut_after is None else ["--cut-after", str(cut_after)]
    sink = await asyncio.create_subprocess_exec(
        sys.executable, _SINK, *bound, stdout=subprocess.PIPE
    )
    try:
        assert sink.stdout is not None
        yield (await sink.stdout.readline()).decode().strip()
    finally:
        sink.kill()
        await sink.wait()


@contextlib.asynccontextmanager
async def _attacking(
    name: str, address: str, token: str, visits_per_s: float
) -> AsyncIterator[None]:
    attacker = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--attack", name, "--visits-per-s", str(visits_per_s),
        stdout=subprocess.PIPE,
        env=os.environ | dict(zip(_VARIABLES, (address, token), strict=True)),
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
    given = parser.parse_args()
    if given.attack:
        attack(given.attack, given.visits_per_s)
    # Outcomes are kept by design; here they would look like the attackers' doing.
    with ground("echo:", "oracle:", "--set", "outcomes.keys=100") as place:
        met = [
            asyncio.run(
                _compare(
                    name,
                    place,
                    rounds=given.rounds,
                    seconds=given.seconds,
                    visits_per_s=given.visits_per_s,
                )
            )
            for name in given.only
        ]
    sys.exit(not all(met))


if __name__ == "__main__":
    main()
