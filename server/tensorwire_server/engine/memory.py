"""Zeroed memory that grows when it is written to, and shrinks when it is given back.

On a CPU the system gives an anonymous mapping its memory page by page, at the first write; a page
that is given back reads as zeros again. So large arrays may be laid out once, and take only what is
in use. Devices have no such thing: there all is taken at once.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

SYSTEM_PAGE_BYTES = mmap.PAGESIZE


def round_up(num_bytes: int) -> int:
    """Return what so many bytes take in whole pages of the system."""
    return -(-num_bytes // SYSTEM_PAGE_BYTES) * SYSTEM_PAGE_BYTES


class ZeroedTensor:
    """A tensor of zeros, parts of which can be made zero again, and their memory free.

    Raises:
        MemoryError: a process may not have so many addresses.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._map: mmap.mmap | None = None
        num_bytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if device.type != "cpu" or not num_bytes:
            self.tensor = torch.zeros(tuple(shape), dtype=dtype, device=device)
            return
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        try:
            self._map = mmap.mmap(-1, num_bytes, flags=flags)
        except OSError as error:
            raise MemoryError(
                f"the system grants no {num_bytes} bytes of addresses; is `ulimit -v` set?"
            ) from error
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            # A huge page takes 2 MiB at the first byte written.
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)
        self.tensor = torch.from_numpy(self._bytes).view(dtype).view(tuple(shape))

    def clear(self, index: tuple[int, ...]) -> None:
        """Make the part at these first indices zero; on a CPU its memory is free at once."""
        part = self.tensor[index]
        if self._map is None:
            part.zero_()
            return
        first = int(part.storage_offset()) * part.element_size()
        last = first + part.numel() * part.element_size()
        whole = round_up(first), last // SYSTEM_PAGE_BYTES * SYSTEM_PAGE_BYTES
        if whole[0] >= whole[1]:
            self._bytes[first:last] = 0
            return
        self._bytes[first : whole[0]] = 0
        self._bytes[whole[1] : last] = 0
        self._map.madvise(mmap.MADV_DONTNEED, whole[0], whole[1] - whole[0])
