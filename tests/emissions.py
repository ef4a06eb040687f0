"""A step's new tokens one by one, as tests look at them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorwire_server.scheduling.continuous import Emissions


@dataclass(frozen=True)
class Emission:
    """One new token of one sequence."""

    sequence_id: int
    index: int
    token_id: int
    finish: str | None


def each(emissions: Emissions) -> list[Emission]:
    """Return the tokens of a step in its order."""
    ids, finishes = emissions.sequence_ids, emissions.finishes
    assert finishes.keys() <= set(ids)
    return [
        Emission(id, index, token_id, finishes.get(id))
        for id, index, token_id in zip(ids, emissions.indexes, emissions.token_ids, strict=True)
    ]
