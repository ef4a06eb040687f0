"""Outcomes on their way out: tokens become text, and each link gets one STEP frame for them."""

from __future__ import annotations

import time
from itertools import groupby
from typing import TYPE_CHECKING, Final

import numpy as np
from tensorwire_protocol.messages import Finish

from tensorwire_server.workers.loop import Leave
from tensorwire_server.workers.streams import ArrayStream, StepColumns, TextStream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensorwire_protocol.messages import End

    from tensorwire_server.scheduling.work import Scores
    from tensorwire_server.workers.arrays import BatchOutcome
    from tensorwire_server.workers.link import Link
    from tensorwire_server.workers.loop import StepOutcome
    from tensorwire_server.workers.registry import Registry


# Text of one frame: with a prompt that is echoed to each of many streams it could grow too large.
_MOST_CHARS: Final = 64 * 1024
_ARRAY: Final = np.ndarray


class Answers:
    """Turns what was computed into frames."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def on_steps(self, outcomes: Sequence[StepOutcome]) -> None:
        """Send what some steps made, then what ended with them."""
        registry = self._registry
        assert registry.compute is not None
        for outcome in outcomes:
            registry.compute.outcome_taken()
            self._note_started(outcome)
            for scores in outcome.scores:
                self._take_scores(scores)
        self._send_tokens(outcomes)
        streams = registry.streams
        for outcome in outcomes:
            for id, error in outcome.failed.items():
                if id in streams:
                    registry.fail(streams[id], error)
            for id in outcome.expired:
                if id in streams:
                    registry.cut(streams[id], Finish.DEADLINE)
        registry.flush()

    def _note_started(self, outcome: StepOutcome) -> None:
        streams = self._registry.streams
        if not outcome.started:
            return
        loaded = {load.sequence_id: len(load.token_ids) for load in outcome.loaded}
        for id in outcome.started:
            if id in streams:
                streams[id].note_start(outcome.started_at, loaded.get(id, 0))

    def _take_scores(self, scores: Scores) -> None:
        stream = self._registry.streams.get(scores.sequence_id)
        if stream is None:
            return  # ended meanwhile
        assert isinstance(stream, TextStream)
        try:
            stream.add_scores(scores)
        except Exception as error:
            self._registry.fail(stream, error)

    def _send_tokens(self, outcomes: Sequence[StepOutcome]) -> None:
        frames: dict[Link, StepColumns] = {}
        ended: list[tuple[TextStream, End]] = []
        now = time.monotonic()
        num_rows = max(outcome.num_rows for outcome in outcomes)
        finishes = {id: why for o in outcomes for id, why in o.emissions.finishes.items()}
        for id, (first_index, token_ids) in _by_stream(outcomes).items():
            stream = self._registry.streams.get(id)
            if stream is None:
                continue  # ended meanwhile
            assert isinstance(stream, TextStream)
            stream.note_steps(now, num_rows)
            columns = frames.get(stream.link)
            if columns is None:
                columns = frames[stream.link] = StepColumns()
            end = self._take(stream, first_index, token_ids, finishes.get(id), columns)
            if end is not None:
                ended.append((stream, end))
            if columns.num_chars > _MOST_CHARS:
                link, frame = stream.link, frames.pop(stream.link).frame()
                link.send(frame)
        for link, columns in frames.items():
            if columns.streams:
                link.send(columns.frame())
        for stream, end in ended:
            self._registry.finish(stream, end)

    def _take(
        self,
        stream: TextStream,
        first_index: int,
        token_ids: list[int],
        finish: str | None,
        columns: StepColumns,
    ) -> End | None:
        """Put tokens into their link's frame; return the END of their stream if it is there."""
        num_before = len(stream.tokens)
        reason: Finish | None
        try:
            if stream.ends_with is not None:
                text, reason = "", stream.ends_with
            else:
                text, reason = stream.take(token_ids, finish)
            end = None if reason is None else stream.end(reason)
        except Exception as error:  # a detokenizer's fault is one request's
            self._registry.fail(stream, error)
            return None
        if end is None:
            columns.add(stream, first_index, token_ids, text)
            return None
        if stream.ends_with is None:
            columns.add(stream, first_index, token_ids[: len(stream.tokens) - num_before], text)
        if finish is None:
            # A stop string: the scheduler does not know of it.
            self._registry.commands.append(Leave(stream.id, is_whole=stream.ends_with is None))
        return end

    def on_batch(self, outcome: BatchOutcome) -> None:
        """Answer the requests whose last item this batch had."""
        registry = self._registry
        results = outcome.results
        for at, item in enumerate(outcome.items):
            result = results[at]
            stream = registry.streams.get(item.request_id)
            if stream is None:
                continue  # ended meanwhile
            assert isinstance(stream, ArrayStream)
            stream.note_batch(outcome.started_at, len(outcome.items))
            if isinstance(result, Exception):
                registry.fail(stream, result)
            elif stream.take(item.index, result):
                self._answer(stream)
        assert registry.compute is not None
        registry.compute.outcome_taken()
        registry.flush()

    def _answer(self, stream: ArrayStream) -> None:
        try:
            if isinstance(stream.outcomes[0], _ARRAY):
                outputs = {"embeddings": np.stack(stream.outcomes)}
            else:
                outputs = stream.outcomes[0]
            self._registry.finish(stream, stream.result(outputs))
        except Exception as error:  # for one: the answer is larger than a frame
            self._registry.fail(stream, error)


def _by_stream(outcomes: Sequence[StepOutcome]) -> dict[int, tuple[int, list[int]]]:
    """Return the first index and the tokens that the outcomes have for each sequence."""
    gathered: dict[int, tuple[int, list[int]]] = {}
    # Steps of the same sequences, as most are that follow each other, are turned over together.
    for ids, steps in groupby(outcomes, _sequence_ids):
        made = [outcome.emissions for outcome in steps]
        by_sequence = zip(*[one.token_ids for one in made], strict=True)
        for id, index, token_ids in zip(ids, made[0].indexes, by_sequence, strict=True):
            if id in gathered:
                gathered[id][1].extend(token_ids)
            else:
                gathered[id] = (index, [*token_ids])
    return gathered


def _sequence_ids(outcome: StepOutcome) -> list[int]:
    return outcome.emissions.sequence_ids
