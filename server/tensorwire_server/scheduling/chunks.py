"""Which tokens of which prompts join a step, and through which layers of the model they go.

Beside sequences that are continued a step has time for few tokens of a prompt. To take these few
through all layers is dear: however few they are, they read all keys before them once more, and a
product of few rows is slow. So where there is time for few only, a larger chunk is cut, which goes
through some layers in one step, and on from there in the next ones. Until it is through, no other
tokens join it.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence as PySequence

    from tensorwire_server.scheduling.sequences import Sequence

# Of a prompt whose tokens' log-probabilities are reported, logits of so many tokens in a step: they
# take memory that nothing else bounds, 600 KB for a token of a vocabulary of 150,000.
_REPORTED_LOGITS = 256
# Where there is time for fewer, so many go through some of the layers. Always as many, because a
# product of a new shape is dear. Measured with SmolLM2-135M's shape behind 4,000 tokens, on two
# cores of AVX512, ms for each token: 3.3 of 8 that go together, 2.5 of 16, 2.0 of 32, 1.7 of 64.
_PARTED_TOKENS = 64

_BY_ORDER, _BY_LENGTH = attrgetter("order"), attrgetter("num_to_feed")

Layers = tuple[int, int]  # from which one to which one, the last not included


class Chunks:
    """Cuts prompts into chunks, and remembers how far the latest ones have come.

    Args:
        num_layers: that can be gone through one by one; 1: all at once only.
        most_tokens: of chunks that stay for several steps: whatever else joins, there is room.
    """

    def __init__(self, *, num_layers: int, most_tokens: int) -> None:
        self._num_layers = num_layers
        self._most_tokens = most_tokens
        self._tokens: dict[Sequence, int] = {}  # of each prompt, in the chunks under way
        self._done = 0  # layers behind them
        self._next = 0  # the same, once the step is done that was told of last

    def next(
        self, reading: PySequence[Sequence], budget: int, paced: int | None
    ) -> tuple[dict[Sequence, int], Layers]:
        """Return how many tokens of which prompts are in the next step, and where they go.

        Args:
            reading: prompts that are not read to their end.
            budget: of tokens that a step may have.
            paced: for how many tokens through all layers there is time; None: for any number.
        """
        if paced == 0:
            self._next = self._done
            return {}, (0, self._num_layers)
        if not (self._done and self._tokens):
            self._done = 0
            num_tokens = budget if paced is None else min(budget, self._to_begin(reading, paced))
            self._tokens = _share(num_tokens, reading)
        self._next = self._num_layers
        if paced is not None and self._tokens:
            self._next = self._done + self._layers_at_once(paced)
        return self._tokens, (self._done, self._next)

    def _to_begin(self, reading: PySequence[Sequence], paced: int) -> int:
        """Return how many tokens to cut, where there is time for so many."""
        # Logits that are reported are a part of one step's work, and bounded by step.
        if self._num_layers == 1 or any(sequence.sampling.reports for sequence in reading):
            return paced
        parted = _PARTED_TOKENS
        if paced * self._num_layers < parted:
            parted //= 2  # else a single layer takes too long
        return max(paced, min(parted, self._most_tokens))

    def _layers_at_once(self, paced: int) -> int:
        """Return through how many layers to go, so that the steps to come are alike."""
        left = self._num_layers - self._done
        at_most = paced * self._num_layers // sum(self._tokens.values())
        num_steps = -(-left // max(1, min(at_most, left)))
        return -(-left // num_steps)

    def note_done(self) -> None:
        """Take in that the step is done that was told of last."""
        self._done = self._next % self._num_layers

    def forget(self, sequence: Sequence) -> None:
        """Take in that a sequence stops running."""
        self._tokens.pop(sequence, None)


def _share(budget: int, reading: PySequence[Sequence]) -> dict[Sequence, int]:
    """Return whose prompts are read on, and how many tokens of each.

    One half is given out in the order of the queue, so that no prompt stands still for ever; the
    rest to those that have least left, so that a short one does not wait for the end of a long one.
    """
    shares = dict.fromkeys(sorted(reading, key=_BY_ORDER), 0)
    num_logits = _give(budget - budget // 2, [*shares], shares, _REPORTED_LOGITS)
    _give(budget - sum(shares.values()), sorted(shares, key=_BY_LENGTH), shares, num_logits)
    return {sequence: num_tokens for sequence, num_tokens in shares.items() if num_tokens}


def _give(budget: int, queue: list[Sequence], shares: dict[Sequence, int], num_logits: int) -> int:
    """Add to the shares in this order; return how many logits are left that may be reported on."""
    for sequence in queue:
        given = shares[sequence]
        num_tokens = min(budget, sequence.num_to_feed - given)
        first = sequence.sampling.first_scored(len(sequence.prompt_ids))
        if first is not None:
            free = max(0, first - sequence.num_cached - given)
            num_tokens = min(num_tokens, free + num_logits)
            num_logits -= max(0, num_tokens - free)
        shares[sequence] = given + num_tokens
        budget -= num_tokens
    return num_logits
