"""A model that answers with what it was given; the cheapest thing a worker can host."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from tensorwire_protocol.tensors import pack_ids

from tensorwire_server.scheduling.work import ModelCard
from tensorwire_server.workers.options import parse_options
from tensorwire_server.workers.oracle import ByteTokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

EMBEDDING_SIZE = 8


def echo_embedding(ids: Sequence[int]) -> NDArray[Any]:
    """Return the (8,) float32 vector that echo gives for a text's ids: a hash in [0, 1)."""
    digest = hashlib.blake2b(pack_ids(ids), digest_size=4 * EMBEDDING_SIZE).digest()
    return (np.frombuffer(digest, dtype="<u4") >> 8).astype(np.float32) / np.float32(1 << 24)


class EchoEngine:
    """Implements `ArrayEngine` without torch: `infer` gives back its inputs, text included."""

    def __init__(self, source: str = "echo:") -> None:
        options = parse_options(source, {"service_ms": 0.0, "context": 4096.0})
        self._service_s = options["service_ms"] / 1000
        # Handing an item to another thread and back costs more than all the rest of an echo.
        self.inline = self._service_s == 0
        self.tokenizer = ByteTokenizer()
        self.card = ModelCard(
            tasks=frozenset({"embed", "infer", "tokenize"}),
            architecture="echo",
            context_tokens=int(options["context"]),
            vocab_size=256,
            embedding_size=EMBEDDING_SIZE,
        )

    def run(self, items: Sequence[Any]) -> list[Any]:
        """Return each item's inputs, or the vector of its ids, after one service time."""
        if self._service_s:
            time.sleep(self._service_s)
        return [item if type(item) is dict else echo_embedding(item) for item in items]
