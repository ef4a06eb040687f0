"""The peers' clients: one function each, which gives the call for one connection.

Usage: python -m wire.peers.clients PEER HOST:PORT
"""

from __future__ import annotations

import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp  # type: ignore[import-not-found,unused-ignore]
import grpc  # type: ignore[import-not-found,import-untyped,unused-ignore]
import msgpack
from wire.load import Call, Figures, Job, do_jobs, measure, new_runner
from wire.peers.grpc_server import OPTIONS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


def message_of(job: Job) -> dict[str, Any]:
    """Return what is echoed; an array travels as its bytes, without shape and type."""
    if job.kind in ("array", "tensor"):
        return {"m": "echo", "d": b"\1" * job.size_bytes}
    return {"m": "echo", "d": "x" * job.size_bytes}


def unpack(raw: bytes) -> Any:
    """Return the message in `raw`."""
    return msgpack.unpackb(raw, max_bin_len=1 << 31)


@asynccontextmanager
async def grpc_aio(address: str, job: Job) -> AsyncIterator[Call]:
    """One channel of its own; raw bytes with msgpack in them, no protobuf."""
    options = [*OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        await channel.channel_ready()
        unary = channel.unary_unary("/wire.Bench/Echo")
        streaming = channel.unary_stream("/wire.Bench/Tokens")
        message = message_of(job)

        async def echo() -> int:
            unpack(await unary(msgpack.packb(message)))
            return 1

        async def stream() -> int:
            tokens = 0
            async for raw in streaming(msgpack.packb(job.tokens)):
                tokens += len(unpack(raw)["t"])
            return tokens

        yield stream if job.kind == "tokens" else echo


@asynccontextmanager
async def http(url: str, job: Job) -> AsyncIterator[Call]:
    """Keep-alive connections of HTTP/1.1, as many as there are requests in flight."""
    headers = {"content-type": "application/msgpack"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
        message = message_of(job)

        async def echo() -> int:
            async with session.post(url, data=msgpack.packb(message)) as response:
                raw = await response.read()
                if response.status != 200:
                    raise RuntimeError(f"{response.status}: {raw[:200]!r}")
                unpack(raw)
            return 1

        yield echo


def fastapi(address: str, job: Job) -> Any:
    """Post to FastAPI's raw-body route."""
    return http(f"http://{address}/echo", job)


def mosec(address: str, job: Job) -> Any:
    """Post to mosec's one route."""
    return http(f"http://{address}/inference", job)


def main() -> None:
    """Do jobs until stdin ends."""
    connect = {"grpc_aio": grpc_aio, "fastapi": fastapi, "mosec": mosec}[sys.argv[1]]
    address = sys.argv[2]

    def do(job: Job) -> Figures:
        with new_runner() as runner:
            return runner.run(measure(lambda job: connect(address, job), job))

    do_jobs(do)


if __name__ == "__main__":
    main()
