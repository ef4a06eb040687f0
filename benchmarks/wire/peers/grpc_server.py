"""The same echo over grpc.aio, and tokens by server streaming. Usage: PORT"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import grpc  # type: ignore[import-not-found,import-untyped,unused-ignore]
import msgpack
import uvloop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

# By default messages above 4 MB are refused.
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


async def echo(request: bytes, _: Any) -> bytes:
    """Decode, and encode again."""
    answer: bytes = msgpack.packb(msgpack.unpackb(request, max_bin_len=1 << 31))
    return answer


async def tokens(request: bytes, _: Any) -> AsyncIterator[bytes]:
    """Send as many events as were asked for, made as they are needed."""
    for index in range(msgpack.unpackb(request)):
        yield msgpack.packb({"i": index, "t": [31337], "s": "x"})


async def main() -> None:
    """Serve until killed."""
    server = grpc.aio.server(options=OPTIONS)
    handlers = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Tokens": grpc.unary_stream_rpc_method_handler(tokens),
    }
    handler = grpc.method_handlers_generic_handler("wire.Bench", handlers)
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
