"""Which slots hold which blocks: one bit mask per block hash, in a table of many small dictionaries.

Pure. Owns the memory and the sweep of released slots; `prefix_index` knows whose slot it is. A slot is released at
once, whatever it holds: its bits stay in the masks until a sweep has passed, a part with each addition. Small
dictionaries keep every single step short: one of a million entries would stop the event loop for 35 ms when it grows.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

SHARDS = 1024
SHARD_SHIFT = 54
"""The first 10 bits of a hash select its shard, as a list index from -512 to 511. The last bits would not do: they
also select an entry's place in a dictionary, so the entries of one shard would collide.
"""
SWEPT_PER_ADDED = 8
"""Entries that a sweep visits for each block that is added: it ends before the table has grown by an eighth."""
SWEPT_MIN = 2_048


class BlockTable:
    """Block hash -> mask of the slots that hold it."""

    def __init__(self, swept_min: int = SWEPT_MIN) -> None:
        """`swept_min`: entries that a part of a sweep visits at least."""
        self._swept_min = swept_min
        self._shards: list[dict[int, int]] = [{} for _ in range(SHARDS)]
        self._entry_count = 0
        self._free_slots: list[int] = []
        """A heap: low slots keep the masks short."""
        self._slot_count = 0
        self._released = 0
        """Mask of the slots that the next sweep clears."""
        self._sweeping = 0
        """Mask of the slots that the current sweep clears; 0: there is none."""
        self._next_shard = 0

    def __len__(self) -> int:
        """Blocks in the table, with those of released slots that were not swept yet."""
        return self._entry_count

    @property
    def is_sweeping(self) -> bool:
        """Whether there may be bits of released slots."""
        return bool(self._sweeping or self._released)

    def open_slot(self) -> int:
        """A slot that holds nothing."""
        if self._free_slots:
            return heapq.heappop(self._free_slots)
        self._slot_count += 1
        return self._slot_count - 1

    def release(self, slot: int) -> None:
        """Give a slot back with all it holds; takes the same time for any number of blocks."""
        self._released |= 1 << slot

    def holders(self, block_hash: int) -> int:
        """Mask of the slots that hold a block. Bits of released slots may be among them."""
        return self._shards[block_hash >> SHARD_SHIFT].get(block_hash, 0)

    def depths_between(
        self, hashes: Sequence[int], shallow: tuple[int, int], deep: tuple[int, int], exact_min: int
    ) -> list[tuple[int, int]]:
        """Where slots end that hold the first blocks of `hashes`, and not all of them: by halving, for all at once.

        Args:
            hashes: a prompt's blocks.
            shallow: a number of blocks, and the slots that hold all of them.
            deep: the same for more blocks; these slots are among the others.
            exact_min: how many slots to search for at least, from the deepest on; for the others it is enough to know
                some blocks that they hold.

        Returns:
            (slots, count), the deepest first: they hold the first `count` blocks, at least 1, and not the next one. Of
            the slots beyond `exact_min`: no more than they hold.
        """
        shards, ends, parts = self._shards, list[tuple[int, int]](), [(*shallow, *deep)]
        # Up to some hundred rounds where each of many workers has a depth of its own: no calls in here.
        while parts:
            low, held, high, left = parts.pop()
            if held == left:
                continue
            middle = (low + high) // 2
            if middle == low or exact_min <= 0:
                if low:
                    ended = held & ~left
                    exact_min -= ended.bit_count()
                    ends.append((ended, low))
                continue
            block_hash = hashes[middle - 1]
            there = shards[block_hash >> SHARD_SHIFT].get(block_hash, 0) & held
            if there != held:
                parts.append((low, held, middle, there))
            if there != left:
                parts.append((middle, there, high, left & there))
        return ends

    def add(self, slot: int, hashes: Sequence[int]) -> int:
        """Mark blocks as held by a slot. Returns how many were not before."""
        shards, bit, added_count, new_count = self._shards, 1 << slot, 0, 0
        wider: dict[int, int] = {}
        """Equal masks share one object: in a large fleet a mask is larger than its table entry."""
        for block_hash in hashes:
            shard = shards[block_hash >> SHARD_SHIFT]
            mask = shard.get(block_hash)
            if mask is None:
                shard[block_hash] = bit
                new_count += 1
            elif mask & bit:
                continue
            else:
                shard[block_hash] = wider.get(mask) or wider.setdefault(mask, mask | bit)
            added_count += 1
        self._entry_count += new_count
        return added_count

    def remove(self, slot: int, hashes: Sequence[int]) -> int:
        """Unmark blocks, from the last to the first. Returns how many were held by the slot."""
        shards, bit, removed_count = self._shards, 1 << slot, 0
        for block_hash in reversed(hashes):
            shard = shards[block_hash >> SHARD_SHIFT]
            mask = shard.get(block_hash, 0)
            if not mask & bit:
                continue
            removed_count += 1
            if mask != bit:
                shard[block_hash] = mask ^ bit
            else:
                del shard[block_hash]
                self._entry_count -= 1
        return removed_count

    def sweep(self, added_count: int) -> bool:
        """Clear bits of released slots, in proportion to what was added. Returns whether a sweep has ended."""
        visits = max(self._swept_min, SWEPT_PER_ADDED * added_count)
        while visits > 0 and self.is_sweeping:
            if not self._sweeping:
                self._sweeping, self._released, self._next_shard = self._released, 0, 0
            visits -= 1 + self._clean(self._next_shard)
            self._next_shard += 1
            if self._next_shard == SHARDS:
                self._end_sweep()
                return True
        return False

    def _live(self) -> int:
        return ~(self._sweeping | self._released)

    def _clean(self, number: int) -> int:
        """Clear one shard; returns how many entries it had."""
        shard, live, stale = self._shards[number], self._live(), ~self._live()
        size = len(shard)
        for block_hash, mask in [(key, mask) for key, mask in shard.items() if mask & stale]:
            if mask & live:
                shard[block_hash] = mask & live
            else:
                del shard[block_hash]
        self._entry_count -= size - len(shard)
        if len(shard) < size // 2:
            # A dictionary keeps its memory when entries are deleted.
            self._shards[number] = dict(shard)
        return size

    def _end_sweep(self) -> None:
        slot, mask, self._sweeping = 0, self._sweeping, 0
        while mask:
            if mask & 1:
                heapq.heappush(self._free_slots, slot)
            mask, slot = mask >> 1, slot + 1
