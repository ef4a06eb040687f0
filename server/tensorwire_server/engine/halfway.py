"""What tokens have become behind some layers, for rows that do not go through all in one step.

Rows that are at different layers meet: between two layers where one begins or stops, those that are
there are one part of the step. What a row has become where parts meet is kept until a row of its
sequence begins anew, so that a plan may be told twice. It is little: a chunk is some dozen tokens,
and few sequences have one under way.

Dimensions: T tokens of a part, C hidden size.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tensorwire_server.scheduling.work import Row


def parts_of(rows: Sequence[Row], num_layers: int) -> Iterator[tuple[int, int, list[Row]]]:
    """Yield from which layer to which one, the last not included, which rows go together."""
    stops = {stop for row in rows if row.layers is not None for stop in row.layers}
    for first, last in pairwise(sorted(stops | {0, num_layers})):
        there = [r for r in rows if r.layers is None or r.layers[0] <= first < r.layers[1]]
        if there:
            yield first, last, there


class Halfway:
    """Hidden states by sequence and layer."""

    def __init__(self) -> None:
        self._states: dict[int, dict[int, torch.Tensor]] = {}

    def begin(self, rows: Sequence[Row]) -> None:
        """Forget the sequences whose rows begin at the first layer."""
        if self._states:
            for row in rows:
                if row.layers is None or row.layers[0] == 0:
                    self.release(row.sequence_id)

    def put(self, rows: Sequence[Row], layer: int, hidden_TC: torch.Tensor) -> None:
        """Keep what the tokens of these rows are before a layer."""
        states = torch.split(hidden_TC, [len(row.token_ids) for row in rows])
        for row, state_TC in zip(rows, states, strict=True):
            self._states.setdefault(row.sequence_id, {})[layer] = state_TC

    def get(self, rows: Sequence[Row], layer: int) -> torch.Tensor:
        """Return what the tokens of these rows are before a layer: (T, C)."""
        return torch.cat([self._states[row.sequence_id][layer] for row in rows])

    def release(self, sequence_id: int) -> None:
        """Forget a sequence; one that is unknown is no error."""
        self._states.pop(sequence_id, None)

    def __len__(self) -> int:
        return len(self._states)
