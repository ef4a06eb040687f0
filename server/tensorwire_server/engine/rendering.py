"""A model's chat template, rendered in processes that can be killed (`templating.py`)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorwire_protocol.errors import BadParams

from tensorwire_server.engine import templating

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# The kernel counts the process's own time; this is for one that gets none, or is stopped.
_PATIENCE_S = 60.0
_LAST_WORDS_S = 1.0
_MOST_ANSWER_BYTES = 8 * templating.OUTPUT_BYTES  # JSON may take six bytes for one
_KEPT_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "HOME", "LANG", "LC_ALL", "TZ")


class _Helper:
    """One process."""

    def __init__(self, begin: bytes) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(templating.__file__))],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ},
            )
        self._socket.settimeout(_PATIENCE_S)
        self._rest = self._socket.makefile("rb")
        self._begin = begin

    def ask(self, line: bytes) -> dict[str, str]:
        """Return the answer to one conversation.

        Raises:
            OSError: it has ended, or does not answer; it is of no more use.
        """
        begin, self._begin = self._begin, b""
        self._socket.sendall(begin + line)
        answer = self._rest.readline(_MOST_ANSWER_BYTES)
        if not answer.endswith(b"\n"):
            raise ConnectionError("the process ended")
        said: dict[str, str] = json.loads(answer)
        return said

    def dismiss(self) -> None:
        """End it while it waits."""
        self._process.kill()
        self.end()

    def end(self) -> int:
        """Kill it, unless it is ending anyway; return its exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            # What has closed its end of the socket ends in a moment, and its own reason counts.
            self._process.wait(_LAST_WORDS_S)
        self._process.kill()
        self._rest.close()
        self._socket.close()
        return self._process.wait()


class ChatRenderer:
    """Renders conversations; safe to use from any thread.

    As many processes live as conversations were rendered at once. They are started when they are
    first needed, end with this process, and are killed where a template takes too much.
    """

    def __init__(self, template: str, variables: Mapping[str, Any]) -> None:
        self._begin = json.dumps({"template": template, "variables": dict(variables)}) + "\n"
        self._idle: list[_Helper] = []
        self._lock = threading.Lock()

    @property
    def num_idle(self) -> int:
        """Processes that wait for a conversation."""
        return len(self._idle)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return a conversation as text, ready for the assistant's turn.

        Raises:
            BadParams: the template refuses it, or takes more time, memory or room than it may.
        """
        line = json.dumps([dict(message) for message in messages]).encode() + b"\n"
        with self._lock:
            helper = self._idle.pop() if self._idle else None
        if helper is None:
            helper = _Helper(self._begin.encode())
        try:
            answer = helper.ask(line)
        except OSError:
            raise _refusal(_reason(helper.end())) from None
        except BaseException:
            helper.end()
            raise
        with self._lock:
            self._idle.append(helper)
        if "text" not in answer:
            raise _refusal(answer["refused"])
        return answer["text"]

    def close(self) -> None:
        """End the processes that wait."""
        with self._lock:
            idle, self._idle = self._idle, []
        for helper in idle:
            helper.dismiss()


def _reason(exit_code: int) -> str:
    if exit_code == -signal.SIGPROF:
        return f"it takes more than {templating.CPU_S:g} s for them"
    return "the process that ran it ended, or gave no answer"


def _refusal(reason: str) -> BadParams:
    return BadParams(f"the model's chat template refuses these messages: {reason}")
