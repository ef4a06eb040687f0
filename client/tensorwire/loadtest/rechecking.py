"""Streams that are asked for again, alone, when the load is over: a reference where no rule is.

What a model makes of a prompt without chance must not depend on what else the server did meanwhile.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensorwire.loadtest.workloads import Ask

KEPT = 32  # of each process


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a server answered under load."""

    ask: Ask
    ids: Sequence[int]
    is_whole: bool  # not cut short by a cancel or a deadline


@dataclass(slots=True)
class Sample:
    """Keeps a few streams of a run, each as likely as any other."""

    kept: list[Said] = field(default_factory=list)
    _num_seen: int = 0
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def take(self, said: Said) -> None:
        """Keep a stream, perhaps, and perhaps another one no longer."""
        self._num_seen += 1
        if len(self.kept) < KEPT:
            self.kept.append(said)
        elif (place := self._random.randrange(self._num_seen)) < KEPT:
            self.kept[place] = said
