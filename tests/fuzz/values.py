"""Random values that a sender may write: texts, numbers, maps, arrays, the inputs of operations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from tensorwire_protocol.operations import OPERATIONS, write_ids, write_text, write_texts
from tensorwire_protocol.tensors import RawTensor

if TYPE_CHECKING:
    from random import Random

NUMBERS = [0, 1, -1, 5, 127, 128, 255, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63, -(2**63)]
FLOATS = [0.0, -0.0, 0.5, 1.0, 100.0, 1e308, float("inf"), float("nan")]
TEXTS = ["", "a", "stop", "Hé", "\0", "\ufeff", "日本語", "x" * 64, "y" * 300]
PARAMS: dict[str, list[Any]] = {
    "max_new_tokens": [1, 16, 2**31 - 1],
    "temperature": [0, 0.5, 100],
    "top_k": [1, 50],
    "top_p": [1, 0.9],
    "seed": [0, 2**63 - 1],
    "min_p": [0, 0.1],
    "repetition_penalty": [0.01, 1.3],
    "presence_penalty": [-2, 1.5],
    "frequency_penalty": [-2, 1.5],
    "logit_bias": [[], [[0, -100], [1, 0.5]]],
    "bad_words": [["a"], [[1, 2], "b"]],
    "min_new_tokens": [0, 3],
    "ignore_eos": [True, False],
    "logprobs": [0, 20],
    "prompt_logprobs": [0, 20],
    "echo": [True, False],
    "stop": [["a"], ["b"] * 8],
    "stop_ids": [[0], [1, 2]],
    "wait": [True, False],
}
_LARGE, _INFER = 0.15, 0.4
# Around the sizes from which messages leave as bodies, and need credit.
_LARGE_BYTES = [64 * 1024 + 2, 256 * 1024, 256 * 1024 + 1, 300_001, 1024 * 1024 + 1, 1_200_001]
_DTYPES = ["<f8", "<f4", "<f2", "<i8", "<i4", "<i2", "i1", "<u8", "<u4", "<u2", "u1", "?"]


def key(rng: Random) -> bytes:
    return rng.randbytes(16)


def scalar(rng: Random) -> Any:
    return rng.choice([None, True, False, b"", b"\0\xff", *NUMBERS, *FLOATS, *TEXTS])


def plain(rng: Random, depth: int = 3) -> Any:
    """Return any value without arrays."""
    if depth == 0 or rng.random() < 0.6:
        return scalar(rng)
    if rng.random() < 0.5:
        return [plain(rng, depth - 1) for _ in range(rng.randrange(4))]
    return plain_map(rng, depth - 1)


def plain_map(rng: Random, depth: int = 3) -> dict[str, Any]:
    return {rng.choice(TEXTS[:-1]): plain(rng, depth) for _ in range(rng.randrange(4))}


def numbers(rng: Random) -> dict[str, Any]:
    return {name: rng.choice(NUMBERS + FLOATS) for name in ("queued_ms", "x")[: rng.randrange(3)]}


def array(rng: Random) -> np.ndarray[Any, Any] | RawTensor:
    """Return an array of any dtype and shape: some inline, some in a segment."""
    shape = [rng.choice([0, 1, 2, 3, 7, 40]) for _ in range(rng.choice([0, 1, 1, 2, 3]))]
    if rng.random() < 0.1:
        return RawTensor("BF16", np.zeros(shape, "<u2"))
    return np.zeros(shape, rng.choice(_DTYPES))


def arrays(rng: Random) -> dict[str, Any]:
    """Return named arrays, some of them inside other values."""
    if rng.random() < _LARGE:
        return {"large": np.zeros(rng.choice(_LARGE_BYTES), np.uint8)}
    named: dict[str, Any] = {}
    for name in ("a", "b", "x")[: rng.randrange(4)]:
        value = array(rng)
        named[name] = [value, plain(rng, 1)] if rng.random() < 0.2 else value
    return named


def operation(rng: Random) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return an operation's name, inputs and params as a client writes them."""
    name = "infer" if rng.random() < _INFER else rng.choice(list(OPERATIONS))
    text = rng.choice(TEXTS) * rng.choice([1, 1, 1, 50])
    inputs: dict[str, Any] = {}
    if name in ("generate", "tokenize"):
        inputs = {"prompt": write_text(text)}
    if name == "generate" and rng.random() < 0.4:
        inputs = {"ids": write_ids(list(range(rng.choice([1, 5, 300]))))}
    if name in ("chat", "embed"):
        inputs = {"texts": write_texts([text] * rng.choice([1, 2, 300]))}
    if name == "chat":
        inputs = {"roles": ["user"], "texts": write_texts([text])}
    if name == "infer":
        inputs = arrays(rng)
    known = list(OPERATIONS[name].params)
    chosen = rng.sample(known, rng.randrange(len(known) + 1)) if rng.random() < 0.5 else []
    return name, inputs, {param: rng.choice(PARAMS[param]) for param in chosen}
