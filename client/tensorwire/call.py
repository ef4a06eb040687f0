"""One call as data: ready to be sent on any stream, and again. `calls` makes them.

Apart from it, because this is compiled where a wheel is, and `calls` is not.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import numpy as np
from tensorwire_protocol.frames import DATA_BYTES
from tensorwire_protocol.messages import Request, Resume
from tensorwire_protocol.tensors import RawTensor

from tensorwire.keys import new_key

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tensorwire_protocol.messages import Result

T = TypeVar("T")
_LONGEST_MS: Final = 2**32 - 1
_LARGEST: Final = DATA_BYTES
_ARRAY: Final = np.ndarray
_RAW: Final = RawTensor


class Call(Generic[T]):
    """One request; `read` makes its result from a RES."""

    __slots__ = ("inputs", "key", "model", "op", "params", "priority", "read", "timeout_s")

    def __init__(
        self,
        op: str,
        read: Callable[[Result], T],
        model: str | None,
        inputs: Mapping[str, Any],
        params: Mapping[str, Any],
        timeout_s: float | None,
        priority: int = 0,
    ) -> None:
        self.op = op
        self.read = read
        self.model = model
        self.inputs = inputs
        self.params = params
        self.timeout_s = timeout_s
        self.priority = priority
        self.key = new_key()

    @property
    def is_bulk(self) -> bool:
        """Say if the request is too large for one frame."""
        num_bytes = 0
        for value in self.inputs.values():
            num_bytes += _num_bytes(value)
        return num_bytes > _LARGEST

    def renew(self) -> None:
        """Become another request to the server: what it knows under the present key is no use."""
        self.key = new_key()

    def request(self, stream: int, left_s: float | None) -> Request:
        """Return the message; `left_s` is what is left of the timeout."""
        left_ms = None if left_s is None else max(1, min(ceil(left_s * 1000), _LONGEST_MS))
        return Request(
            stream,
            self.op,
            self.key,
            self.model,
            self.inputs,
            self.params,
            left_ms,
            priority=self.priority,
        )

    def resume(self, stream: int, next_index: int, next_char: int) -> Resume:
        """Return the message that asks for the rest, behind what has arrived."""
        return Resume(stream=stream, key=self.key, next_index=next_index, next_char=next_char)


def _num_bytes(value: Any) -> int:
    """Return the bytes of the arrays in an input."""
    if type(value) is _ARRAY:
        num_bytes: int = value.nbytes
        return num_bytes
    if type(value) is _RAW:
        num_bytes = value.bits.nbytes
        return num_bytes
    return sum(map(_num_bytes, value)) if type(value) is list else 0
