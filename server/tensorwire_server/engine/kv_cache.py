"""Keys and values of all running sequences, laid out in slots.

Without a native kernel, gathering pages costs 2-10x an attention call, so behind the scheduler's
pages each sequence has one row range: a slot in an arena of its size class (128, 256, 512, ...
tokens). A sequence that outgrows its class moves to the next, which costs each token about one copy
over its life. Two rules make attention over an arena one call without a gather:

- slots in use are 0 .. n - 1: the last one moves into a hole;
- whatever lies beyond a slot's length is zero: a masked key or value is multiplied by zero, and
  zero times a stale NaN would poison the slot's next owner.

Dimensions: L layers, S slots, H heads (of keys), P positions, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

SMALLEST_CLASS_TOKENS = 128
# What an arena begins with: several slots of a small class, one of a large class.
_FIRST_ALLOCATION_TOKENS = 512
_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGeometry:
    """What one token takes in the cache."""

    num_layers: int
    num_heads: int  # key/value heads
    head_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_heads * self.head_size * self.dtype.itemsize


class KVCache(Protocol):
    """Where sequences' keys and values live; slots here, pages once a kernel reads them."""

    def reserve(self, sequence_id: int, start: int, end: int) -> None:
        """Make room for positions 0 .. end - 1; the first `start` are kept."""

    def release(self, sequence_id: int) -> None:
        """Forget a sequence; one that is unknown is no error."""

    def stats(self) -> dict[str, int]:
        """Return `kv_sequences`, `kv_tokens` and `kv_bytes` (allocated)."""


