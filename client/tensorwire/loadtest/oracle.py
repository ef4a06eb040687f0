"""What the server's `oracle:` model must answer, so that any stream can be checked by itself.

The rule is part of what that model promises: a prompt's UTF-8 bytes and the request's seed give
a 64-bit state (keyed BLAKE2b over the bytes as little-endian 32-bit ids); token i is splitmix64 of
that state at the position behind the prompt, brought into the ids from 256 on.
"""

from __future__ import annotations

import hashlib

import numpy as np
from tensorwire_protocol.tensors import pack_ids

FIRST_GENERATED_ID = 256
DEFAULT_VOCAB = 320


def oracle_tokens(prompt: bytes, seed: int, count: int, vocab: int = DEFAULT_VOCAB) -> list[int]:
    """Return the first `count` tokens that the oracle makes of a prompt."""
    key = seed.to_bytes(8, "little")
    digest = hashlib.blake2b(pack_ids(list(prompt)), digest_size=8, key=key).digest()
    z = np.arange(len(prompt), len(prompt) + count, dtype=np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(int.from_bytes(digest, "little"))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = (z ^ (z >> np.uint64(31))) % np.uint64(vocab - FIRST_GENERATED_ID)
    ids: list[int] = (z + np.uint64(FIRST_GENERATED_ID)).tolist()
    return ids


def chat_prompt(content: str) -> bytes:
    """Return what the oracle makes of a conversation of one message."""
    return f"user: {content}\nassistant: ".encode()
