"""Request keys: 128 random bits each, so that the server knows a repeated request again."""

from __future__ import annotations

import os
import struct
from collections import deque

# One system call for so many keys: it costs more than a small request's encoding.
_BATCH = struct.Struct("16s" * 64)
_pool: deque[bytes] = deque()


def new_key() -> bytes:
    """Return 16 fresh random bytes."""
    try:
        return _pool.popleft()  # atomic: no two threads get the same
    except IndexError:
        keys: tuple[bytes, ...] = _BATCH.unpack(os.urandom(_BATCH.size))
        _pool.extend(keys[1:])
        return keys[0]


# A child with its parent's keys would send another request under the same one.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.clear)
