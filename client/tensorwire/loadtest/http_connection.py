"""As much of HTTP/1.1 as a load tester needs: requests with JSON, answers read as they come.

Hand-made on asyncio's streams: what a general client does for each chunk would be measured as the
server's time.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from tensorwire_protocol.errors import BadParams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_LINE_BYTES = 1 << 20  # of a header or of one event
_BODY_BYTES = 64 << 20
_MAX_HEADERS = 100
_CONNECT_S = 10.0
_PORTS = {"http": 80, "https": 443}


class BadHttp(OSError):
    """The server does not speak HTTP/1.1 as it should."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """Where a server's API begins."""

    host: str
    port: int
    path: str
    is_tls: bool

    @classmethod
    def parse(cls, address: str | None) -> Self:
        """Return what `http://host:port/v1` means; without a path it is /v1.

        Raises:
            BadParams: it is no such address.
        """
        text = address or ""
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            port = parts.port
        except ValueError as error:
            raise BadParams(f"{address!r} is no address of an HTTP server: {error}") from error
        if parts.scheme not in _PORTS or not parts.hostname:
            raise BadParams(f"{address!r} is no address of an HTTP server: write http://host:port")
        return cls(
            host=parts.hostname,
            port=port or _PORTS[parts.scheme],
            path=parts.path.rstrip("/") or "/v1",
            is_tls=parts.scheme == "https",
        )


class HttpConnection:
    """One connection, for one request at a time; `is_reusable` says if another may follow."""

    def __init__(
        self, base: Base, token: str | None, streams: tuple[asyncio.StreamReader, Any]
    ) -> None:
        self._base = base
        self._reader, self._writer = streams
        self._head = f"Host: {base.host}:{base.port}\r\nContent-Type: application/json\r\n"
        if token is not None:
            self._head += f"Authorization: Bearer {token}\r\n"
        self.status = 0
        self.is_reusable = False
        self._headers: dict[str, str] = {}

    @classmethod
    async def open(cls, base: Base, token: str | None = None) -> Self:
        """Connect.

        Raises:
            OSError: nobody answers.
        """
        async with asyncio.timeout(_CONNECT_S):
            streams = await asyncio.open_connection(
                base.host, base.port, ssl=True if base.is_tls else None, limit=_LINE_BYTES
            )
        return cls(base, token, streams)

    async def post(self, path: str, value: Any) -> None:
        """Send a request and read the head of its answer into `status`.

        Raises:
            OSError: the connection was lost, or the answer is none.
        """
        self.is_reusable = False
        body = json.dumps(value).encode()
        head = (
            f"POST {self._base.path}{path} HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n"
        )
        self._writer.write(head.encode() + b"\r\n" + body)
        await self._read_head()

    async def _read_head(self) -> None:
        version, _, rest = (await self._line()).partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise BadHttp(f"an answer begins with {version[:40]!r}, not with a status of HTTP/1.1")
        self.status = int(rest[:3])
        self._headers = {}
        for _ in range(_MAX_HEADERS):
            line = await self._line()
            if not line:
                return
            name, _, value = line.partition(":")
            self._headers[name.lower()] = value.strip().lower()
        raise BadHttp(f"an answer has more than {_MAX_HEADERS} headers")

    async def _line(self) -> str:
        try:
            line = await self._reader.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError("the server closed the connection") from error
        except asyncio.LimitOverrunError as error:
            raise BadHttp(f"a line is longer than {_LINE_BYTES} bytes") from error
        return line.rstrip(b"\r\n").decode("latin-1")

    async def body(self) -> bytes:
        """Return the whole body.

        Raises:
            OSError: the connection was lost, or it is longer than 64 MiB.
        """
        parts: list[bytes] = []
        size = 0
        async for part in self._parts():
            size += len(part)
            if size > _BODY_BYTES:
                raise BadHttp(f"an answer is longer than {_BODY_BYTES} bytes")
            parts.append(part)
        return b"".join(parts)

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the data of server-sent events as they come.

        Raises:
            OSError: the connection was lost, or an event is longer than 1 MiB.
        """
        rest = b""
        async for part in self._parts():
            *lines, rest = (rest + part).split(b"\n")
            if len(rest) > _LINE_BYTES:
                raise BadHttp(f"an event is longer than {_LINE_BYTES} bytes")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip()

    async def _parts(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes."""
        if "chunked" in self._headers.get("transfer-encoding", ""):
            while size := self._size((await self._line()).partition(";")[0], 16):
                yield await self._exactly(size)
                await self._line()
            while await self._line():
                pass
        elif "content-length" in self._headers:
            left = self._size(self._headers["content-length"], 10)
            while left:
                part = await self._reader.read(min(left, 1 << 16))
                if not part:
                    raise ConnectionResetError("the server closed the connection")
                left -= len(part)
                yield part
        else:
            while part := await self._reader.read(1 << 16):
                yield part
            return
        self.is_reusable = self._headers.get("connection") != "close"

    @staticmethod
    def _size(text: str, base: int) -> int:
        try:
            size = int(text, base)
        except ValueError:
            size = -1
        if not 0 <= size <= _BODY_BYTES:
            raise BadHttp(f"{text[:40]!r} is no size of at most {_BODY_BYTES} bytes")
        return size

    async def _exactly(self, size: int) -> bytes:
        try:
            return await self._reader.readexactly(size)
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError("the server closed the connection") from error

    def close(self) -> None:
        """Break the connection: a server that still works on the answer can stop."""
        self._writer.transport.abort()
