"""A text model that is a pure function: what must come out is known without running it.

Ids 0-255 are the bytes of a prompt; what is generated has ids from 256 on, each one printable
character. So a token fed back is told from the prompt by its id, and a sequence that was cut into
chunks, batched with others or resumed elsewhere gives the tokens that `oracle_token` says.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from tensorwire_protocol.tensors import pack_ids

from tensorwire_server.scheduling.work import ModelCard, StepResult
from tensorwire_server.workers.options import parse_options

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from tensorwire_server.scheduling.work import StepPlan

FIRST_GENERATED_ID = 256
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ."
DEFAULT_VOCAB = FIRST_GENERATED_ID + len(CHARACTERS)
_DEFAULTS = {
    "step_ms": 0.0,
    "stall_every": 0.0,  # steps; 0: never
    "stall_ms": 0.0,
    "load_ms": 0.0,
    "context": 4096.0,
    "vocab": float(DEFAULT_VOCAB),
}
_SLOW_STEP_S = 0.1
_MASK = (1 << 64) - 1
_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64's
# The same for arrays, which take as long to turn a number into one of theirs as for ten tokens.
_CONSTANTS = tuple(map(np.uint64, (_MIX_1, _MIX_2, 30, 27, 31, FIRST_GENERATED_ID)))
_BLOCK_TOKENS = 128  # hashed together, for what ten cost that are hashed alone


def oracle_token(
    prompt_ids: Sequence[int], seed: int, index: int, vocab: int = DEFAULT_VOCAB
) -> int:
    """Return the token at `index` (from 0) of what the oracle makes of a prompt."""
    lead = _leading_bytes(prompt_ids)
    return _token(_state(_hasher(seed, lead)), len(prompt_ids) + index, vocab)


def oracle_tokens(
    prompt_ids: Sequence[int], seed: int, count: int, vocab: int = DEFAULT_VOCAB
) -> list[int]:
    """Return the first `count` tokens of what the oracle makes of a prompt."""
    state = _state(_hasher(seed, _leading_bytes(prompt_ids)))
    return _tokens(state, len(prompt_ids), count, vocab)


def oracle_text(token_ids: Sequence[int]) -> str:
    """Return the text of tokens, one character each."""
    return "".join(map(_character, token_ids))


def _leading_bytes(ids: Sequence[int]) -> list[int]:
    if max(ids) < FIRST_GENERATED_ID:
        return list(ids)
    return list(takewhile(lambda token: token < FIRST_GENERATED_ID, ids))


def _hasher(seed: int, ids: Sequence[int]) -> Any:
    return hashlib.blake2b(pack_ids(ids), digest_size=8, key=seed.to_bytes(8, "little"))


def _state(hasher: Any) -> int:
    return int.from_bytes(hasher.digest(), "little")


def _token(state: int, position: int, vocab: int) -> int:
    """Return splitmix64 of `state` at `position`, as an id from 256 to vocab - 1."""
    z = (state + position * _GAMMA) & _MASK
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return FIRST_GENERATED_ID + (z ^ (z >> 31)) % (vocab - FIRST_GENERATED_ID)


@lru_cache(maxsize=8)
def _strides(count: int) -> NDArray[np.uint64]:
    return np.arange(count, dtype=np.uint64) * np.uint64(_GAMMA)


def _tokens(state: int, start: int, count: int, vocab: int) -> list[int]:
    """Return what `_token` gives at `count` positions from `start` on."""
    mix_1, mix_2, by_30, by_27, by_31, first = _CONSTANTS
    z = _strides(count) + np.uint64((state + start * _GAMMA) & _MASK)
    z ^= z >> by_30
    z *= mix_1
    z ^= z >> by_27
    z *= mix_2
    z ^= z >> by_31
    z %= np.uint64(vocab - FIRST_GENERATED_ID)
    z += first
    ids: list[int] = z.tolist()
    return ids


def _character(token_id: int) -> str:
    if token_id >= FIRST_GENERATED_ID:
        return CHARACTERS[(token_id - FIRST_GENERATED_ID) % len(CHARACTERS)]
    return chr(token_id) if 32 <= token_id < 127 else "?"


class _Table(dict[int, str]):
    """The characters of the tokens that have come."""

    def __missing__(self, token_id: int) -> str:
        character = self[token_id] = _character(token_id)
        return character


class _Characters:
    """Every token is a character of its own: nothing is ever pending."""

    push: ClassVar = _Table().__getitem__  # one for all: no more than a vocabulary comes into it

    @staticmethod
    def flush() -> str:
        return ""


class ByteTokenizer:
    """UTF-8 bytes as ids."""

    renders_at_once = True

    def encode_word(self, text: str) -> list[list[int]]:
        """Return the bytes of a text: they are the same everywhere."""
        return [self.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; those from 256 on are one character each."""
        return "".join(map(_character, ids))

    def encode(self, text: str) -> list[int]:
        """Return the bytes of a text."""
        return list(text.encode())

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the bytes of `role: text` lines, with an open line for the assistant."""
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return self.encode("".join(lines) + "assistant: ")

    def detokenizer(self, prompt_ids: Sequence[int]) -> _Characters:
        """Return a decoder: a character for each token."""
        return _Characters()


class _Slot:
    """What stands for a sequence's cache."""

    def __init__(self, seed: int) -> None:
        self.hasher = _hasher(seed, ())
        self.num_cached = 0
        self.lead_is_over = False
        self.state = 0  # known when the lead is over
        self.lead = bytearray()
        self.trigger: bytes | None = None
        self.block: list[Any] = []  # tokens that will be sampled
        self.block_start = 0  # position of the first of them

    def hash_block(self, vocab: int) -> int:
        """Begin another block with the next token; return the index of that token in it."""
        self.block_start = self.num_cached
        self.block = _tokens(self.state, self.num_cached, _BLOCK_TOKENS, vocab)
        return 0


