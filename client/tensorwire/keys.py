"""Request keys: 128 random bits each, so that the server knows a repeated request again."""

from __future__ import annotations

import os
from collections import deque

_KEY_BYTES = 16
_BATCH = 64  # one system call for so many keys: it costs more than a small request's encoding
_pool: deque[bytes] = deque()


def new_key() -> bytes:
    """Return 16 fresh random bytes."""
    try:
        return _pool.popleft()  # atomic: no two threads get the same
    except IndexError:
        random = os.urandom(_KEY_BYTES * _BATCH)
        keys = [random[i : i + _KEY_BYTES] for i in range(0, len(random), _KEY_BYTES)]
        _pool.extend(keys[1:])
        return keys[0]


# A child with its parent's keys would send another request under the same one.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.clear)
