"""The same echo over FastAPI: raw body in, raw body out, on uvicorn with all its speed-ups.

Usage: PORT
"""

import sys

import msgpack
import uvicorn  # type: ignore[import-not-found,unused-ignore]
from fastapi import FastAPI, Request, Response  # type: ignore[import-not-found,unused-ignore]

app = FastAPI()


async def echo(request: Request) -> Response:
    """Decode, and encode again."""
    message = msgpack.unpackb(await request.body(), max_bin_len=1 << 31)
    return Response(msgpack.packb(message), media_type="application/msgpack")


app.add_api_route("/echo", echo, methods=["POST"])

if __name__ == "__main__":
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        loop="uvloop",
        http="httptools",
        log_level="error",
        access_log=False,
    )
