"""Keys and values of all running sequences, laid out in slots.

Without a native kernel, gathering pages costs 2-10x an attention call, so behind the scheduler's
pages each sequence has one row range: a slot in an arena of its size class (128, 256, 512, ...
tokens). A sequence that outgrows its class moves to the next, which costs each token about one copy
over its life. Those that grow side by side would all move in the same step, and everybody would
wait for it: so they begin early enough, one in a step.

Two rules make attention over an arena one call without a gather:

- slots in use are 0 .. n - 1: the last one moves into a hole;
- whatever lies beyond a slot's length is zero: a masked key or value is multiplied by zero, and
  zero times a stale NaN would poison the slot's next owner.

Beside the slots stand the store of the prefix cache (`page_store.py`), and what chunks have become
that are between two layers (`halfway.py`). Slots and store take memory where
something was written, and give it back (`memory.py`): what the scheduler counts in pages is what
the process holds, but for the rest of a system page in each head's row (`KVGeometry.slack_bytes`).

Dimensions: L layers, S slots, H heads (of keys), P positions, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from tensorwire_server.engine.device import free_bytes
from tensorwire_server.engine.halfway import Halfway
from tensorwire_server.engine.memory import SYSTEM_PAGE_BYTES, ZeroedTensor, round_up
from tensorwire_server.engine.page_store import PageStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from tensorwire_server.scheduling.work import Load, Save, StepPlan

SMALLEST_CLASS_TOKENS = 128
# On a CPU a prompt begins in a slot with room for so many more, else it would move with its first
# tokens.
# And nobody moves earlier than so many tokens before it must.
_ROOM_TOKENS = 32
# What an arena begins with: several slots of a small class, one of a large class.
_FIRST_ALLOCATION_TOKENS = 512
# On a CPU slots that nobody uses are addresses and no memory. To lay out more is to copy all that
# are in use, so there are many at once: so many, if they fit into so many bytes.
_FIRST_SLOTS, _FIRST_ADDRESSES = 64, 1 << 32


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

    def page_bytes(self, page_tokens: int) -> int:
        """Return what a page takes, in a sequence's rows or in the prefix cache."""
        num_bytes = page_tokens * self.bytes_per_token
        return round_up(num_bytes) if self.device.type == "cpu" else num_bytes

    def slack_bytes(self, page_tokens: int) -> int:
        """Return what a sequence may take beyond its pages: the rest of a system page by head."""
        row_bytes = page_tokens * self.head_size * self.dtype.itemsize
        if self.device.type != "cpu" or row_bytes % SYSTEM_PAGE_BYTES == 0:
            return 0
        return 2 * self.num_layers * self.num_heads * SYSTEM_PAGE_BYTES

    def free_bytes(self) -> int:
        """Return how much memory is free in this place now."""
        return free_bytes(self.device)

    def zeros(self, shape: Sequence[int]) -> ZeroedTensor:
        """Return zeros of this type in this place."""
        return ZeroedTensor(shape, self.dtype, self.device)


