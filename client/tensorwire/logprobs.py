"""How likely a model found the tokens of a text: what END says of it, as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tensorwire_protocol.errors import InternalError
from tensorwire_protocol.tensors import pack_ids

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Logprobs:
    """Natural logarithms of probabilities that the model gave to n tokens.

    They are the model's own: before temperature, penalties, biases and filters.
    """

    token_ids: NDArray[np.int32]  # (n,)
    token_logprobs: NDArray[np.float32]  # (n,)
    top_ids: NDArray[np.int32]  # (n, k): the likeliest tokens at each place, the likeliest first
    top_logprobs: NDArray[np.float32]  # (n, k)

    def __repr__(self) -> str:
        """Return how many there are."""
        return (
            f"Logprobs(<{len(self.token_ids)} tokens, {self.top_ids.shape[1]} likeliest of each>)"
        )


def read_logprobs(said: Any, token_ids: Sequence[int]) -> Logprobs | None:
    """Return the log-probabilities of an answer with these tokens; None if there are none.

    Raises:
        InternalError: the arrays have not as many rows as there are tokens.
    """
    return None if said is None else _arrays(said, pack_ids(token_ids))


def read_prompt_logprobs(said: Any) -> Logprobs | None:
    """Return the log-probabilities of a prompt's tokens, from the second on."""
    return None if said is None else _arrays(said, said.get("token_ids", b""))


def _arrays(said: Mapping[str, Any], packed_ids: bytes) -> Logprobs:
    try:
        ids = np.frombuffer(packed_ids, dtype="<i4")
        own = np.frombuffer(said["token_logprobs"], dtype="<f4")
        top_ids = np.frombuffer(said["top_ids"], dtype="<i4")
        top = np.frombuffer(said["top_logprobs"], dtype="<f4")
        num_top = len(top) // len(own) if len(own) else 0
        if len(own) != len(ids):
            raise ValueError(f"{len(own)} of {len(ids)} tokens")
        shape = (len(own), num_top)
        return Logprobs(
            token_ids=ids.astype(np.int32),
            token_logprobs=own.astype(np.float32),
            top_ids=top_ids.reshape(shape).astype(np.int32),
            top_logprobs=top.reshape(shape).astype(np.float32),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InternalError(f"the server's log-probabilities cannot be read: {error}") from error
