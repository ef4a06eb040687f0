"""A bare blocking socket: the floor under the sync client.

Usage: python -m wire.bare gateway|echo HOST:PORT

`gateway` sends to the same gateway the same requests as the sync client, as bytes made beforehand
with nothing but the stream and the key changed, and reads each answer to its end. `echo` sends as
many bytes to a server that only sends them back.
"""

from __future__ import annotations

import socket
import struct
import sys
from itertools import count
from typing import TYPE_CHECKING

from tensorwire_protocol.connection import Connection
from tensorwire_protocol.messages import Kind, Request
from tensorwire_protocol.operations import write_text
from tensorwire_protocol.roles import Role
from wire.load import Figures, Job, do_jobs, measure_blocking

if TYPE_CHECKING:
    from collections.abc import Callable

HEADER_BYTES = 16
STREAM_AT = 8
KEY = b"sixteen bytes .."
# Over all connections: a key that was used before would be answered from the kept outcomes.
_keys = count(1)


def frames(job: Job) -> tuple[bytes, bytearray]:
    """Return the opening of a connection, and a request with KEY on stream 1."""
    connection = Connection(Role.CLIENT)
    opening = b"".join(connection.take_output())
    connection.send(
        Request(
            stream=connection.next_stream(),
            op="infer",
            key=KEY,
            model="echo",
            inputs={"text": write_text("x" * job.size_bytes)},
            deadline_ms=300_000,
        )
    )
    return opening, bytearray(b"".join(connection.take_output()))


def to_gateway(sock: socket.socket, job: Job) -> Callable[[], None]:
    """Return the call that sends a request and reads until its RES."""
    opening, request = frames(job)
    key_at = request.index(KEY)
    sock.sendall(opening)
    buffer = memoryview(bytearray(1 << 16))
    numbers = count(1)

    def call() -> None:
        number = next(numbers)
        struct.pack_into("<I", request, STREAM_AT, number)
        struct.pack_into("<Q", request, key_at, next(_keys))
        sock.sendall(request)
        have = 0
        while True:
            have += sock.recv_into(buffer[have:])
            while have >= HEADER_BYTES:
                size = HEADER_BYTES + int.from_bytes(buffer[:4], "little")
                if have < size:
                    break
                if buffer[4] == Kind.ERR:
                    raise RuntimeError(bytes(buffer[:size]))
                if buffer[4] == Kind.RES:
                    return
                buffer[: have - size] = bytes(buffer[size:have])  # WELCOME, or an ACK
                have -= size

    return call


def to_echo(sock: socket.socket, job: Job) -> Callable[[], None]:
    """Return the call that sends as many bytes as a request has, and reads them back."""
    request = frames(job)[1]
    buffer = memoryview(bytearray(len(request)))

    def call() -> None:
        sock.sendall(request)
        have = 0
        while have < len(buffer):
            have += sock.recv_into(buffer[have:])

    return call


def main() -> None:
    """Do jobs until stdin ends."""
    make_call = {"gateway": to_gateway, "echo": to_echo}[sys.argv[1]]
    host, port = sys.argv[2].rsplit(":", 1)

    def do(job: Job) -> Figures:
        with socket.create_connection((host, int(port))) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return measure_blocking(make_call(sock, job), job)

    do_jobs(do)


if __name__ == "__main__":
    main()
