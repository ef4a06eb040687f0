"""What a worker keeps of each open request, and the frames it is answered with."""

from __future__ import annotations

import time
from math import inf
from typing import TYPE_CHECKING, Any, Final

from tensorwire_protocol.messages import End, Finish, Result, Step
from tensorwire_protocol.tensors import ids_checksum

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tensorwire_server.scheduling.work import Detokenizer, Scores
    from tensorwire_server.workers.link import Link
    from tensorwire_server.workers.logprobs import LogprobBook
    from tensorwire_server.workers.text import StopMatcher
    from tensorwire_server.workers.waiting import Job

_monotonic: Final = time.monotonic  # names that compiled code need not look up
_NEVER: Final = inf


class Stream:
    """One request on one link, from SUBMIT to its terminal frame.

    Args:
        id: unique in this process; stream numbers are unique on their link only.
    """

    __slots__ = (
        "arrived_at", "attempt", "cached_tokens", "deadline", "id", "job", "largest_batch", "link",
        "num_items", "number", "prompt_tokens", "started_at",
    )  # fmt: skip

    def __init__(self, link: Link, number: int, attempt: int, id: int, arrived_at: float) -> None:
        self.link = link
        self.number = number  # of the stream on its link
        self.attempt = attempt
        self.id = id
        self.arrived_at = arrived_at  # monotonic s, as all times here
        self.deadline = _NEVER
        self.started_at: float | None = None
        self.prompt_tokens = 0
        self.job: Job[Any] | None = None  # its text, while that waits for a thread
        self.cached_tokens: int | None = None  # of the prompt, found in the prefix cache
        self.num_items = 0  # that count against the bound on them
        self.largest_batch = 0

    def end(self, finish: Finish) -> End:
        """Return the END frame for an answer that was cut short before its first token."""
        return self._end(finish, [], self.timings())

    def note_start(self, now: float, num_cached: int) -> None:
        """Take in that it runs for the first time, so many of its tokens found in the cache."""
        self.started_at = now
        self.cached_tokens = min(num_cached, self.prompt_tokens)

    def timings(self) -> dict[str, float]:
        """Return what END and RES say of the time spent, up to now."""
        now = _monotonic()
        started_at = now if self.started_at is None else self.started_at
        return {
            "queued_ms": (started_at - self.arrived_at) * 1000,
            "total_ms": (now - self.arrived_at) * 1000,
            "largest_batch": self.largest_batch,
        }

    def _end(
        self,
        finish: Finish,
        tokens: list[int],
        timings: dict[str, float],
        reports: Mapping[str, Any] | None = None,
    ) -> End:
        usage = {"prompt_tokens": self.prompt_tokens, "completion_tokens": len(tokens)}
        if self.cached_tokens is not None:
            usage["cached_tokens"] = self.cached_tokens
        return End(
            stream=self.number,
            finish=finish,
            count=len(tokens),
            checksum=ids_checksum(tokens),
            usage=usage,
            timings=timings,
            extra={"attempt": self.attempt, **(reports or {})},
        )