class Arena:
    """All slots of one size class."""

    def __init__(self, geometry: KVGeometry, num_positions: int) -> None:
        self._geometry = geometry
        self.num_positions = num_positions
        self.owners: list[int] = []  # by slot
        self.lengths: list[int] = []  # by slot
        self.kv_L2SHPD = self._zeros(0)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated; on a CPU, what was never written takes no memory yet."""
        return self.kv_L2SHPD.numel() * self.kv_L2SHPD.element_size()

    def take_slot(self, sequence_id: int) -> int:
        """Give the sequence the slot after the last one in use."""
        slot = len(self.owners)
        if slot == self.kv_L2SHPD.shape[2]:
            self._grow()
        self.owners.append(sequence_id)
        self.lengths.append(0)
        return slot

    def free_slot(self, slot: int) -> int | None:
        """Empty a slot; returns the id of the sequence that moved into it, if one did."""
        last = len(self.owners) - 1
        self.kv_L2SHPD[:, :, slot, :, : self.lengths[slot]] = 0
        if slot != last:
            length = self.lengths[last]
            self.kv_L2SHPD[:, :, slot, :, :length] = self.kv_L2SHPD[:, :, last, :, :length]
            self.kv_L2SHPD[:, :, last, :, :length] = 0
            self.owners[slot], self.lengths[slot] = self.owners[last], length
        self.owners.pop()
        self.lengths.pop()
        if not self.owners:
            # Else each class would keep its own peak, and together they would exceed the budget.
            self.kv_L2SHPD = self._zeros(0)
        return None if slot == last else self.owners[slot]

    def _grow(self) -> None:
        num_slots = self.kv_L2SHPD.shape[2]
        first = max(1, _FIRST_ALLOCATION_TOKENS // self.num_positions)
        grown = self._zeros(num_slots + max(first, num_slots // 2))
        for slot, length in enumerate(self.lengths):  # the zeros beyond need not be touched
            grown[:, :, slot, :, :length] = self.kv_L2SHPD[:, :, slot, :, :length]
        self.kv_L2SHPD = grown

    def _zeros(self, num_slots: int) -> torch.Tensor:
        g = self._geometry
        shape = (g.num_layers, 2, num_slots, g.num_heads, self.num_positions, g.head_size)
        if g.device.type != "cpu":
            return torch.zeros(shape, dtype=g.dtype, device=g.device)
        # torch.zeros writes each byte; numpy asks for pages that the system zeroes when touched.
        num_bytes = num_slots * self.num_positions * g.bytes_per_token
        raw = np.zeros(num_bytes + _ALIGNMENT_BYTES, dtype=np.uint8)
        offset = -raw.ctypes.data % _ALIGNMENT_BYTES
        return torch.from_numpy(raw)[offset : offset + num_bytes].view(g.dtype).view(shape)


class SlotCache:
    """The slot layout of the key/value cache. Not thread-safe: the step's thread owns it."""

    def __init__(self, geometry: KVGeometry, *, context_tokens: int) -> None:
        self.geometry = geometry
        sizes = [SMALLEST_CLASS_TOKENS]
        while sizes[-1] < context_tokens:
            sizes.append(2 * sizes[-1])
        sizes[-1] = max(context_tokens, 1)
        self.arenas = [Arena(geometry, size) for size in sizes]
        self._places: dict[int, tuple[int, int]] = {}  # sequence id -> arena, slot

    def place(self, sequence_id: int) -> tuple[int, int]:
        """Return the indices of the sequence's arena and slot; valid until the next change."""
        return self._places[sequence_id]

    def length(self, sequence_id: int) -> int:
        """Return how many positions the sequence has in use."""
        arena, slot = self._places[sequence_id]
        return self.arenas[arena].lengths[slot]

    def reserve(self, sequence_id: int, start: int, end: int) -> None:
        """Make room for positions 0 .. end - 1; the first `start` are kept."""
        wanted = next(
            (i for i, arena in enumerate(self.arenas) if arena.num_positions >= end), None
        )
        assert wanted is not None, f"{end} tokens exceed the model's context"
        held = self._places.get(sequence_id)
        assert start <= (self.length(sequence_id) if held else 0), "a gap in the cache"
        if held is None:
            self._places[sequence_id] = (wanted, self.arenas[wanted].take_slot(sequence_id))
        elif held[0] < wanted:
            self._move(sequence_id, wanted)
        arena, slot = self._places[sequence_id]
        self.arenas[arena].lengths[slot] = max(end, self.arenas[arena].lengths[slot])

    def release(self, sequence_id: int) -> None:
        """Forget a sequence; one that is unknown is no error."""
        held = self._places.pop(sequence_id, None)
        if held is not None:
            self._free(*held)

    def stats(self) -> dict[str, int]:
        """Return `kv_sequences`, `kv_tokens` and `kv_bytes` (allocated)."""
        return {
            "kv_sequences": len(self._places),
            "kv_tokens": sum(sum(arena.lengths) for arena in self.arenas),
            "kv_bytes": sum(arena.num_bytes for arena in self.arenas),
        }

    def check_invariants(self) -> None:
        """Fail if the books disagree or a free place is not zero. Slow: reads the whole cache."""
        for sequence_id, (index, slot) in self._places.items():
            assert self.arenas[index].owners[slot] == sequence_id
        assert sum(len(arena.owners) for arena in self.arenas) == len(self._places)
        for arena in self.arenas:
            assert len(arena.owners) == len(arena.lengths) <= arena.kv_L2SHPD.shape[2]
            for slot in range(arena.kv_L2SHPD.shape[2]):
                length = arena.lengths[slot] if slot < len(arena.lengths) else 0
                assert not arena.kv_L2SHPD[:, :, slot, :, length:].any(), "stale keys or values"

    def _move(self, sequence_id: int, wanted: int) -> None:
        old_index, old_slot = self._places[sequence_id]
        old, new = self.arenas[old_index], self.arenas[wanted]
        length = old.lengths[old_slot]
        slot = new.take_slot(sequence_id)
        new.kv_L2SHPD[:, :, slot, :, :length] = old.kv_L2SHPD[:, :, old_slot, :, :length]
        new.lengths[slot] = length
        self._places[sequence_id] = (wanted, slot)
        self._free(old_index, old_slot)

    def _free(self, arena: int, slot: int) -> None:
        moved = self.arenas[arena].free_slot(slot)
        if moved is not None:
            self._places[moved] = (arena, slot)
