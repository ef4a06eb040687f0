"""Outcomes on their way out: tokens become text, and each link gets one STEP frame per step."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
from tensorwire_protocol.messages import Finish

from tensorwire_server.workers.loop import Leave
from tensorwire_server.workers.streams import ArrayStream, StepColumns, TextStream

if TYPE_CHECKING:
    from tensorwire_protocol.messages import End

    from tensorwire_server.scheduling.continuous import Emission
    from tensorwire_server.workers.arrays import BatchOutcome
    from tensorwire_server.workers.link import Link
    from tensorwire_server.workers.loop import StepOutcome
    from tensorwire_server.workers.registry import Registry


class Answers:
    """Turns what was computed into frames."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def on_step(self, outcome: StepOutcome) -> None:
        """Send what one step made, then what ended with it."""
        registry, streams = self._registry, self._registry.streams
        for id in outcome.started:
            if id in streams:
                streams[id].started_at = outcome.started_at
        self._send_tokens(outcome)
        for id, error in outcome.failed.items():
            if id in streams:
                registry.fail(streams[id], error)
        for id in outcome.expired:
            if id in streams:
                registry.cut(streams[id], Finish.DEADLINE)
        assert registry.compute is not None
        registry.compute.outcome_taken()
        registry.flush()

    def _send_tokens(self, outcome: StepOutcome) -> None:
        frames: dict[Link, StepColumns] = {}
        ended: list[tuple[TextStream, End]] = []
        now = time.monotonic()
        for emission in outcome.emissions:
            stream = self._registry.streams.get(emission.sequence_id)
            if stream is None:
                continue  # ended meanwhile
            assert isinstance(stream, TextStream)
            stream.note_step(now, outcome.num_rows)
            if stream.link not in frames:
                frames[stream.link] = StepColumns()
            finish = self._take(stream, emission, frames[stream.link])
            if finish is not None:
                ended.append((stream, stream.end(finish)))
        for link, columns in frames.items():
            if columns.streams:
                link.send(columns.frame())
        for stream, end in ended:
            self._registry.finish(stream, end)

    def _take(self, stream: TextStream, emission: Emission, columns: StepColumns) -> Finish | None:
        """Put one token into its link's frame; return why its stream ends, if it does."""
        try:
            text, finish = stream.take(emission.token_id, emission.finish)
        except Exception as error:  # a detokenizer's fault is one request's
            self._registry.fail(stream, error)
            return None
        columns.add(stream, emission.index, emission.token_id, text)
        if finish is not None and emission.finish is None:
            # A stop string: the scheduler does not know of it.
            self._registry.commands.append(Leave(stream.id))
        return finish

    def on_batch(self, outcome: BatchOutcome) -> None:
        """Answer the requests whose last item this batch had."""
        registry = self._registry
        for item, result in zip(outcome.items, outcome.results, strict=True):
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
            if isinstance(stream.outcomes[0], np.ndarray):
                outputs = {"embeddings": np.stack(stream.outcomes)}
            else:
                outputs = stream.outcomes[0]
            self._registry.finish(stream, stream.result(outputs))
        except Exception as error:  # for one: the answer is larger than a frame
            self._registry.fail(stream, error)
