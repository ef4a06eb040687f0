"""How long answers become: no more sequences are admitted than will have room to the end."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorwire_server.scheduling.sequences import Sequence

_MEMORY = 1 / 16  # what one more answer counts against all before it
_CAUTION = 0.1  # answers to come are taken to be longer by this share of what was asked for


class Forecast:
    """Learns which share of `max_new_tokens` answers make use of.

    Args:
        share: what to expect before there were any; 1 reserves room for all that was asked for.
    """

    def __init__(self, share: float = 1.0) -> None:
        self._share = share

    def note_end(self, sequence: Sequence) -> None:
        """Take in an answer that ended by itself."""
        self._share += _MEMORY * (sequence.num_new / sequence.max_new_tokens - self._share)

    def tokens(self, sequence: Sequence) -> int:
        """Return how many tokens the sequence will have in the end."""
        known = len(sequence.tokens)
        share = min(1.0, self._share + _CAUTION) if self._share else 0.0
        return known + math.ceil(share * (sequence.num_tokens_at_most - known))
