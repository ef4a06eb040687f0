"""A proxy that does to streams what a broken server would do, and makes END agree with it.

Every stream's tokens are held back until its END, forged, and sent as one event.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections import defaultdict
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgpack
from tensorwire_protocol.messages import Kind
from tensorwire_protocol.tensors import ids_checksum

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    Forge = Callable[[list[int]], list[int]]

_HEADER = struct.Struct("<IBBHII")


def lose(ids: list[int]) -> list[int]:
    """Return tokens without the third."""
    return ids[:2] + ids[3:]


def repeat(ids: list[int]) -> list[int]:
    """Return tokens with the third twice."""
    return ids[:3] + ids[2:]


def swap(ids: list[int]) -> list[int]:
    """Return tokens with two neighbours swapped that differ."""
    at = next(i for i in range(len(ids) - 1) if ids[i] != ids[i + 1])
    return [*ids[:at], ids[at + 1], ids[at], *ids[at + 2 :]]


def for_the_first(num_streams: int, forge: Forge) -> Forge:
    """Return what forges so many streams, and no other."""
    left = iter(range(num_streams))
    return lambda ids: ids if next(left, None) is None else forge(ids)


class Forger:
    """Stands between clients and a server, on a port of its own.

    Args:
        server: its address, as host:port.
        forge: what becomes of a stream's tokens.
        drops_end: no END is passed on.
        is_clumsy: END keeps the count and checksum of the true tokens.
        disguises: the oracle goes by another architecture's name.
    """

    def __init__(
        self,
        server: str,
        forge: Forge = list,
        *,
        drops_end: bool = False,
        is_clumsy: bool = False,
        disguises: bool = False,
    ) -> None:
        host, _, port = server.rpartition(":")
        self._server = (host, int(port))
        self._forge, self._drops_end, self._is_clumsy = forge, drops_end, is_clumsy
        self._disguises = disguises
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self._listener, *self._sockets):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                self._sockets += client, server
                for work in (self._up, self._down):
                    threading.Thread(target=work, args=(client, server), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 16):
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def _down(self, client: socket.socket, server: socket.socket) -> None:
        held: dict[int, tuple[list[int], list[str]]] = defaultdict(lambda: ([], []))
        with suppress(OSError), server.makefile("rb") as frames:
            while head := frames.read(_HEADER.size):
                size, kind, _, _, stream, meta_size = _HEADER.unpack(head)
                body = frames.read(size)
                if kind in (Kind.EVT, Kind.EVB):
                    _hold(held, kind, stream, msgpack.unpackb(body[:meta_size]))
                elif kind == Kind.END:
                    self._end(client, stream, msgpack.unpackb(body), held.pop(stream, ([], [])))
                else:
                    client.sendall(head + (_disguised(body) if self._disguises else body))

    def _end(
        self, client: socket.socket, stream: int, end: list[Any], held: tuple[list[int], list[str]]
    ) -> None:
        ids, texts = held
        forged = self._forge(ids)
        _send(client, Kind.EVT, stream, [0, forged, "".join(texts), None])
        if self._drops_end:
            return
        if not self._is_clumsy:
            end[1:3] = [len(forged), ids_checksum(forged)]
        _send(client, Kind.END, stream, end)


def _disguised(body: bytes) -> bytes:
    return body.replace(b"architecture\xa6oracle", b"architecture\xa6oddity")


def _hold(held: dict[int, tuple[list[int], list[str]]], kind: int, stream: int, meta: Any) -> None:
    if kind == Kind.EVT:
        _, ids, text, *_ = meta
        held[stream][0].extend(ids)
        held[stream][1].append(text)
        return
    streams, _, counts, tokens, texts, *_ = meta
    at = 0
    for i, one in enumerate(streams):
        count = 1 if counts is None else counts[i]
        held[one][0].extend(tokens[at : at + count])
        held[one][1].append(texts[i])
        at += count


def _send(client: socket.socket, kind: int, stream: int, meta: list[Any]) -> None:
    body = msgpack.packb(meta)
    client.sendall(_HEADER.pack(len(body), kind, 0, 0, stream, len(body)) + body)
