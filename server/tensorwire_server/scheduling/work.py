"""The seam between pure scheduling and the engines: what a step is, and what comes back.

Everything here is plain data from the standard library, so that the scheduler, the torch engines
and the torch-free fakes (`oracle`, `echo`) can be exchanged for one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence  # noqa: TC003 (the compiled form asks)
from dataclasses import dataclass, field
from typing import Any, Final, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Shaping:
    """What changes a row's logits before a token is chosen, in this order."""

    bias: tuple[tuple[int, float], ...] = ()  # token id, what is added; each id once
    repetition_penalty: float = 1.0  # above 1: against tokens of the prompt and the answer
    frequency_penalty: float = 0.0  # taken off for each time the token is in the answer
    presence_penalty: float = 0.0  # taken off once if the token is in the answer
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences of token ids that are never completed
    min_new_tokens: int = 0  # before so many no `stop_ids` are chosen
    stop_ids: tuple[int, ...] = ()
    only: int | None = None  # the one token that may be chosen, whatever is above

    @property
    def counts(self) -> bool:
        """Say if it matters how often a token has come."""
        return (
            self.repetition_penalty != 1 or self.frequency_penalty != 0
            or self.presence_penalty != 0
        )  # fmt: skip


# Not frozen, as `Row`: there is one for each request. But nobody changes it.
@dataclass(kw_only=True, unsafe_hash=True)
class Sampling:
    """How the next token of one sequence is chosen, fully resolved (no unset values)."""

    temperature: float  # 0 is greedy
    top_k: int | None  # None: all tokens
    top_p: float  # in (0, 1]
    seed: int  # noise is a pure function of (seed, position)
    min_p: float = 0.0  # in [0, 1]: a share of the likeliest token's probability
    shaping: Shaping | None = None  # None: the model's logits as they are
    logprobs: int | None = None  # how many of the likeliest are reported with each token
    prompt_logprobs: int | None = None  # the same for the prompt; None: nothing is reported

    @property
    def reports(self) -> bool:
        """Say if log-probabilities are wanted."""
        return self.logprobs is not None or self.prompt_logprobs is not None

    def first_scored(self, num_prompt_tokens: int) -> int | None:
        """Return the first position whose logits are wanted even where the next token is known.

        From there on everything has to be computed: a prefix hit may not reach further. None: any
        may.
        """
        if self.prompt_logprobs is not None:
            return 0
        return None if self.logprobs is None else num_prompt_tokens - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What an engine says of its model once it is loaded."""

    tasks: frozenset[str]  # of "generate", "chat", "embed", "infer", "tokenize"
    architecture: str
    backend: str | None = None  # "any" or "fused"; None: an engine without torch
    quantization: str | None = None  # "none", "int8" or "int4"
    parameters: int = 0
    context_tokens: int = 0  # prompt + new tokens of one sequence; 0: no text
    vocab_size: int = 0  # ids a client may send are 0 .. vocab_size - 1
    eos_ids: frozenset[int] = frozenset()
    embedding_size: int = 0
    resumable_layers: int = 1  # of which a row may go through some in a step; 1: always through all
    # What unset options mean: temperature, top_k, top_p, min_p, repetition_penalty,
    # min_new_tokens; and bad_words, which hold always.
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Row:
    """One sequence's share of a step: feed `token_ids` at positions `start`, `start + 1`, …

    It is good until its plan is committed: the scheduler turns it into the sequence's next row. To
    make one for each token, a frozen one at that, took a third of a worker's time (measured with
    the oracle).
    """

    sequence_id: int
    token_ids: tuple[int, ...]  # (n,), n >= 1: a chunk of the prompt, or the last sampled token
    start: int  # tokens of this sequence already in the cache
    # They cover positions 0 .. start + n - 1, for an engine whose kernel reads pages. Ours keep
    # each sequence in one piece, and do not look at them.
    pages: tuple[int, ...]
    sample: bool  # False while more of the prompt is to come
    sampling: Sampling
    # All tokens of the sequence that are known, the prompt first: the scheduler's list, it grows.
    history: Sequence[int] = ()
    num_prompt_tokens: int = 0  # of them
    # From which layer to which one, the last not included; None: through all. A row that stops
    # early is followed by one of the same tokens that begins where it stopped.
    layers: tuple[int, int] | None = None

    @property
    def num_logits(self) -> int:
        """Of how many of its last tokens the logits are wanted: one to sample, others to report."""
        sampling = self.sampling
        first = sampling.first_scored(self.num_prompt_tokens)
        if first is None:
            return int(self.sample)
        end = self.start + len(self.token_ids)
        is_answers = self.start >= self.num_prompt_tokens - 1
        if is_answers and sampling.logprobs is None:
            return int(self.sample)
        return end - max(self.start, first)


class Save:
    """Copy positions `start` to `end` - 1 of a sequence into a page of the prefix cache.

    A sequence that is not known any more was saved before: plans may be told twice. There is one
    for each page that somebody computes: a plain class, which is cheap where it is compiled.

    Args:
        page_tokens: that there is room for in a page; as many, or fewer, are saved.
    """

    def __init__(
        self, *, page: int, sequence_id: int, start: int, end: int, page_tokens: int
    ) -> None:
        self.page: Final = page
        self.sequence_id: Final = sequence_id
        self.start: Final = start
        self.end: Final = end
        self.page_tokens: Final = page_tokens


@dataclass(frozen=True, kw_only=True)
class Load:
    """Begin a sequence with pages of the prefix cache, from position 0 on."""

    sequence_id: int
    pages: tuple[int, ...]  # the last one may hold fewer tokens than the others
    token_ids: tuple[int, ...]  # what these pages stand for


@dataclass(kw_only=True)  # not frozen, as `Row`: there is one for each step
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


@dataclass(kw_only=True)  # not frozen, as `Row`: there is one for each step
class StepResult:
    """What a step made: each row with `sample` is in exactly one of the two maps."""

    tokens: dict[int, int]  # sequence id -> sampled token id
    failed: dict[int, str]  # sequence id -> why (for example non-finite logits)
    scores: Sequence[Scores] = ()  # of the sequences that want them
    # The next step has to move what sequences hold, besides: it had better read no prompts.
    moves_next: bool = False


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Log-probabilities of some tokens of one sequence, as the model gives them.

    That is before any setting of `Sampling` changes them: so they are the same however often and
    wherever they are computed. Arrays as bytes, little-endian, in C order.
    """

    sequence_id: int
    start: int  # position of the first of these n tokens in the sequence
    token_logprobs: bytes  # float32 (n,)
    num_top: int  # k
    top_ids: bytes  # int32 (n, k): the likeliest tokens at each place, the likeliest first
    top_logprobs: bytes  # float32 (n, k)


class Detokenizer(Protocol):
    """Turns one sequence's tokens into text, never splitting a character."""

    def push(self, token_id: int) -> str:
        """Return the text that became certain with this token; often empty."""

    def flush(self) -> str:
        """Return what is left at the end; an unfinished character becomes U+FFFD."""


class Tokenizer(Protocol):
    """Text and token ids; safe to call from another thread than the engine's."""

    # Whether `render_chat` takes as good as no time; else it wants a thread that may wait.
    renders_at_once: bool

    def encode(self, text: str) -> list[int]:
        """Return the prompt's ids, special tokens added as the model wants them."""

    def encode_word(self, text: str) -> list[list[int]]:
        """Return the ids of a text at the beginning and in the middle of a line, nothing added."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a prompt given as ids, without special tokens."""

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
