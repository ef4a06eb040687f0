"""The seam between pure scheduling and the engines: what a step is, and what comes back.

Everything here is plain data from the standard library, so that the scheduler, the torch engines
and the torch-free fakes (`oracle`, `echo`) can be exchanged for one another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token of one sequence is chosen, fully resolved (no unset values)."""

    temperature: float  # 0 is greedy
    top_k: int | None  # None: all tokens
    top_p: float  # in (0, 1]
    seed: int  # noise is a pure function of (seed, position)

    def first_scored(self, num_prompt_tokens: int) -> int | None:
        """Return the first position whose logits are wanted even where the next token is known.

        From there on everything has to be computed: a prefix hit may not reach further. None: any
        may.
        """
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What an engine says of its model once it is loaded."""

    tasks: frozenset[str]  # of "generate", "chat", "embed", "infer", "tokenize"
    architecture: str
    parameters: int = 0
    context_tokens: int = 0  # prompt + new tokens of one sequence; 0: no text
    vocab_size: int = 0  # ids a client may send are 0 .. vocab_size - 1
    eos_ids: frozenset[int] = frozenset()
    embedding_size: int = 0
    defaults: Mapping[str, Any] = field(default_factory=dict)  # temperature, top_k, top_p


@dataclass(slots=True)
class Row:
    """One sequence's share of a step: feed `token_ids` at positions `start`, `start + 1`, …

    It is good until its plan is committed: the scheduler turns it into the sequence's next row. To
    make one for each token, a frozen one at that, took a third of a worker's time (measured with
    the oracle).
    """

    sequence_id: int
    token_ids: tuple[int, ...]  # (n,), n >= 1: a chunk of the prompt, or the last sampled token
    start: int  # tokens of this sequence already in the cache
    pages: tuple[int, ...]  # cover positions 0 .. start + n - 1
    sample: bool  # False while more of the prompt is to come
    sampling: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """Copy positions `start` to `end` - 1 of a sequence into a page of the prefix cache.

    A sequence that is not known any more was saved before: plans may be told twice.
    """

    page: int
    sequence_id: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Begin a sequence with pages of the prefix cache, from position 0 on."""

    sequence_id: int
    pages: tuple[int, ...]  # (n,)
    token_ids: tuple[int, ...]  # (n * page_tokens,): what these pages stand for


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One forward pass over a ragged batch; no sequence stands in it twice.

    An engine handles the fields in this order: `dropped`, `saves`, `released`, `reading`,
    `loads`, `rows`.
    """

    rows: tuple[Row, ...]  # may be empty when there is only something to release
    released: tuple[int, ...]  # sequence ids whose cache is free from now on
    dropped: tuple[int, ...] = ()  # pages of the prefix cache that hold nothing from now on
    saves: tuple[Save, ...] = ()
    loads: tuple[Load, ...] = ()  # each for a sequence that has its first row here
    started: tuple[int, ...] = ()  # sequences that have never run before
    # Sequences that are read in more than this step, and how many tokens they will have then: where
    # a cache lays them out in one piece, that is the size to begin with.
    reading: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step made: each row with `sample` is in exactly one of the two maps."""

    tokens: Mapping[int, int]  # sequence id -> sampled token id
    failed: Mapping[int, str]  # sequence id -> why (for example non-finite logits)


class Detokenizer(Protocol):
    """Turns one sequence's tokens into text, never splitting a character."""

    def push(self, token_id: int) -> str:
        """Return the text that became certain with this token; often empty."""

    def flush(self) -> str:
        """Return what is left at the end; an unfinished character becomes U+FFFD."""


class Tokenizer(Protocol):
    """Text and token ids; safe to call from another thread than the engine's."""

    def encode(self, text: str) -> list[int]:
        """Return the prompt's ids, special tokens added as the model wants them."""

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the ids of a conversation, ready for the assistant's turn.

        Raises:
            BadParams: the model has no chat template, or refuses these roles.
        """

    def detokenizer(self, prompt_ids: Sequence[int]) -> Detokenizer:
        """Return a fresh incremental decoder for text that follows `prompt_ids`."""


class GenerateEngine(Protocol):
    """A text model that continues many sequences at once. One thread calls `step`."""

    @property
    def card(self) -> ModelCard: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def step(self, plan: StepPlan) -> StepResult:
        """Run one step. An exception here is the engine's failure, not a request's.

        What it saves lies behind the pages of the plan until they are dropped or saved again.
        """

    def stats(self) -> Mapping[str, int]:
        """Return counters for `stats`, for example `kv_sequences` (0 when nothing runs)."""


class ArrayEngine(Protocol):
    """A model that answers each item of a batch once: encoders and plain modules."""

    @property
    def card(self) -> ModelCard: ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    def run(self, items: Sequence[Any]) -> list[Any]:
        """Return one outcome per item, in order; an Exception as outcome fails that item alone.

        For `embed` an item is a list of token ids and an outcome a float32 (d,) array; for
        `infer` both are dicts of named arrays.
        """
