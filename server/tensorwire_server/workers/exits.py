"""How a worker process ends; the supervisor reads it."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What an exit code means; a crash may give any other."""

    DRAINED = 0  # told to end by its gateway; whoever runs a listening one may use a signal
    LOST = 1  # the link or the compute thread broke
    USAGE = 2
    FAILED = 3  # the model cannot be loaded, and a restart would not help
    TERMINATED = 143  # by a signal that is not the gateway's word that it is no longer wanted