class TextStream(Stream):
    """A request whose answer is tokens and their text."""

    __slots__ = (
        "_detokenizer", "_lead", "_logprobs", "_min_new_tokens", "_stops", "ends_with",
        "first_at", "last_at", "tokens",
    )  # fmt: skip

    def __init__(self, link: Link, number: int, attempt: int, id: int, arrived_at: float) -> None:
        super().__init__(link, number, attempt, id, arrived_at)
        self.tokens: list[int] = []  # earlier attempts' included
        self.first_at: float | None = None
        self.last_at = 0.0
        self._detokenizer: Detokenizer | None = None
        # All tokens were known before; they are read again for their log-probabilities alone, and
        # when those are there the stream ends for this reason.
        self.ends_with: Finish | None = None
        self._stops: StopMatcher | None = None
        self._min_new_tokens = 0
        self._lead = ""
        self._logprobs: LogprobBook | None = None

    def begin(
        self,
        detokenizer: Detokenizer,
        stops: StopMatcher | None,
        *,
        min_new_tokens: int = 0,
        lead: str = "",
        logprobs: LogprobBook | None = None,
    ) -> None:
        """Set how tokens become text, and what else is wanted of them.

        Args:
            min_new_tokens: the text of so many is not searched for stop strings.
            lead: text that is sent with the first token's.
        """
        self._detokenizer, self._stops = detokenizer, stops
        self._min_new_tokens, self._lead, self._logprobs = min_new_tokens, lead, logprobs

    def replay(self, so_far: Sequence[int], texts: Sequence[str]) -> bool:
        """Take tokens whose text an earlier attempt sent; True if a stop string ended them.

        Args:
            texts: of each of them; the detokenizer has had them.
        """
        if self._stops is None or not so_far:
            self.tokens += so_far
            return False
        _, finish = self._take_until_stop(so_far, texts, None, self._stops)
        return finish is not None

    def add_scores(self, scores: Scores) -> None:
        """Take log-probabilities of the prompt's or the answer's tokens."""
        assert self._logprobs is not None
        self._logprobs.add(scores)

    def take(self, token_ids: Sequence[int], finish: str | None) -> tuple[str, Finish | None]:
        """Take the next tokens; return the text that is certain now, and why the stream ends.

        The last token brings all text that was held back. What is behind a stop string is not
        taken.

        Args:
            finish: what ends the stream with the last of them.
        """
        assert self._detokenizer is not None
        push = self._detokenizer.push
        if self._stops is not None:
            return self._take_until_stop(token_ids, map(push, token_ids), finish, self._stops)
        self.tokens += token_ids
        text = "".join(map(push, token_ids))
        if self._lead:
            text, self._lead = self._lead + text, ""
        if finish is None:
            return text, None
        return text + self._detokenizer.flush(), Finish(finish)

    def _take_until_stop(
        self,
        token_ids: Sequence[int],
        texts: Iterable[str],
        finish: str | None,
        stops: StopMatcher,
    ) -> tuple[str, Finish | None]:
        assert self._detokenizer is not None
        certain = [self._lead]
        self._lead = ""
        for number, (token_id, text) in enumerate(zip(token_ids, texts, strict=True), 1):
            self.tokens.append(token_id)
            is_last = finish is not None and number == len(token_ids)
            if is_last:
                text += self._detokenizer.flush()
            if len(self.tokens) <= self._min_new_tokens:
                certain.append(text)
                continue
            text, matched = stops.push(text)
            certain.append(text)
            if matched:
                return "".join(certain), Finish.STOP
            if is_last:
                certain.append(stops.flush())
        return "".join(certain), None if finish is None else Finish(finish)

    def note_steps(self, now: float, num_rows: int) -> None:
        """Keep the books of tokens that came at `now` out of steps with up to so many rows."""
        if self.first_at is None:
            self.first_at = now
        self.last_at = now
        if num_rows > self.largest_batch:
            self.largest_batch = num_rows

    def end(self, finish: Finish) -> End:
        """Return the END frame.

        Raises:
            InternalError: what it should report has not come.
        """
        reports = None
        if self._logprobs is not None:
            is_whole = finish in (Finish.STOP, Finish.LENGTH)
            reports = self._logprobs.to_wire(len(self.tokens), must_be_whole=is_whole)
        return self._end(finish, self.tokens, self.timings(), reports)

    def timings(self) -> dict[str, float]:
        """Return what END says of the time spent, up to now."""
        timings = super().timings()
        if self.started_at is not None and self.first_at is not None:
            timings["first_token_ms"] = (self.first_at - self.arrived_at) * 1000
            timings["prefill_ms"] = (self.first_at - self.started_at) * 1000
            timings["decode_ms"] = (self.last_at - self.first_at) * 1000
        return timings


class ArrayStream(Stream):
    """A request that is answered once, when all its items are."""

    __slots__ = ("_num_missing", "outcomes")

    def __init__(self, link: Link, number: int, attempt: int, id: int, arrived_at: float) -> None:
        super().__init__(link, number, attempt, id, arrived_at)
        self.outcomes: list[Any] = []
        self._num_missing = 0

    def begin(self, num_items: int) -> None:
        """Set how many outcomes make the answer."""
        self.outcomes = [None] * num_items
        self.num_items = self._num_missing = num_items

    def note_batch(self, started_at: float, num_items: int) -> None:
        """Keep the books of a batch of so many items that had some of this stream."""
        if self.started_at is None:
            self.started_at = started_at
        self.largest_batch = max(self.largest_batch, num_items)

    def take(self, index: int, outcome: Any) -> bool:
        """Take one item's outcome; True if it was the last one missing."""
        self.outcomes[index] = outcome
        self._num_missing -= 1
        return self._num_missing == 0

    def result(self, outputs: Mapping[str, Any]) -> Result:
        """Return the RES frame."""
        usage = {"prompt_tokens": self.prompt_tokens} if self.prompt_tokens else {}
        extra = {"attempt": self.attempt}
        return Result(self.number, outputs, usage, self.timings(), extra)


class StepColumns:
    """The events for one link, as they grow; at most one for each stream."""

    __slots__ = (
        "attempts", "counts", "first_indexes", "num_chars", "streams", "texts", "tokens",
    )  # fmt: skip

    def __init__(self) -> None:
        self.streams: list[int] = []
        self.attempts: list[int] = []
        self.first_indexes: list[int] = []
        self.counts: list[int] = []
        self.tokens: list[int] = []
        self.texts: list[str] = []
        self.num_chars = 0

    def add(self, stream: Stream, first_index: int, token_ids: Sequence[int], text: str) -> None:
        """Add one event."""
        self.streams.append(stream.number)
        self.attempts.append(stream.attempt)
        self.first_indexes.append(first_index)
        self.counts.append(len(token_ids))
        self.tokens += token_ids
        self.texts.append(text)
        self.num_chars += len(text)

    def frame(self) -> Step:
        """Return the STEP frame."""
        return Step(
            streams=self.streams,
            attempts=self.attempts,
            first_indexes=self.first_indexes,
            counts=None if set(self.counts) == {1} else self.counts,
            tokens=self.tokens,
            texts=self.texts,
        )
