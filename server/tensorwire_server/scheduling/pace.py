"""How much of a prompt may stand in a step beside sequences that are being continued.

A step takes as long for everybody in it, so a long prompt would stop all running streams. What they
are to notice is a bound on time, not on tokens: how long a step of theirs takes alone, and what a
prompt's token adds, is learnt from the steps themselves. Where prompts are always being read, one
step in a while goes without them: else what more streams cost would be taken for the prompts' cost.

The streams grow while a long prompt is read, and their own part of a step with them. The bound is
on what a step took before the prompt came: what they grow by is taken from the prompt's part. Where
prompts are always being read, it follows slowly; where streams come or go, at once.

The bound is for a few prompts beside many streams. The more prompts there are, the more of a step
they get: to spare one stream, a burst of them would else be read in crumbs, and each crumb costs a
whole step of a small batch.
"""

from __future__ import annotations

# What a new measurement counts against all before it. A prompt's tokens get dearer as it is read.
_DECODE_WEIGHT, _TOKEN_WEIGHT = 0.1, 0.3
_RARE_WEIGHT = 0.5  # of a step without prompts, where they are rare
_BEFORE_WEIGHT = 0.02  # of such a step for what is taken as usual
_FIRST_TOKENS = 256  # of a prompt, before anything is known
_FEWEST_TOKENS = 4  # fewer, and reading takes so long that the streams themselves grow slow
_OUTLIER = 2.0  # a step that takes so many times what is usual counts as this much
# After so many steps with prompts one without is due; sooner if other numbers are continued now.
_PAUSE_AFTER, _PAUSE_AFTER_CHANGE = 32, 8
_CHANGE = 1.25
# Prompts that are more than half as many as the streams get more time, in proportion; at most so
# many times as much.
_BURST, _MOST_OF_BURST = 0.5, 6.0
_MOST_PAUSES = 2  # one after the other: a step that also copies pages measures nothing
# Steps that may go without prompts because they are dear already: so many, and one more for so many
# steps with prompts. More, and prompts would wait for the many that run.
_MOST_SPARED, _MIXED_FOR_ONE = 16, 4


class Pace:
    """Learns from the time of steps; decides on the prompt tokens of the next one.

    Args:
        slowdown: how many times as long as before a step may take that continues sequences, beside
            few prompts; with 1 prompts are read as slowly as they can be.
    """

    def __init__(self, slowdown: float) -> None:
        if not slowdown >= 1:
            raise ValueError(f"slowdown must be at least 1, got {slowdown}")
        self._slowdown = slowdown
        self._decode_s = 0.0  # of a step without prompts
        self._before_s = 0.0  # the same, before prompts came
        self._num_decodes = 0  # in the latest one of these
        self._token_s = 0.0  # that a token of a prompt adds
        self._num_mixed = 0  # steps with prompts since then
        self._num_pauses = 0
        self._spares = float(_MOST_SPARED)

    def note(self, num_decodes: int, num_prompt_tokens: float, took_s: float) -> None:
        """Take in what one step took; tokens that went through half of the layers are half."""
        if took_s <= 0:
            return
        if not num_prompt_tokens:
            self._note_decodes(num_decodes, took_s)
        elif not num_decodes:
            # Alone, a prompt's tokens carry the whole step: too much rather than too little.
            if not self._token_s:
                self._token_s = took_s / num_prompt_tokens
        else:
            self._num_mixed += 1
            self._spares = min(_MOST_SPARED, self._spares + 1 / _MIXED_FOR_ONE)
            if self._decode_s:
                added_s = max(took_s - self._decode_s, 0.1 * took_s)
                self._token_s = _blend(self._token_s, added_s / num_prompt_tokens, _TOKEN_WEIGHT)

    def _note_decodes(self, num_decodes: int, took_s: float) -> None:
        if self._num_mixed < _PAUSE_AFTER_CHANGE:
            self._decode_s = _blend(self._decode_s, took_s, _DECODE_WEIGHT)
            self._before_s = self._decode_s
        else:
            # It may have become dearer for a reason: by as much as there are more of them.
            most = _OUTLIER * max(1.0, num_decodes / max(1, self._num_decodes))
            if num_decodes != self._num_decodes:
                self._before_s = self._decode_s = _blend(self._decode_s, took_s, 1.0, most)
            else:
                self._decode_s = _blend(self._decode_s, took_s, _RARE_WEIGHT, most)
                before_s = _blend(self._before_s, self._decode_s, _BEFORE_WEIGHT)
                self._before_s = min(before_s, self._decode_s)
        self._num_decodes = num_decodes
        self._num_mixed = self._num_pauses = 0

    def prompt_tokens(self, num_decodes: int, num_prompts: int, *, spares: bool = False) -> int:
        """Return how many tokens of so many prompts may join a step that continues sequences.

        Args:
            spares: the step will be dear without any.
        """
        if spares and self._spares >= 1:
            self._spares -= 1
            return 0
        if self._is_pause_due(num_decodes):
            self._num_pauses += 1
            if self._num_pauses <= _MOST_PAUSES:
                return 0
            self._num_mixed = self._num_pauses = 0
        if not self._decode_s or not self._token_s:
            return _FIRST_TOKENS
        burst = min(_MOST_OF_BURST, max(1.0, num_prompts / (_BURST * num_decodes)))
        grown_s = self._decode_s - self._before_s
        allowed_s = (self._slowdown - 1) * burst * self._before_s - grown_s
        return max(_FEWEST_TOKENS, int(allowed_s / self._token_s))

    def _is_pause_due(self, num_decodes: int) -> bool:
        known, now = self._num_decodes, num_decodes
        if now > _CHANGE * known or known > _CHANGE * now:
            return self._num_mixed >= _PAUSE_AFTER_CHANGE
        return self._num_mixed >= _PAUSE_AFTER


def _blend(known: float, new: float, weight: float, most: float = _OUTLIER) -> float:
    if not known:
        return new
    return known + weight * (min(new, most * known) - known)
