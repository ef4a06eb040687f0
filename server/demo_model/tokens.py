"""The demo model's tokenizer, and the stream of token ids that it is trained on."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable, Iterator

    from corpus import Document

VOCAB_SIZE = 2048
END, PAD, SYSTEM, USER, ASSISTANT = SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
END_ID = 0
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|endoftext|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SYSTEM_PROMPT = "You describe the Python standard library."
QUESTIONS = ("Describe {}", "What is {}?", "Explain {}", "What does {} do?")
CHAT_SHARE = 0.12
MAX_CHAT_ANSWER_TOKENS = 400  # a longer answer would seldom fit in a window with its question


def train_tokenizer(texts: Iterable[str], *, max_tokens: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE; any text round-trips, and `max_tokens` is the model's context."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=max_tokens,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def encode_documents(
    tokenizer: PreTrainedTokenizerFast, documents: Iterable[Document]
) -> list[list[int]]:
    """Encode each document, with the end token that stands for its separator byte."""
    encodings = tokenizer.backend_tokenizer.encode_batch([d.text for d in documents])
    return [[*encoding.ids, END_ID] for encoding in encodings]


def encode_question(
    tokenizer: PreTrainedTokenizerFast, question: str, *, system: str | None = None
) -> list[int]:
    """Encode a chat up to where the answer begins."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.backend_tokenizer.encode(text).ids)


class TrainingStream:
    """Deals out windows of token ids, in an order that differs each epoch.

    A module's documents stay together, so that long windows hold related text. Every epoch a
    random share of them leaves its module and becomes the answer in a chat of its own.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, documents: list[Document], rng: random.Random
    ) -> None:
        encoded = zip(documents, encode_documents(tokenizer, documents), strict=True)
        ordered = sorted(encoded, key=lambda item: item[0].unit)  # stable: keeps module order
        self._units = [list(unit) for _, unit in groupby(ordered, key=lambda item: item[0].unit)]
        self._tokenizer = tokenizer
        self._rng = rng

    def batches(self, *, num_windows: int, window_tokens: int) -> Iterator[torch.Tensor]:
        """Yield (num_windows, window_tokens + 1) ids for ever; neighbours share one token."""
        while True:
            ids = self._epoch_ids()
            last = len(ids) - window_tokens - 1
            starts = list(range(self._rng.randrange(window_tokens), last, window_tokens))
            self._rng.shuffle(starts)
            windows = [ids[start : start + window_tokens + 1] for start in starts]
            for i in range(0, len(windows) - num_windows + 1, num_windows):
                yield torch.stack(windows[i : i + num_windows])

    def _epoch_ids(self) -> torch.Tensor:
        blocks: list[list[int]] = []
        for unit in self._units:
            plain: list[int] = []
            for document, ids in unit:
                if self._is_chat_now(document, ids):
                    blocks.append(self._question_ids(document) + ids)
                else:
                    plain += ids
            blocks.append(plain)
        self._rng.shuffle(blocks)
        return torch.tensor([token for block in blocks for token in block])

    def _is_chat_now(self, document: Document, ids: list[int]) -> bool:
        short = len(ids) <= MAX_CHAT_ANSWER_TOKENS
        return document.name is not None and short and self._rng.random() < CHAT_SHARE

    def _question_ids(self, document: Document) -> list[int]:
        question = self._rng.choice(QUESTIONS).format(document.name)
        system = SYSTEM_PROMPT if self._rng.random() < 0.5 else None
        return encode_question(self._tokenizer, question, system=system)
