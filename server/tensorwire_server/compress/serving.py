"""A server process with one model, and a connection to it: speed is measured where clients feel it.

It speaks the wire protocol through the protocol package; the client library is not the server's to
import.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import weakref
from typing import TYPE_CHECKING, Any

from tensorwire_protocol.codec.typed import TYPED
from tensorwire_protocol.connection import FEATURE_PASSIVE, Connection
from tensorwire_protocol.errors import TensorwireError
from tensorwire_protocol.messages import TERMINAL, Failure, Request, Result
from tensorwire_protocol.operations import write_ids, write_texts
from tensorwire_protocol.roles import Role
from tensorwire_protocol.transports.blocking import BlockingTransport

from tensorwire_server.compress.errors import MeasurementError
from tensorwire_server.compress.interrupts import held_interrupts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    from tensorwire_protocol.transports.blocking import Mailbox

_NAME = "measured"
_SOFTWARE = "tensorwire-compress"
_KEY_BYTES = 16
_END_S = 30.0  # for a server to end by itself


class ServedModel:
    """`tensorwire serve` with one model and nothing of the user's own settings.

    The server runs from `with` on; it ends with the block, and at the latest with this object.
    """

    def __init__(self, source: str, *, device: str = "auto") -> None:
        """Say what is served.

        Args:
            source: a folder, or what else `tensorwire serve` takes.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
        """
        self._source = source
        self._transport: BlockingTransport | None = None
        words = ["serve", f"--model={_NAME}={source}", "--port=0", f"--device={device}"]
        words.append("--set=listen.drain_s=0")  # what runs when we leave, nobody waits for
        self._words = [sys.executable, "-m", "tensorwire", *words]

    def __enter__(self) -> Self:
        """Start the server; `connect` waits for it."""
        self._stderr = tempfile.TemporaryFile()
        with held_interrupts():  # between the start and who ends it
            self._process = subprocess.Popen(
                self._words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env={k: v for k, v in os.environ.items() if not k.startswith("TENSORWIRE_")},
                text=True,
            )
            self._end = weakref.finalize(self, _end, self._process)
        return self

    def __exit__(self, *_: object) -> None:
        if self._transport is not None:
            self._transport.close()
        self._end()
        self._stderr.close()

    def connect(self) -> Self:
        """Wait until the model is loaded, however long that takes, and connect.

        Raises:
            MeasurementError: the server ended instead.
        """
        assert self._process.stdout is not None
        ready = next((line for line in self._process.stdout if line.startswith("ready ")), None)
        if ready is None:
            raise MeasurementError(f"cannot measure the speed of {self._source}: {self._reason()}")
        host, _, port = ready.split()[1].rpartition(":")
        try:
            sock = socket.create_connection((host, int(port)))
        except OSError as error:
            raise MeasurementError(f"cannot reach the server of {self._source}: {error}") from error
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(
            Role.CLIENT, software=_SOFTWARE, features=(FEATURE_PASSIVE,), codec=TYPED
        )
        self._transport = BlockingTransport(sock, connection)
        return self

    def _reason(self) -> str:
        self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").splitlines()
        return lines[-1] if lines else f"the server ended with {self._process.returncode}"

    def describe(self) -> Mapping[str, Any]:
        """Return what the server says of its model."""
        models = self._result("models", None, {}).extra["models"]
        description: Mapping[str, Any] = models[0]
        return description

    def resident_bytes(self) -> int:
        """Return what the worker's process holds of the memory now, its libraries included."""
        (worker,) = self._result("stats", None, {}).extra["workers"].values()
        return int(worker["rss_bytes"])

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> None:
        """Continue all prompts at once by exactly so many tokens; return when all have ended.

        Raises:
            MeasurementError: the server refused or failed.
        """
        params = {"max_new_tokens": num_tokens, "ignore_eos": True, "temperature": 0}
        streams = [
            self._open("generate", _NAME, {"ids": write_ids(list(ids))}, params) for ids in prompts
        ]
        for stream in streams:
            self._last(stream)

    def embed(self, texts: Sequence[str]) -> None:
        """Embed texts in one request.

        Raises:
            MeasurementError: the server refused or failed.
        """
        self._result("embed", _NAME, {"texts": write_texts(list(texts))})

    def _result(self, op: str, model: str | None, inputs: Mapping[str, Any]) -> Result:
        answer = self._last(self._open(op, model, inputs, {}))
        assert isinstance(answer, Result)
        return answer

    def _open(
        self, op: str, model: str | None, inputs: Mapping[str, Any], params: Mapping[str, Any]
    ) -> Mailbox:
        assert self._transport is not None, "not connected"
        key = os.urandom(_KEY_BYTES)
        return self._transport.open(
            lambda stream: Request(
                stream=stream, op=op, key=key, model=model, inputs=inputs, params=params
            )
        )

    def _last(self, mailbox: Mailbox) -> Any:
        """Wait for a stream's end; whoever waits reads for all streams."""
        assert self._transport is not None
        try:
            while not isinstance(message := self._transport.receive(mailbox, None), TERMINAL):
                pass
        except TensorwireError as error:
            raise MeasurementError(f"the server of {self._source} is lost: {error}") from error
        if isinstance(message, Failure):
            raise MeasurementError(f"the server of {self._source} failed: {message.message}")
        return message


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdout is not None
    process.stdout.close()
