"""One stream's story, from ACK to END: what arrived so far, and what the end makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from tensorwire_protocol.errors import (
    DeadlineExceeded,
    Executed,
    InternalError,
    RequestCancelled,
    SequenceError,
    TensorwireError,
)
from tensorwire_protocol.messages import Finish
from tensorwire_protocol.operations import STREAMED
from tensorwire_protocol.tensors import ids_checksum

from tensorwire.errors import for_call
from tensorwire.logprobs import read_logprobs, read_prompt_logprobs
from tensorwire.results import Generation, Timings, Usage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tensorwire_protocol.messages import End

# Until something arrives: calls for one result have neither. Nobody changes these.
_NO_TOKENS: Final[list[int]] = []
_NO_TEXTS: Final[list[str]] = []
GRACE_S = 1.0  # the server's own END for a deadline may take so long to arrive


class Collector:
    """Gathers one answer. That indexes have no gap was already checked by the connection."""

    __slots__ = ("_is_streamed", "_texts", "num_chars", "prompt_tokens", "token_ids")

    def __init__(self, op: str) -> None:
        self.token_ids: list[int] = _NO_TOKENS
        self.num_chars = 0
        self.prompt_tokens: int | None = None
        self._is_streamed = op in STREAMED
        self._texts: list[str] = _NO_TEXTS

    def add(self, token_ids: Sequence[int], text: str) -> None:
        """Take what one event brought."""
        if self.num_arrived == 0:
            self.token_ids, self._texts = [], []
        self.token_ids += token_ids
        if text:
            self._texts.append(text)
            self.num_chars += len(text)

    @property
    def num_arrived(self) -> int:
        """Tokens and characters together: 0 while the caller can have seen nothing."""
        return len(self.token_ids) + self.num_chars

    def finish(self, end: End) -> Generation:
        """Return the whole, checked against what the server says it sent.

        Raises:
            SequenceError: count or checksum disagree with what arrived.
            DeadlineExceeded, RequestCancelled: it was cut short; `partial` is what arrived.
        """
        self._verify(end)
        if end.finish in (Finish.DEADLINE, Finish.CANCELLED):
            raise self._cut_short(end)
        if not self._is_streamed:
            raise InternalError("the server answered a call for one result with a stream")
        return self._generation(end.finish.value, end)

    def _cut_short(self, end: End) -> TensorwireError:
        after = f" after {end.count} tokens" if self._is_streamed else ""
        executed = Executed.YES if end.count else Executed.MAYBE
        error: TensorwireError
        if end.finish is Finish.DEADLINE:
            error = DeadlineExceeded(f"the deadline passed{after}", executed=executed)
        else:
            error = RequestCancelled(f"the request was cancelled{after}", executed=executed)
        return self._with_partial(error, end.finish.value, end)

    def _verify(self, end: End) -> None:
        if end.count != len(self.token_ids):
            raise self.failed(
                SequenceError(
                    f"the stream ended after {end.count} tokens, {len(self.token_ids)} came"
                )
            )
        try:
            is_equal = ids_checksum(self.token_ids) == end.checksum
        except (OverflowError, TypeError):
            is_equal = False
        if not is_equal:
            raise self.failed(
                SequenceError("the tokens that came are not those the server sent (checksum)")
            )

    def _generation(self, finish_reason: str, end: End | None) -> Generation:
        usage = dict(end.usage) if end else {}
        if self.prompt_tokens is not None:
            usage.setdefault("prompt_tokens", self.prompt_tokens)
        usage.setdefault("completion_tokens", len(self.token_ids))
        return Generation(
            text="".join(self._texts),
            token_ids=list(self.token_ids),
            finish_reason=finish_reason,
            usage=Usage.from_wire(usage),
            timings=Timings.from_wire(end.timings if end else {}),
            **(self._reports(end.extra) if end and end.extra else {}),
        )

    def _reports(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "logprobs": read_logprobs(extra.get("logprobs"), self.token_ids),
            "prompt_logprobs": read_prompt_logprobs(extra.get("prompt_logprobs")),
        }

    def _with_partial(
        self, error: TensorwireError, finish_reason: str, end: End | None
    ) -> TensorwireError:
        partial = self._generation(finish_reason, end) if self._is_streamed else None
        return for_call(error, partial)

    def failed(self, error: TensorwireError) -> TensorwireError:
        """Return `error` as this call's own, with what arrived before it."""
        reason = "deadline" if isinstance(error, DeadlineExceeded) else "lost"
        return self._with_partial(error, reason, None)


def gave_up(timeout_s: float) -> DeadlineExceeded:
    """Return the error of a client that waited past the deadline for the server's own word."""
    return DeadlineExceeded(
        f"no answer within the timeout of {timeout_s:g} s", executed=Executed.MAYBE
    )
