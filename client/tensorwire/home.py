"""Where a client may be used."""

from __future__ import annotations

import os

from tensorwire.errors import ClientUnusable

# Counted rather than asking for the process id, which is a system call for each request.
_num_forks = 0


def _note_fork() -> None:
    global _num_forks
    _num_forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


class Home:
    """Where a client may be used: not after it was closed, not in a forked child."""

    def __init__(self) -> None:
        self._forks = _num_forks
        self.is_closed = False

    @property
    def is_here(self) -> bool:
        """Say if this is the process that made the client."""
        return _num_forks == self._forks

    def check(self) -> None:
        """Raise ClientUnusable unless new calls may be made here and now."""
        self.check_process()
        if self.is_closed:
            raise ClientUnusable("this client is closed: make a new one")

    def check_process(self) -> None:
        """Raise ClientUnusable in a forked child."""
        # A child shares its parent's socket: two writers would garble it.
        if _num_forks != self._forks:
            raise ClientUnusable(
                "this client was made before a fork: make a new one in the child process"
            )
