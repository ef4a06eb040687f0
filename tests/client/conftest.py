"""The fake server, and both clients behind one synchronous face."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .faces import AsyncFace, Face, SyncFace
from .fake_server import FakeServer

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


@pytest.fixture(params=[SyncFace, AsyncFace], ids=["sync", "async"])
def client(request: pytest.FixtureRequest, server: FakeServer) -> Iterator[Face]:
    """One of the two clients, connected to the fake server."""
    with request.param(server.address) as face:
        yield face