def _read_lead(slot: _Slot, token_ids: Sequence[int], *, is_last: bool) -> None:
    """Take in what some tokens have of the prompt's own bytes."""
    lead = _leading_bytes(token_ids)
    slot.hasher.update(pack_ids(lead))
    slot.lead += bytes(lead)
    slot.lead_is_over = len(lead) < len(token_ids) or is_last
    if slot.lead_is_over:
        slot.state = _state(slot.hasher)
        slot.trigger = next((t for t in _TRIGGERS if t in slot.lead), None)


class OracleEngine:
    """Implements `GenerateEngine` without torch; time and faults by program."""

    def __init__(self, source: str = "oracle:") -> None:
        options = parse_options(source, _DEFAULTS)
        self._vocab = int(options["vocab"])
        if self._vocab <= FIRST_GENERATED_ID:
            raise ValueError(f"oracle: vocab must be above {FIRST_GENERATED_ID}")
        self._step_s = options["step_ms"] / 1000
        self._stall_every, self._stall_s = int(options["stall_every"]), options["stall_ms"] / 1000
        self._num_steps = 0
        self._slots: dict[Any, _Slot] = {}  # by sequence
        self.tokenizer = ByteTokenizer()
        self.card = ModelCard(
            tasks=frozenset({"generate", "chat", "tokenize"}),
            architecture="oracle",
            context_tokens=int(options["context"]),
            vocab_size=self._vocab,
            defaults={"temperature": 1.0, "top_k": None, "top_p": 1.0},
        )
        time.sleep(options["load_ms"] / 1000)

    def step(self, plan: StepPlan) -> StepResult:
        """Run one step."""
        for sequence_id in plan.released:
            self._slots.pop(sequence_id, None)
        # Its cache is the tokens themselves: nothing has to be saved to be loaded.
        loads = {load.sequence_id: load.token_ids for load in plan.loads}
        self._pass_time(plan)
        # Ids and tokens are `Any` here: compiled code passes them on as the objects they are.
        tokens: dict[Any, Any] = {}
        failed: dict[int, str] = {}
        slots, vocab = self._slots, self._vocab
        for row in plan.rows:
            id: Any = row.sequence_id
            slot = slots.get(id)
            if slot is None or row.start == 0 or (loads and id in loads):
                slot = slots[id] = _Slot(row.sampling.seed)
                if id in loads:
                    slot.num_cached = len(loads[id])
                    _read_lead(slot, loads[id], is_last=False)
            if slot.num_cached != row.start:
                failed[id] = f"fed at {row.start}, {slot.num_cached} are cached"
                slot.num_cached = -1
                continue
            slot.num_cached += len(row.token_ids)
            if not slot.lead_is_over:
                _read_lead(slot, row.token_ids, is_last=row.sample)
            if not row.sample:
                continue
            if slot.trigger is not None and self._is_fatal(slot.trigger):
                failed[id] = "non-finite logits"
                continue
            at = slot.num_cached - slot.block_start
            if at >= len(slot.block):
                at = slot.hash_block(vocab)
            tokens[id] = slot.block[at]
        return StepResult(tokens=tokens, failed=failed)

    def stats(self) -> Mapping[str, int]:
        """Return `kv_sequences` and `kv_tokens`."""
        slots = self._slots.values()
        return {"kv_sequences": len(slots), "kv_tokens": sum(s.num_cached for s in slots)}

    def _pass_time(self, plan: StepPlan) -> None:
        self._num_steps += 1
        seconds = self._step_s
        if self._stall_every and self._num_steps % self._stall_every == 0:
            seconds += self._stall_s
        if any(slot.trigger == b"!SLOW" for slot in self._slots.values()):
            seconds += _SLOW_STEP_S
        if seconds and plan.rows:
            time.sleep(seconds)

    def _is_fatal(self, trigger: bytes) -> bool:
        """Do what the prompt asks for; True to fail its row."""
        if trigger == b"!KILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if trigger == b"!HANG":
            time.sleep(1e9)
        return trigger == b"!NAN"


_TRIGGERS = (b"!KILL", b"!HANG", b"!NAN", b"!SLOW")
