"""What is wrong with a stream, told from the tokens that should have come."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """How many tokens are wrong, and in which way."""

    lost: int = 0
    repeated: int = 0
    swapped: int = 0  # came, but in another place
    foreign: int = 0  # nobody made them
    caught: int = (
        0  # the client itself refused an index, a count or a checksum, and ended the stream
    )

    @property
    def total(self) -> int:
        """How many in all."""
        return self.lost + self.repeated + self.swapped + self.foreign + self.caught


NO_FAULTS = Faults()
FAULTS = ("lost", "repeated", "swapped", "foreign", "caught")


def find_faults(expected: Sequence[int], got: Sequence[int]) -> Faults:
    """Compare a stream with what it should have been.

    What came elsewhere is swapped; what came once more beside itself is repeated.
    """
    if list(expected) == list(got):
        return NO_FAULTS
    missing: list[int] = []
    extra: list[int] = []
    repeated = 0
    matcher = SequenceMatcher(None, expected, got, autojunk=False)
    for tag, i, i_end, j, j_end in matcher.get_opcodes():
        if tag == "equal":
            continue
        missing += expected[i:i_end]
        added = list(got[j:j_end])
        beside = (list(got[max(j - len(added), 0) : j]), list(got[j_end : j_end + len(added)]))
        if i == i_end and added in beside:
            repeated += len(added)
        else:
            extra += added
    swapped = 0
    for token in missing[:]:
        if token in extra:
            extra.remove(token)
            missing.remove(token)
            swapped += 1
    return Faults(lost=len(missing), repeated=repeated, swapped=swapped, foreign=len(extra))
