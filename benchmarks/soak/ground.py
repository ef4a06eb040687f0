"""What the soak programs share: a server that asks for a login, its process, bare connections."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from serving import serving
from tensorwire_protocol.connection import Connection
from tensorwire_protocol.frames import HEADER, HEADER_BYTES
from tensorwire_protocol.login import TokenLogin
from tensorwire_protocol.roles import Role

if TYPE_CHECKING:
    from collections.abc import Iterator

KIB, MIB = 1024, 1024 * 1024
PATIENCE_S = 30.0
_ABORT = struct.pack("ii", 1, 0)  # linger on, for no time: close() resets the connection


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """A running server and the way in."""

    address: str
    pid: int
    token: str

    @property
    def rss_bytes(self) -> int:
        """Resident memory of the gateway."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    @property
    def num_descriptors(self) -> int:
        """Open descriptors of the gateway."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    @property
    def cpu_s(self) -> float:
        """Processor time of the gateway since its start."""
        words = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def is_alive(self) -> bool:
        """Say if the gateway runs."""
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return False

    def workers(self) -> frozenset[int]:
        """Return the processes that the gateway has started."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return frozenset(map(int, children.split()))

    def connect(self) -> socket.socket:
        """Return a connection on which nothing was said."""
        host, _, port = self.address.rpartition(":")
        return socket.create_connection((host, int(port)), timeout=PATIENCE_S)

    def greeting(self, *, logs_in: bool = True) -> bytes:
        """Return preface and HELLO."""
        return self.greeting_of(self.token if logs_in else None)

    @staticmethod
    def greeting_of(token: str | None) -> bytes:
        """Return preface and HELLO of whoever has that token, or none."""
        login = None if token is None else TokenLogin(token=token)
        return b"".join(Connection(Role.CLIENT, login=login).take_output())

    def log_in(self) -> socket.socket:
        """Return a connection that has heard WELCOME."""
        sock = self.connect()
        sock.sendall(self.greeting())
        header = sock.recv(HEADER_BYTES, socket.MSG_WAITALL)
        sock.recv(HEADER.unpack(header)[0], socket.MSG_WAITALL)
        return sock


def reset(sock: socket.socket) -> None:
    """Close a connection without the usual farewell."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
    sock.close()


def allow_descriptors(count: int) -> None:
    """Raise the bound on open files, for this process and the server that it starts.

    Raises:
        SystemExit: the machine does not allow as many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= count:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, max(count, hard)))
    except (ValueError, OSError):
        sys.exit(f"{count} open files are needed and {hard} are allowed: raise `ulimit -n`")


@contextlib.contextmanager
def ground(*words: str) -> Iterator[Ground]:
    """Serve `words` to whoever has the token."""
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/auth.toml"
        command = ["token", "new", "--name", "soak", "--rights", "infer,admin", "--file", file]
        made = subprocess.run(
            [sys.executable, "-m", "tensorwire", *command],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        with serving(*words, "--auth-file", file) as served:
            yield Ground(address=served.address, pid=served.pid, token=made.stdout.split()[-1])
