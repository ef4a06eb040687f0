"""The log-probabilities of one request, gathered as they are computed, and how END carries them.

They may come more than once: a sequence that had to leave the batch is read again. They are the
same each time, up to the last bits of a float, so the first ones stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorwire_protocol.errors import BadParams, InternalError
from tensorwire_protocol.limits import CLIENT_LINK
from tensorwire_protocol.tensors import pack_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensorwire_server.scheduling.work import Sampling, Scores

_OTHER_END_BYTES = 4096  # of the meta of an END besides
MAX_BYTES = CLIENT_LINK.server_meta_bytes - _OTHER_END_BYTES


def check_size(sampling: Sampling, num_prompt_tokens: int, max_new_tokens: int) -> None:
    """Refuse what would not fit into an END.

    Raises:
        BadParams: with the numbers.
    """
    prompt = answer = 0
    if sampling.prompt_logprobs is not None:
        prompt = num_prompt_tokens * (8 + 8 * sampling.prompt_logprobs)
    if sampling.logprobs is not None:
        answer = max_new_tokens * (4 + 8 * sampling.logprobs)
    if prompt + answer > MAX_BYTES:
        raise BadParams(
            f"the log-probabilities of {num_prompt_tokens if prompt else 0} prompt tokens and"
            f" {max_new_tokens if answer else 0} new ones may take {prompt + answer} bytes; an"
            f" answer carries at most {MAX_BYTES}: ask for fewer tokens, or fewer of the likeliest"
        )


class _Columns:
    """Arrays that grow by a row for each token."""

    def __init__(self, start: int) -> None:
        self._end = start  # position of the next token
        self._start = start
        self._num_top = 0
        self._token_logprobs = bytearray()
        self._top_ids = bytearray()
        self._top_logprobs = bytearray()

    def __len__(self) -> int:
        return self._end - self._start

    def add(self, scores: Scores) -> None:
        num_known = self._end - scores.start
        if num_known < 0:
            raise InternalError(
                f"log-probabilities came for position {scores.start}, {self._end} was due"
            )
        row_bytes = 4 * scores.num_top
        own = scores.token_logprobs[4 * num_known :]
        self._num_top = scores.num_top
        self._token_logprobs += own
        self._top_ids += scores.top_ids[row_bytes * num_known :]
        self._top_logprobs += scores.top_logprobs[row_bytes * num_known :]
        self._end += len(own) // 4

    def to_wire(self, count: int) -> dict[str, Any]:
        row_bytes = 4 * self._num_top
        return {
            "token_logprobs": bytes(self._token_logprobs[: 4 * count]),
            "top_ids": bytes(self._top_ids[: row_bytes * count]),
            "top_logprobs": bytes(self._top_logprobs[: row_bytes * count]),
        }


class LogprobBook:
    """What one request wants to know, and what of it has come."""

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int]) -> None:
        self._prompt_ids = prompt_ids
        wants_prompt = sampling.prompt_logprobs is not None
        # Nothing is before the first token, so nothing says how likely it was.
        self._prompt = _Columns(1) if wants_prompt else None
        self._answer = _Columns(len(prompt_ids)) if sampling.logprobs is not None else None

    def add(self, scores: Scores) -> None:
        """Take what one step made.

        Raises:
            InternalError: something between is missing.
        """
        is_prompt = scores.start < len(self._prompt_ids)
        columns = self._prompt if is_prompt else self._answer
        if columns is not None:
            columns.add(scores)

    def to_wire(self, count: int, *, must_be_whole: bool) -> dict[str, Any]:
        """Return what END's `extra` says of the prompt and of `count` new tokens.

        Args:
            must_be_whole: else what is not complete is left out: a request may be stopped while
                another worker still reads what the first one made.

        Raises:
            InternalError: it is not.
        """
        said: dict[str, Any] = {}
        if self._prompt is not None and len(self._prompt) == len(self._prompt_ids) - 1:
            ids = pack_ids(self._prompt_ids[1:])
            said["prompt_logprobs"] = {"token_ids": ids, **self._prompt.to_wire(len(self._prompt))}
        if self._answer is not None and len(self._answer) >= count:
            said["logprobs"] = self._answer.to_wire(count)
        wanted = (self._prompt is not None) + (self._answer is not None)
        if must_be_whole and len(said) < wanted:
            raise InternalError("the model's log-probabilities are incomplete")
        return said
