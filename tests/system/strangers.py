"""Bare connections that say whatever they like, and somebody well-behaved beside them."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

from tensorwire_protocol.connection import Connection
from tensorwire_protocol.frames import HEADER, FrameDecoder
from tensorwire_protocol.roles import Role

from .serving import PATIENCE_S, assert_oracle, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tensorwire_protocol.frames import Frame

    from .serving import RunningServer

MIB = 1024 * 1024


def greeting() -> bytes:
    return b"".join(Connection(Role.CLIENT).take_output())


def header(
    body: int, kind: int, *, flags: int = 0, aux: int = 0, stream: int = 0, meta: int = 0
) -> bytes:
    return HEADER.pack(body, kind, flags, aux, stream, meta)


def connect(server: RunningServer) -> socket.socket:
    host, _, port = server.address.partition(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE_S)


def read_to_end(sock: socket.socket, within_s: float = 2.0) -> bytes:
    """Return everything until the server closes."""
    sock.settimeout(within_s)
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(65536):
            received += part
    return received


def frames_of(data: bytes, *, whole: bool = True) -> list[Frame]:
    """Return the frames in `data`, which ends with one if it is `whole`."""
    decoder = FrameDecoder(max_frame_bytes=MIB)
    decoder.get_buffer()[: len(data)] = data
    decoder.received(len(data))
    frames = []
    while (frame := decoder.next_frame()) is not None:
        frames.append(frame)
    assert not (whole and decoder.is_mid_frame), "the last words were cut"
    return frames


class Innocent:
    """A client whose streams go on, one after the other, whatever others do."""

    def __init__(self, server: RunningServer) -> None:
        self.num_done = 0
        self.errors: list[BaseException] = []
        self._server = server
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            with self._server.client() as client:
                while not self._is_over.is_set():
                    made = client.generate("oracle", "calm", seed=self.num_done, max_new_tokens=16)
                    assert_oracle(made, "calm", self.num_done, 16)
                    self.num_done += 1
        except BaseException as error:
            self.errors.append(error)

    def see_another(self) -> None:
        """Wait until a stream that began after this call is through."""
        target = self.num_done + 2
        wait_until(lambda: self.num_done >= target or self.errors, "the innocent one is served")
        assert self.errors == []

    def end(self) -> None:
        self._is_over.set()
        self._thread.join(PATIENCE_S)
        assert self.errors == []

    def start(self) -> None:
        self._thread.start()


def gateway_rss(server: RunningServer) -> int:
    rss: int = server.stats()["gateway"]["rss_bytes"]
    return rss


def assert_costs_no_memory(server: RunningServer, attack: Callable[[], None]) -> None:
    """Fail if an attack leaves memory behind each time, 8 MiB with three of them.

    How much lies about at most while it runs depends on who is faster, and what the allocator once
    had it may keep: so the first times may leave something. A leak is there every time.
    """
    for _ in range(5):
        before = gateway_rss(server)
        for _ in range(3):
            attack()
        grown = gateway_rss(server) - before
        if grown < 8 * MIB:
            return
    raise AssertionError(f"the gateway has grown by {grown / MIB:.1f} MiB, and goes on growing")
