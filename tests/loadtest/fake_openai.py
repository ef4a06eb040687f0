"""A small HTTP server in OpenAI's style; the model's name says what happens.

plain      as many words as asked for, one a chunk, then usage and [DONE]
terse      the last chunk says why it ends and holds the usage; no [DONE]
thinking   what it thinks comes as reasoning_content
double     two tokens in each chunk: usage says so
busy       503
parting    as plain, and the connection is closed behind it, which no header says
cut        the connection is closed after two chunks
endless    chunks until the client leaves
silent     the head of an answer, and nothing more
nonsense   events that are no JSON
rude       no HTTP at all
"""

from __future__ import annotations

import asyncio
import json
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Self

_PAUSE_S = 0.001


class FakeOpenAi:
    """Serves on a port of its own, on a thread of its own."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.num_connections = 0
        self.num_left = 0  # streams that the client left
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        )
        self._server = starting.result(10)
        self.address = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while await self._answer_one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        path = head[0].split()[1]
        size = next(int(h.split(":")[1]) for h in head if h.lower().startswith("content-length"))
        value = json.loads(await reader.readexactly(size))
        self.requests.append((path, value))
        model = value["model"]
        if model == "rude":
            writer.write(b"SSH-2.0-OpenSSH\r\n")
            return False
        if model == "busy":
            body = b'{"error": {"message": "try later"}}'
            writer.write(b"HTTP/1.1 503 Busy\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            return True
        if path.endswith("/embeddings"):
            usage = {"prompt_tokens": 3}
            body = json.dumps({"data": [{"embedding": [0.5, 0.25]}], "usage": usage}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            return True
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        return await self._stream(path, value, writer) and model != "parting"

    async def _stream(self, path: str, value: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        model, count = value["model"], value["max_tokens"]
        if model == "silent":
            await asyncio.sleep(1e6)
        if model == "nonsense":
            _chunk(writer, b"data: {\n\n")
        i = 0
        while model == "endless" or i < count:
            if model == "cut" and i == 2:
                return False
            piece: dict[str, Any] = {"text": f"w{i} "}
            if path.endswith("/chat/completions"):
                name = "reasoning_content" if model == "thinking" else "content"
                piece = {"delta": {name: f"w{i} "}}
            _event(writer, {"choices": [piece]})
            i += 1
            try:
                await writer.drain()
            except ConnectionError:
                self.num_left += 1
                raise
            await asyncio.sleep(_PAUSE_S)
        made = count * (2 if model == "double" else 1)
        usage = {"prompt_tokens": 7, "completion_tokens": made}
        if model == "terse":
            _event(writer, {"choices": [{"text": "", "finish_reason": "length"}], "usage": usage})
        else:
            _event(writer, {"choices": [], "usage": usage})
            _chunk(writer, b"data: [DONE]\n\n")
        _chunk(writer, b"")
        return True


def _event(writer: asyncio.StreamWriter, value: dict[str, Any]) -> None:
    _chunk(writer, f"data: {json.dumps(value)}\n\n".encode())


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    # Cut in the middle of lines, as networks do.
    half = len(data) // 2
    for part in (data[:half], data[half:]) if half else (data,):
        writer.write(b"%x\r\n%s\r\n" % (len(part), part))
