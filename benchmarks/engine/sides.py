"""Who continues prompts in this benchmark; each is a process that loads its model once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensorwire import Client

_REFERENCE = Path(__file__).parents[1] / "reference.py"
_BARE = Path(__file__).with_name("bare.py")


class Side(Protocol):
    """Continues prompts, all at once."""

    def tokens_per_s(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
        """Return new tokens for each second, prompts included in the time."""


class Piped:
    """A script that takes a job as a line of JSON and answers with `tokens` and `seconds`."""

    def __init__(self, script: Path, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.said: dict[str, Any] = {}
        self._answer()

    def tokens_per_s(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
        """See `Side`; `said` is the whole answer."""
        assert self._process.stdin is not None
        job = {"prompts": [[*prompt] for prompt in prompts], "new": new_tokens}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        self._answer()
        return float(self.said["tokens"] / self.said["seconds"])

    def _answer(self) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} ended; run it by hand to see why")
        self.said = json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def transformers_side(folder: Path) -> Piped:
    """`generate` of transformers, float32, one batch of equal prompts, so nothing is padded."""
    return Piped(_REFERENCE, str(folder))


def bare_side(folder: Path, backend: str, quantize: str) -> Piped:
    """Our scheduler and engine on one thread: no gateway, no wire, no text."""
    return Piped(_BARE, str(folder), backend, quantize)


class Served:
    """A model of a server, through the client, as any user has it."""

    def __init__(self, client: Client, model: str) -> None:
        self._client, self._model = client, model

    def tokens_per_s(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
        """See `Side`."""
        lists = [[*prompt] for prompt in prompts]
        began = time.perf_counter()
        made = self._client.generate(
            self._model, lists, max_new_tokens=new_tokens, temperature=0.0, timeout=600.0
        )
        seconds = time.perf_counter() - began
        return sum(len(generation.token_ids) for generation in made) / seconds
