"""Measure the committed demo model: bits per byte on held-out modules, and memorisation.

Every method pays for the same bytes: the held-out documents and one separator after each.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from baselines import KneserNey, xz_bits
from corpus import collect_corpus, join_documents
from samples import verbatim_share
from scoring import answer_bits, bits_by_position, model_bits
from tokens import QUESTIONS, encode_documents, encode_question
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from corpus import Corpus, Document

MODEL_FOLDER = Path(__file__).parents[1] / "tensorwire_server/models/builtin/demo"
NUM_QUESTIONS = 300
SEED = 7


def compare_bits_per_byte(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> dict[str, float]:
    """Return the bits per held-out byte of the model and of everything it has to beat."""
    train, text = (join_documents(side).encode() for side in (corpus.train, corpus.held_out))
    train_ids, ids = (_flat_ids(tokenizer, side) for side in (corpus.train, corpus.held_out))
    bits = {
        "model": model_bits(model, ids),
        "xz -9e": xz_bits(text),
        "xz -9e after the training text": xz_bits(text, after=train),
        "5-gram of bytes": KneserNey(train, num_symbols=256).bits(text),
        "5-gram of tokens": KneserNey(train_ids, num_symbols=len(tokenizer)).bits(ids),
    }
    return {method: value / len(text) for method, value in bits.items()}


def measure_memorisation(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> dict[str, float]:
    """Return the share of verbatim spans in plain sampling, and as the defaults sample."""
    train_text = join_documents(corpus.train)
    defaults = model.generation_config
    settings = {"temperature 1": (1.0, 1.0), "defaults": (defaults.temperature, defaults.top_p)}
    return {
        name: verbatim_share(model, tokenizer, train_text, temperature=temperature, top_p=top_p)
        for name, (temperature, top_p) in settings.items()
    }


def measure_chat(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> dict[str, float]:
    """Return bits per byte of held-out docstrings, asked for by their own or a wrong name."""
    named = [document for document in corpus.held_out if document.name]
    chosen = random.Random(SEED).sample(named, NUM_QUESTIONS)
    num_bytes = len(join_documents(chosen).encode())
    shifted = [*chosen[1:], chosen[0]]
    return {
        "right name": _chat_bits(model, tokenizer, chosen, chosen) / num_bytes,
        "wrong name": _chat_bits(model, tokenizer, shifted, chosen) / num_bytes,
    }


def _chat_bits(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    asked: list[Document],
    answered: list[Document],
) -> float:
    answers = encode_documents(tokenizer, answered)
    questions = [
        encode_question(tokenizer, QUESTIONS[0].format(document.name)) for document in asked
    ]
    return sum(answer_bits(model, *pair) for pair in zip(questions, answers, strict=True))


def _flat_ids(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> list[int]:
    return [token for ids in encode_documents(tokenizer, documents) for token in ids]


def main() -> None:
    """Print the figures of the model card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = LlamaForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.model)
    corpus = collect_corpus()
    figures = {
        "held-out bits per byte": compare_bits_per_byte(model, tokenizer, corpus),
        "held-out bits per token by place in the window": bits_by_position(
            model, _flat_ids(tokenizer, corpus.held_out)
        ),
        "held-out docstrings in a chat, bits per byte": measure_chat(model, tokenizer, corpus),
        "share of sampled spans found in the training text": measure_memorisation(
            model, tokenizer, corpus
        ),
    }
    for title, rows in figures.items():
        print(f"\n{title}")
        for name, value in rows.items():
            print(f"  {name:<32}{value:8.3f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
