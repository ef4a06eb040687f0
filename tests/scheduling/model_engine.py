"""An engine that keeps what each place of its cache stands for, and refuses what is not so."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tensorwire_server.scheduling.sequences import Sequence
    from tensorwire_server.scheduling.work import Row, StepPlan

# A key depends on everything before it, so what a place holds is named by the text up to there.
Text = tuple[str, tuple[int, ...]]  # tenant and tokens


class ModelEngine:
    """Holds texts in place of keys and values.

    Args:
        sequences: by id, those that may run.
        num_layers: of which a row may go through some.
    """

    def __init__(
        self,
        sequences: Mapping[int, Sequence],
        *,
        num_pages: int,
        page_tokens: int,
        num_layers: int = 1,
    ) -> None:
        self._num_layers = num_layers
        self.stops: dict[int, list[tuple[int, tuple[int, ...], int]]] = {}  # start, ids, layer
        self.num_stops = 0
        self._sequences = sequences
        self._num_pages = num_pages
        self._page_tokens = page_tokens
        self.rows: dict[int, Text] = {}  # by sequence
        self.store: dict[int, Text] = {}  # by page
        self.num_loads = 0

    @property
    def num_pages(self) -> int:
        """Pages that hold something."""
        rows = sum(-(-len(tokens) // self._page_tokens) for _, tokens in self.rows.values())
        return rows + len(self.store)

    def run(self, plan: StepPlan) -> None:
        """Do what a plan says, up to the forward pass and its writes."""
        for page in plan.dropped:
            self.store.pop(page, None)
        for save in plan.saves:
            if save.sequence_id in self.rows:
                tenant, tokens = self.rows[save.sequence_id]
                assert save.page_tokens == self._page_tokens
                assert 0 < save.end - save.start <= self._page_tokens
                assert len(tokens) >= save.end, "saved before it was computed"
                self.store[save.page] = tenant, tokens[: save.end]
        for number in plan.released:
            self.rows.pop(number, None)
            self.stops.pop(number, None)
        for load in plan.loads:
            tenant = self._sequences[load.sequence_id].tenant
            for i, page in enumerate(load.pages, 1):
                text = tenant, load.token_ids[: i * self._page_tokens]
                assert self.store[page] == text, "a page of another text"
            self.rows[load.sequence_id] = tenant, load.token_ids
            self.num_loads += 1
        for row in plan.rows:
            sequence = self._sequences[row.sequence_id]
            _, cached = self.rows.get(row.sequence_id, (sequence.tenant, ()))
            end = row.start + len(row.token_ids)
            known = tuple(sequence.tokens)
            assert row.start <= len(cached), "a gap in the cache"
            assert cached[: row.start] == known[: row.start], "it begins with another text"
            assert row.token_ids == known[row.start : end]
            assert len(row.pages) == -(-end // self._page_tokens)
            if self._is_through(row):
                assert row.sample == (end == len(known))
                self.rows[row.sequence_id] = sequence.tenant, known[:end]
            else:
                assert not row.sample
                self.rows[row.sequence_id] = sequence.tenant, known[: row.start]
        assert self.num_pages <= self._num_pages, "more memory than there is"

    def _is_through(self, row: Row) -> bool:
        """Say if a row ends with the last layer; it has to begin where another one stopped."""
        first, last = row.layers or (0, self._num_layers)
        if first == 0:
            self.stops.pop(row.sequence_id, None)
        else:
            assert (row.start, row.token_ids, first) in self.stops[row.sequence_id]
        if last == self._num_layers:
            return True
        self.num_stops += 1
        self.stops.setdefault(row.sequence_id, []).append((row.start, row.token_ids, last))
        return False
