"""Commands that run at given times, so that a report shows what they did to the server."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tensorwire_protocol.errors import BadParams

from tensorwire.loadtest.units import parse_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """At `at_s` seconds after the start, run `command` in a shell."""

    at_s: float
    command: str


@dataclass(slots=True)
class MarkDone:
    """What became of a command; seconds from the start."""

    command: str
    began_s: float
    ended_s: float | None = None
    exit_code: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON carries it."""
        return {
            "command": self.command,
            "began_s": self.began_s,
            "ended_s": self.ended_s,
            "exit_code": self.exit_code,
        }


def parse_marks(texts: Sequence[str], before_s: float) -> tuple[Mark, ...]:
    """Return the marks of `--at 30s 'CMD'`, the earliest first.

    Args:
        texts: each with the time, a space, and the command.
        before_s: the end of the run.

    Raises:
        BadParams: a time is none, or too late, or there is no command.
    """
    return tuple(sorted((_mark(text, before_s) for text in texts), key=lambda mark: mark.at_s))


def _mark(text: str, before_s: float) -> Mark:
    time_text, _, command = text.partition(" ")
    if not command or command.startswith("--"):
        raise BadParams(f"a time and a command are needed, as in 30s 'CMD', not {text!r}")
    at_s = parse_seconds(time_text)
    if at_s >= before_s:
        raise BadParams(f"{time_text} is not before the end of the run, at {before_s:g} s")
    return Mark(at_s=at_s, command=command)


async def run_marks(marks: Sequence[Mark], start: float, done: list[MarkDone]) -> None:
    """Run the commands at their times after monotonic second `start`, noting them in `done`.

    A command that still runs when this is cancelled is left to itself.
    """
    await asyncio.gather(*(_run_mark(mark, start, done) for mark in marks))


async def _run_mark(mark: Mark, start: float, done: list[MarkDone]) -> None:
    await asyncio.sleep(max(start + mark.at_s - time.monotonic(), 0))
    entry = MarkDone(mark.command, time.monotonic() - start)
    done.append(entry)
    # What it prints goes to stderr: stdout may be JSON.
    process = await asyncio.create_subprocess_shell(
        mark.command, stdin=asyncio.subprocess.DEVNULL, stdout=2
    )
    entry.exit_code = await process.wait()
    entry.ended_s = time.monotonic() - start
