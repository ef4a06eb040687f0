"""TLS on a blocking socket, against an SSL object that answers by hand."""

from __future__ import annotations

import socket
import ssl
import threading
from typing import TYPE_CHECKING

import pytest
from certificates import Certificate, make_certificate
from tensorwire_protocol.transports.blocking import _readable
from tensorwire_protocol.transports.tls import TlsSocket

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE_S = 10.0


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"))


class Pair:
    """A client's TlsSocket, and the server's end as records in memory."""

    def __init__(self, certificate: Certificate) -> None:
        self.near, self.far = socket.socketpair()
        self.near.settimeout(PATIENCE_S)
        self.far.settimeout(PATIENCE_S)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate.cert, certificate.key)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.server = context.wrap_bio(self._in, self._out, server_side=True)
        thread = threading.Thread(target=self._shake_hands)
        thread.start()
        trusting = ssl.create_default_context(cafile=certificate.cert)
        self.client = TlsSocket(self.near, trusting, "localhost")
        thread.join(PATIENCE_S)

    def _shake_hands(self) -> None:
        while True:
            try:
                self.server.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.far.sendall(self._out.read())
                self._in.write(self.far.recv(65536))
        self.far.sendall(self._out.read())

    def records(self, data: bytes) -> bytes:
        """Return `data` as the server would send it."""
        self.server.write(data)
        return self._out.read()

    def read(self, size: int) -> bytes:
        """Return what the client sent."""
        got = b""
        while len(got) < size:
            try:
                got += self.server.read(size)
            except ssl.SSLWantReadError:
                self._in.write(self.far.recv(65536))
        return got

    def read_to_end(self) -> bytes:
        """Return what the client sent before it said that it ends."""
        self._in.write(self.far.recv(65536))
        return self.server.read(100)  # raises SSLWantReadError if it did not say so

    def receive(self, size: int, buffer_bytes: int) -> bytes:
        """Read `size` bytes through a buffer of some size."""
        got = b""
        buffer = memoryview(bytearray(buffer_bytes))
        while len(got) < size:
            try:
                got += bytes(buffer[: self.client.recv_into(buffer)])
            except BlockingIOError:
                assert not self.client.has_buffered
        return got


@pytest.fixture
def pair(certificate: Certificate) -> Iterator[Pair]:
    made = Pair(certificate)
    yield made
    made.client.close()
    made.far.close()


def test_both_directions_carry_bytes(pair: Pair) -> None:
    pair.client.sendall(b"ping" * 20_000)
    pair.far.settimeout(PATIENCE_S)
    assert pair.read(80_000) == b"ping" * 20_000
    pair.far.sendall(pair.records(b"pong"))
    assert pair.receive(4, 100) == b"pong"


@pytest.mark.parametrize("buffer_bytes", [1, 7, 20_000, 100_000])
def test_nothing_is_left_behind_whatever_the_buffer(pair: Pair, buffer_bytes: int) -> None:
    data = bytes(range(256)) * 200
    pair.far.sendall(pair.records(data))
    assert pair.receive(len(data), buffer_bytes) == data


def test_what_is_already_decrypted_is_told_without_a_poll(pair: Pair) -> None:
    pair.far.sendall(pair.records(b"abcd"))
    assert pair.receive(1, 1) == b"a"
    assert pair.client.has_buffered
    assert _readable(pair.client)(0.0)
    assert pair.receive(3, 3) == b"bcd"


def test_half_a_record_makes_no_reader_wait(pair: Pair) -> None:
    record = pair.records(b"abcd")
    pair.far.sendall(record[:-1])
    buffer = memoryview(bytearray(10))
    with pytest.raises(BlockingIOError):
        pair.client.recv_into(buffer)
    pair.far.sendall(record[-1:])
    assert pair.receive(4, 10) == b"abcd"


def test_a_peer_that_is_gone_is_an_end(pair: Pair) -> None:
    pair.far.sendall(pair.records(b"last"))
    pair.far.close()
    assert pair.receive(4, 100) == b"last"
    assert pair.client.recv_into(memoryview(bytearray(10))) == 0


def test_the_end_is_said_when_the_socket_is_shut_down(pair: Pair) -> None:
    pair.client.shutdown(socket.SHUT_RDWR)
    assert pair.read_to_end() == b""


def test_a_certificate_for_another_name_is_refused(certificate: Certificate) -> None:
    near, far = socket.socketpair()
    with near, far:
        near.settimeout(PATIENCE_S)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate.cert, certificate.key)

        def serve() -> None:
            with pytest.raises(ssl.SSLError):
                context.wrap_socket(far, server_side=True)

        thread = threading.Thread(target=serve)
        thread.start()
        trusting = ssl.create_default_context(cafile=certificate.cert)
        with pytest.raises(ssl.SSLCertVerificationError):
            TlsSocket(near, trusting, "example.org")
        near.close()
        thread.join(PATIENCE_S)