class Arena:
    """All slots of one size class."""

    def __init__(self, geometry: KVGeometry, num_positions: int) -> None:
        self._geometry = geometry
        self.num_positions = num_positions
        self.owners: list[int] = []  # by slot
        self.lengths: list[int] = []  # by slot
        self._memory = self._zeros(0)

    @property
    def kv_L2SHPD(self) -> torch.Tensor:
        """All keys (0) and values (1)."""
        return self._memory.tensor

    @property
    def num_bytes(self) -> int:
        """Bytes in use; on a device, bytes allocated."""
        g = self._geometry
        if g.device.type != "cpu":
            return self.kv_L2SHPD.numel() * self.kv_L2SHPD.element_size()
        row_bytes = g.head_size * g.dtype.itemsize
        rows = sum(round_up(length * row_bytes) for length in self.lengths)
        return 2 * g.num_layers * g.num_heads * rows

    @property
    def is_crowded(self) -> bool:
        """Say if one sequence has to leave now, else several will have to in the same step."""
        room = self.num_positions - max(self.lengths, default=0)
        return room < min(len(self.owners), _ROOM_TOKENS)

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
        self._clear(slot)
        if slot != last:
            self.move_slot(last, self.kv_L2SHPD, slot)
            self.owners[slot], self.lengths[slot] = self.owners[last], self.lengths[last]
        self.owners.pop()
        self.lengths.pop()
        if not self.owners:
            self._memory = self._zeros(0)
        return None if slot == last else self.owners[slot]

    def _grow(self) -> None:
        num_slots = self.kv_L2SHPD.shape[2]
        least = max(1, _FIRST_ALLOCATION_TOKENS // self.num_positions, num_slots // 2)
        more = least
        if self._geometry.device.type == "cpu":
            slot_bytes = self.num_positions * self._geometry.bytes_per_token
            more = max(least, min(_FIRST_SLOTS, _FIRST_ADDRESSES // slot_bytes))
        try:
            grown = self._zeros(num_slots + more)
        except MemoryError:
            if more == least:
                raise
            grown = self._zeros(num_slots + least)  # addresses are short, memory is not yet
        for slot in range(len(self.lengths)):
            self.move_slot(slot, grown.tensor, slot)
        self._memory = grown

    def move_slot(self, slot: int, to_L2SHPD: torch.Tensor, to_slot: int) -> None:
        """Copy a slot elsewhere and clear it, bit by bit: the whole is never there twice."""
        length = self.lengths[slot]  # what lies beyond is zero, and need not be touched
        for index in self._halves():
            to_L2SHPD[index][to_slot, :, :length] = self.kv_L2SHPD[index][slot, :, :length]
            self._memory.clear((*index, slot))

    def _clear(self, slot: int) -> None:
        for index in self._halves():
            self._memory.clear((*index, slot))

    def _halves(self) -> Iterator[tuple[int, int]]:
        return product(range(self._geometry.num_layers), range(2))

    def _zeros(self, num_slots: int) -> ZeroedTensor:
        g = self._geometry
        shape = (g.num_layers, 2, num_slots, g.num_heads, self.num_positions, g.head_size)
        return g.zeros(shape)


class SlotCache:
    """The slot layout of the key/value cache. Not thread-safe: the step's thread owns it."""

    def __init__(self, geometry: KVGeometry, *, context_tokens: int) -> None:
        self.geometry = geometry
        sizes = [SMALLEST_CLASS_TOKENS]
        while sizes[-1] < context_tokens:
            sizes.append(2 * sizes[-1])
        sizes[-1] = max(context_tokens, 1)
        self.arenas = [Arena(geometry, size) for size in sizes]
        # On a device a slot takes its memory whether it is filled or not, and moving costs little.
        self._room_tokens = _ROOM_TOKENS if geometry.device.type == "cpu" else 0
        self.store = PageStore(geometry)
        self.halfway = Halfway()
        self._places: dict[int, tuple[int, int]] = {}  # sequence id -> arena, slot

    def prepare(self, plan: StepPlan) -> None:
        """Do what a plan says before its rows: drop, save, release, load."""
        for page in plan.dropped:
            self.store.drop(page)
        leaving = set(plan.released)
        last_saves = {save.sequence_id: save for save in plan.saves}
        for save in plan.saves:
            self._save(save)
            # Before the next one is saved: what leaves is there twice until it is released.
            if save.sequence_id in leaving and last_saves[save.sequence_id] is save:
                self.release(save.sequence_id)
        for sequence_id in plan.released:
            self.release(sequence_id)
        for load in plan.loads:
            self.release(load.sequence_id)  # a plan that is told twice begins again
        for sequence_id, num_tokens in plan.reading:
            # Else it would move from class to class as it is read.
            if sequence_id not in self._places:
                most = self.arenas[-1].num_positions
                self._take(sequence_id, min(num_tokens + self._room_tokens, most))
        for load in plan.loads:
            self._load(load)
        for index, arena in enumerate(self.arenas[:-1]):
            if arena.is_crowded:
                # The last of the longest: then no other one has to move into the hole.
                slot = max(range(len(arena.owners)), key=lambda i: (arena.lengths[i], i))
                self._move(arena.owners[slot], index + 1)

    @property
    def will_move(self) -> bool:
        """Say if the next step begins with moving a sequence."""
        return any(arena.is_crowded for arena in self.arenas[:-1])

    def _save(self, save: Save) -> None:
        if save.sequence_id in self._places:  # else it was saved before it was released
            kv_L2HPD = self._rows(save.sequence_id)
            rows = kv_L2HPD[:, :, :, save.start : save.end]
            self.store.save(save.page, rows, save.page_tokens)

    def _load(self, load: Load) -> None:
        self.reserve(load.sequence_id, 0, len(load.token_ids))
        kv_L2HPD = self._rows(load.sequence_id)
        end = 0
        for page in load.pages:
            start, kv_L2HTD = end, self.store.page(page)
            end = start + kv_L2HTD.shape[3]
            kv_L2HPD[:, :, :, start:end] = kv_L2HTD
        assert end == len(load.token_ids), "pages hold something else than they stand for"

    def _rows(self, sequence_id: int) -> torch.Tensor:
        arena, slot = self._places[sequence_id]
        return self.arenas[arena].kv_L2SHPD[:, :, slot]

    def place(self, sequence_id: int) -> tuple[int, int]:
        """Return the indices of the sequence's arena and slot; valid until the next change."""
        return self._places[sequence_id]

    def length(self, sequence_id: int) -> int:
        """Return how many positions the sequence has in use."""
        arena, slot = self._places[sequence_id]
        return self.arenas[arena].lengths[slot]

    def reserve(self, sequence_id: int, start: int, end: int) -> None:
        """Make room for positions 0 .. end - 1; the first `start` are kept."""
        held = self._places.get(sequence_id)
        assert start <= (self.length(sequence_id) if held else 0), "a gap in the cache"
        if held is None:
            self._take(sequence_id, end)
        elif self.arenas[held[0]].num_positions < end:
            self._move(sequence_id, self._class_of(end))
        arena, slot = self._places[sequence_id]
        self.arenas[arena].lengths[slot] = max(end, self.arenas[arena].lengths[slot])

    def release(self, sequence_id: int) -> None:
        """Forget a sequence; one that is unknown is no error."""
        self.halfway.release(sequence_id)
        held = self._places.pop(sequence_id, None)
        if held is not None:
            self._free(*held)

    def stats(self) -> dict[str, int]:
        """Return `kv_sequences`, `kv_tokens`, `kv_cached_pages` and `kv_bytes` (of both)."""
        return {
            "kv_sequences": len(self._places),
            "kv_tokens": sum(sum(arena.lengths) for arena in self.arenas),
            "kv_cached_pages": self.store.num_pages,
            "kv_bytes": sum(arena.num_bytes for arena in self.arenas) + self.store.num_bytes,
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

    def _class_of(self, num_tokens: int) -> int:
        for index, arena in enumerate(self.arenas):
            if arena.num_positions >= num_tokens:
                return index
        raise AssertionError(f"{num_tokens} tokens exceed the model's context")

    def _take(self, sequence_id: int, num_tokens: int) -> None:
        index = self._class_of(num_tokens)
        self._places[sequence_id] = (index, self.arenas[index].take_slot(sequence_id))

    def _move(self, sequence_id: int, wanted: int) -> None:
        old_index, old_slot = self._places[sequence_id]
        old, new = self.arenas[old_index], self.arenas[wanted]
        length = old.lengths[old_slot]
        slot = new.take_slot(sequence_id)
        old.move_slot(old_slot, new.kv_L2SHPD, slot)
        new.lengths[slot] = length
        self._places[sequence_id] = (wanted, slot)
        self._free(old_index, old_slot)

    def _free(self, arena: int, slot: int) -> None:
        moved = self.arenas[arena].free_slot(slot)
        if moved is not None:
            self._places[moved] = (arena, slot)
