"""The index of cached blocks: which workers hold the beginning of a prompt, and how much of it.

Pure. Owns which worker is credited; `block_table` holds the blocks, `tandem.client.kv_watch` feeds both. A worker gets
credit only between a complete snapshot and the first doubt. Prefix caches are closed: a worker that holds a block holds
all blocks before it, so a prompt's depth on each worker is searched and not walked (ADR 20 has both figures).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

from tandem.domain.worker import Start
from tandem_frontend.routing.block_table import BlockTable
from tandem_frontend.routing.prompt_blocks import PromptBlocks

EXACT_MIN = 128
"""Workers of each block size whose depth is searched for, those that have most: as many as the policy `prefix` compares
of each role. A search for all takes 1 to 4 ms where 500 workers hold a long prompt each to a depth of its own."""


class _State(Enum):
    LOADING = "loading"
    """A snapshot has begun."""
    TRUSTED = "trusted"
    SUSPECTED = "suspected"
    """No credit, and nothing is kept, until the next snapshot."""


@dataclass(slots=True)
class _Cache:
    """What is known of one worker's cache."""

    block_size_tokens: int = 0
    state: _State = _State.SUSPECTED
    slot: int | None = None
    """None: it holds nothing in the table."""
    block_count: int = 0


class PrefixIndex:
    """Cached blocks of all workers, by start."""

    def __init__(self, blocks_max: int, table: BlockTable | None = None, exact_min: int = EXACT_MIN) -> None:
        """`blocks_max`: most different blocks, over all workers; beyond it the largest cache is not followed.

        `exact_min`: see EXACT_MIN.
        """
        self.blocks_max = blocks_max
        """Most different blocks, over all workers; a lower bound takes effect with the next addition."""
        self._exact_min = exact_min
        self._table = BlockTable() if table is None else table
        self._caches: dict[Start, _Cache] = {}
        self._starts: dict[int, Start] = {}
        """Start by slot."""
        self._trusted: dict[int, int] = {}
        """Block size -> mask of the slots that are credited."""
        self._overflow_count = 0

    @property
    def block_count(self) -> int:
        """Different blocks in memory; those of a dropped cache count until they are swept."""
        return len(self._table)

    @property
    def trusted_count(self) -> int:
        """Workers that are credited."""
        return sum(mask.bit_count() for mask in self._trusted.values())

    @property
    def is_live(self) -> bool:
        """Whether any worker is credited."""
        return any(self._trusted.values())

    @property
    def suspected_count(self) -> int:
        """Workers that publish their cache and are not credited now."""
        return sum(cache.state is not _State.TRUSTED for cache in self._caches.values())

    @property
    def overflow_count(self) -> int:
        """How often a worker was suspected because of `blocks_max`."""
        return self._overflow_count

    def is_trusted(self, start: Start) -> bool:
        """Whether a worker is credited."""
        cache = self._caches.get(start)
        return cache is not None and cache.state is _State.TRUSTED

    def is_followed(self, start: Start) -> bool:
        """Whether changes of a worker's cache are applied; False: they are ignored until its next snapshot."""
        cache = self._caches.get(start)
        return cache is not None and cache.state is not _State.SUSPECTED

    def has_room(self, blocks_count: int) -> bool:
        """Whether a cache of that many blocks certainly fits; not before dropped ones are swept."""
        return len(self._table) + blocks_count <= self.blocks_max

    def match(self, request: PromptBlocks) -> Mapping[Start, int]:
        """Leading cached tokens of a prompt, for each credited worker that has at least one block of it.

        Exact for the EXACT_MIN workers that have most, and at least half of what it is for the others. The last token
        is never among them: an engine computes it in any case.
        """
        found, starts = dict[Start, int](), self._starts
        for size, trusted in self._trusted.items():
            for slots, depth in reversed(self._depths(request, size, trusted)):
                while slots:
                    slot = slots.bit_length() - 1
                    slots ^= 1 << slot
                    # Where a cache is not closed, against its engine's promise, the shortest depth counts.
                    found.setdefault(starts[slot], depth * size)
        return found

    def reset(self, start: Start, block_size_tokens: int) -> None:
        """A snapshot begins: it replaces all that is known. No credit before `complete`."""
        assert block_size_tokens > 0, "a block has at least one token"
        self._forget(start)
        self._caches[start] = _Cache(block_size_tokens, _State.LOADING)

    def complete(self, start: Start) -> None:
        """The snapshot has ended: the worker is credited from now on. Ignored if it was suspected meanwhile."""
        cache = self._caches.get(start)
        if cache is not None and cache.state is _State.LOADING:
            cache.state = _State.TRUSTED
            self._open(start, cache)
            self._credit(cache)

    def add(self, start: Start, hashes: Sequence[int]) -> None:
        """Blocks were stored: after their parents, as within `hashes`. Ignored while the worker is suspected."""
        cache = self._caches.get(start)
        if cache is None or cache.state is _State.SUSPECTED or not hashes:
            return
        cache.block_count += self._table.add(self._open(start, cache), hashes)
        if not self._table.is_sweeping or self._table.sweep(len(hashes)):
            self._keep_bound()

    def remove(self, start: Start, hashes: Sequence[int]) -> None:
        """Blocks were removed; in `hashes`, a parent comes before its children."""
        cache = self._caches.get(start)
        if cache is not None and cache.slot is not None:
            cache.block_count -= self._table.remove(cache.slot, hashes)

    def clear(self, start: Start) -> None:
        """All blocks of a worker were removed; its credit goes on with those that it stores next."""
        cache = self._caches.get(start)
        if cache is not None and cache.slot is not None:
            self._release(cache)
            if cache.state is _State.TRUSTED:
                self._open(start, cache)
                self._credit(cache)

    def suspect(self, start: Start) -> None:
        """Give a worker no credit until its next complete snapshot."""
        self._forget(start)
        self._caches[start] = _Cache()

    def drop(self, start: Start) -> None:
        """Forget a worker: it has left, or does not publish its cache."""
        self._forget(start)

    def sweep(self) -> bool:
        """Free a part of what dropped caches left, in about 1 ms. Returns whether there is more.

        Each addition does so too; a fleet in which nothing is added needs this call.
        """
        if self._table.sweep(0):
            self._keep_bound()
        return self._table.is_sweeping

    def _depths(self, request: PromptBlocks, size: int, trusted: int) -> list[tuple[int, int]]:
        """(slots, blocks), the deepest first: the first `blocks` blocks, at least 1, are cached there, and no more.

        Twice as deep each time, so that at most twice as many blocks are hashed as are cached.
        """
        total, depth, holders = request.count(size), 0, trusted
        reached = [(depth, holders)]
        while holders and depth < total:
            depth = min(max(1, 2 * depth), total)
            holders &= self._table.holders(request.hashes(size, depth)[depth - 1])
            reached.append((depth, holders))
        hashes, ends = request.hashes(size, depth), [(holders, depth)] if holders and depth else []
        for deep, shallow in pairwise(reversed(reached)):
            # Those that hold all of `deep` have been found.
            wanted = self._exact_min - deep[1].bit_count()
            ends += self._table.depths_between(hashes, shallow, deep, wanted)
        return ends

    def _keep_bound(self) -> None:
        """Give up the largest cache where there are too many blocks: one worker without credit frees the most."""
        if len(self._table) <= self.blocks_max:
            return
        largest = max(self._starts.values(), key=lambda start: self._caches[start].block_count)
        self.suspect(largest)
        self._overflow_count += 1

    def _open(self, start: Start, cache: _Cache) -> int:
        if cache.slot is None:
            cache.slot = self._table.open_slot()
            self._starts[cache.slot] = start
        return cache.slot

    def _credit(self, cache: _Cache) -> None:
        assert cache.slot is not None, "a credited worker has a slot"
        size = cache.block_size_tokens
        self._trusted[size] = self._trusted.get(size, 0) | 1 << cache.slot

    def _release(self, cache: _Cache) -> None:
        if cache.slot is None:
            return
        size = cache.block_size_tokens
        left = self._trusted.get(size, 0) & ~(1 << cache.slot)
        if left:
            self._trusted[size] = left
        else:
            self._trusted.pop(size, None)
        self._table.release(cache.slot)
        del self._starts[cache.slot]
        cache.slot, cache.block_count = None, 0

    def _forget(self, start: Start) -> None:
        cache = self._caches.pop(start, None)
        if cache is not None:
            self._release(cache)
