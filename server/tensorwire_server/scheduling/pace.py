"""How much of a prompt may stand in a step beside sequences that are being continued.

A step takes as long for everybody in it, so a long prompt would stop all running streams. What they
are to notice is a bound on time, not on tokens: how long a step of theirs takes alone, and what a
prompt's token adds, is learnt from the steps themselves.
"""

from __future__ import annotations

# What a new measurement counts against all before it: tokens become dearer as a prompt is read.
_DECODE_WEIGHT, _TOKEN_WEIGHT = 0.1, 0.3
_FIRST_TOKENS = 256  # of a prompt, before anything is known
_FEWEST_TOKENS = 16
_OUTLIER = 2.0  # a step that takes so many times what is usual counts as this much


class Pace:
    """Learns from the time of steps; decides on the prompt tokens of the next one.

    Args:
        slowdown: how many times as long as alone a step may take that continues sequences; with 1
            prompts are read as slowly as they can be.
    """

    def __init__(self, slowdown: float) -> None:
        if not slowdown >= 1:
            raise ValueError(f"slowdown must be at least 1, got {slowdown}")
        self._slowdown = slowdown
        self._decode_s = 0.0  # of a step without prompts
        self._token_s = 0.0  # that a token of a prompt adds

    def note(self, num_decodes: int, num_prompt_tokens: int, took_s: float) -> None:
        """Take in what one step took."""
        if took_s <= 0:
            return
        if not num_prompt_tokens:
            self._decode_s = _blend(self._decode_s, took_s, _DECODE_WEIGHT)
        elif not num_decodes:
            # Alone, a prompt's tokens carry the whole step: too much rather than too little.
            if not self._token_s:
                self._token_s = took_s / num_prompt_tokens
        elif self._decode_s:
            added_s = max(took_s - self._decode_s, 0.1 * took_s)
            self._token_s = _blend(self._token_s, added_s / num_prompt_tokens, _TOKEN_WEIGHT)

    def prompt_tokens(self) -> int:
        """Return how many tokens of prompts may join a step that continues sequences."""
        if not self._decode_s or not self._token_s:
            return _FIRST_TOKENS
        allowed_s = (self._slowdown - 1) * self._decode_s
        return max(_FEWEST_TOKENS, int(allowed_s / self._token_s))


def _blend(known: float, new: float, weight: float) -> float:
    if not known:
        return new
    return known + weight * (min(new, _OUTLIER * known) - known)
