"""A real browser that opens a page, and hears what it asks the network for."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LOAD_S = 60.0


class Ear:
    """A proxy that answers nobody, and remembers that it was asked."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.asked: list[bytes] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.recv(1000))

    def close(self) -> None:
        self._socket.close()


def opened(page: str, folder: Path, *words: str) -> tuple[str, list[bytes]]:
    """Return the document that a browser makes of a page, and what it asked the network for."""
    assert CHROMIUM is not None
    path = folder / "page.html"
    path.write_text(page)
    ear = Ear()
    try:
        ran = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--no-first-run", "--disable-extensions", f"--user-data-dir={folder / 'profile'}",
             f"--proxy-server=http://127.0.0.1:{ear.port}", "--proxy-bypass-list=<-loopback>",
             "--dump-dom", *words, path.as_uri()],
            capture_output=True, text=True, timeout=LOAD_S, check=True,
        )  # fmt: skip
    finally:
        ear.close()
    # Chromium itself asks for the time and the like, of hosts that are no page's of ours.
    return ran.stdout, [line for line in map(_first_line, ear.asked) if b"google" not in line]


def _first_line(asked: bytes) -> bytes:
    return asked.partition(b"\r\n")[0]
