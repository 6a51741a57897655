"""KV memory accounting in pages: held by legs, in transfer, in the prefix cache, free.

Owns the accounting only; there is no KV data. Pages of the prefix cache are shared by name, which is the hash of the
page as a block (`tandem.domain.kv_blocks`); unreferenced ones are evicted leaf by leaf, least recently used first. At
any time, every page is counted exactly once:
free + cached + lent + transferring + withheld = capacity.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


class PageLog(Protocol):
    """Is informed of the pages that enter and leave the prefix cache."""

    def stored(self, block_hashes: Sequence[int], parent: int | None, token_ids: Sequence[int]) -> None:
        """A chain of pages, each the child of the previous one, was added."""
        ...

    def removed(self, block_hashes: Sequence[int]) -> None:
        """Pages were evicted."""
        ...

    def cleared(self) -> None:
        """The whole cache was flushed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KvAccount:
    """Number of pages in each state at one moment."""

    free: int
    cached: int
    """In the prefix cache and not held by a leg: can be evicted."""
    lent: int
    """Held by legs that wait, compute or decode."""
    transferring: int
    """Held only by legs whose KV is being transferred."""
    withheld: int
    """Withheld by an injected fault."""


@dataclass(slots=True)
class _Block:
    """One cached page."""

    holders: int = 0
    moving: int = 0
    """Holders whose KV is being transferred."""


@dataclass(slots=True, eq=False)
class KvLease:
    """Pages held by one leg, from its admission to its release."""

    shared: list[int] = field(default_factory=list)
    """Names of the cached pages it holds: the prefix of its sequence."""
    private_pages: int = 0
    cached_tokens: int = 0
    """Tokens found in the cache when the lease was opened."""
    moving: bool = False
    closed: bool = False

    @property
    def pages(self) -> int:
        """Number of pages it holds."""
        return len(self.shared) + self.private_pages


class KvPool:
    """The page pool of one engine."""

    def __init__(
        self, capacity_tokens: int, page_size_tokens: int, *, prefix_cache: bool = True, mirror: PageLog | None = None
    ) -> None:
        self.page_size_tokens = page_size_tokens
        self.capacity_pages = capacity_tokens // page_size_tokens
        self._prefix_cache = prefix_cache
        self._mirror = mirror
        self._free = self.capacity_pages
        self._withheld = 0
        self._leases: set[KvLease] = set()
        self._private = {False: 0, True: 0}
        self._shared = {False: 0, True: 0}
        """Number of held cached pages, by whether all their holders are in transfer."""
        self._tree: dict[int, _Block] = {}
        # Least recently used first. A lease releases its pages from the end of the sequence to its start, so a page
        # precedes its parent here and is evicted before it.
        self._idle: OrderedDict[int, None] = OrderedDict()

    def cached_names(self) -> list[int]:
        """Names of all cached pages."""
        return list(self._tree)

    @property
    def available_pages(self) -> int:
        """Pages that can be allocated now: free ones, and cached ones that no leg holds."""
        return self._free + len(self._idle)

    @property
    def available_tokens(self) -> int:
        """Tokens that fit in the available pages."""
        return self.available_pages * self.page_size_tokens

    @property
    def capacity_tokens(self) -> int:
        """Tokens that fit in all pages."""
        return self.capacity_pages * self.page_size_tokens

    def account(self) -> KvAccount:
        """Number of pages in each state."""
        return KvAccount(
            free=self._free,
            cached=len(self._idle),
            lent=self._private[False] + self._shared[False],
            transferring=self._private[True] + self._shared[True],
            withheld=self._withheld,
        )

    def pages_for(self, tokens: int) -> int:
        """Number of pages for `tokens` tokens, the last one perhaps partly filled."""
        return -(-tokens // self.page_size_tokens)

    def tokens_for(self, tokens: int) -> int:
        """`tokens` rounded up to whole pages."""
        return self.pages_for(tokens) * self.page_size_tokens

    def cached_pages(self, names: Sequence[int]) -> int:
        """Length of the longest cached prefix of `names`, in pages."""
        return next((i for i, name in enumerate(names) if name not in self._tree), len(names))

    def open(self, names: Sequence[int] = ()) -> KvLease:
        """Open a lease that holds the cached prefix of a sequence."""
        lease = KvLease(shared=list(names[: self.cached_pages(names)]))
        lease.cached_tokens = len(lease.shared) * self.page_size_tokens
        self._hold(lease.shared, moving=False)
        self._leases.add(lease)
        return lease

    def grow(self, lease: KvLease, tokens: int) -> bool:
        """Extend a lease to `tokens` tokens, evicting as needed; returns False without change if they do not fit."""
        pages = self.pages_for(tokens) - lease.pages
        if pages <= 0:
            return True
        if pages > self.available_pages:
            return False
        self._evict(pages - self._free)
        self._free -= pages
        self._private[lease.moving] += pages
        lease.private_pages += pages
        return True

    def checkpoint(self, lease: KvLease, names: Sequence[int], token_ids: Sequence[int]) -> None:
        """Add the full pages that a leg has computed to the cache; the lease keeps holding them.

        If another leg has cached the same page meanwhile, this lease's copy is freed and the cached one held instead.
        """
        if not self._prefix_cache:
            return
        known = len(lease.shared)
        added = list(names[known:])
        stored = known + self.cached_pages(added)
        for name in names[stored:]:
            self._tree[name] = _Block()
        self._hold(added, moving=lease.moving)
        lease.shared += added
        lease.private_pages -= len(added)
        self._private[lease.moving] -= len(added)
        self._free += stored - known
        if len(names) > stored and self._mirror:
            page = self.page_size_tokens
            parent = names[stored - 1] if stored else None
            self._mirror.stored(names[stored:], parent, token_ids[stored * page : len(names) * page])

    def set_moving(self, lease: KvLease, moving: bool) -> None:
        """Set whether a lease's KV is being transferred."""
        if lease.moving == moving:
            return
        self._private[lease.moving] -= lease.private_pages
        self._private[moving] += lease.private_pages
        lease.moving = moving
        for name in lease.shared:
            block = self._tree[name]
            self._recount(block, holders=0, moving=1 if moving else -1)

    def close(self, lease: KvLease) -> None:
        """Release a lease's pages; those in the cache stay cached."""
        assert not lease.closed, "a lease was closed twice"
        lease.closed = True
        self._leases.remove(lease)
        self._private[lease.moving] -= lease.private_pages
        self._free += lease.private_pages
        for name in reversed(lease.shared):
            block = self._tree[name]
            self._recount(block, holders=-1, moving=-int(lease.moving))
            if not block.holders:
                self._idle[name] = None

    def flush(self) -> bool:
        """Flush the prefix cache; returns False without change while a lease is open."""
        if self._leases:
            return False
        self._free += len(self._tree)
        self._tree.clear()
        self._idle.clear()
        if self._mirror:
            self._mirror.cleared()
        return True

    def withhold(self) -> None:
        """Withhold every available page (an injected fault)."""
        self._evict(len(self._idle))
        self._withheld += self._free
        self._free = 0

    def restore(self) -> None:
        """Return the withheld pages."""
        self._free += self._withheld
        self._withheld = 0

    def check(self) -> None:
        """Recount all pages and compare; an AssertionError means that pages were leaked, duplicated or held twice."""
        counted = {False: 0, True: 0}
        holders: dict[int, list[bool]] = {}
        for lease in self._leases:
            counted[lease.moving] += lease.private_pages
            for name in lease.shared:
                holders.setdefault(name, []).append(lease.moving)
        for moving in holders.values():
            counted[all(moving)] += 1
        account = self.account()
        assert (account.lent, account.transferring) == (counted[False], counted[True]), (account, counted)
        assert set(self._idle) == self._tree.keys() - holders.keys(), (
            "idle pages are not the cached pages without holder"
        )
        total = account.free + account.cached + account.lent + account.transferring + account.withheld
        assert total == self.capacity_pages, f"{account} does not add up to {self.capacity_pages} pages"
        assert account.free >= 0, account

    def _hold(self, names: Sequence[int], *, moving: bool) -> None:
        for name in names:
            self._idle.pop(name, None)
            self._recount(self._tree[name], holders=1, moving=int(moving))

    def _recount(self, block: _Block, *, holders: int, moving: int) -> None:
        if block.holders:
            self._shared[block.moving == block.holders] -= 1
        block.holders += holders
        block.moving += moving
        if block.holders:
            self._shared[block.moving == block.holders] += 1

    def _evict(self, pages: int) -> None:
        for _ in range(pages):
            name, _ = self._idle.popitem(last=False)
            del self._tree[name]
            self._free += 1
            if self._mirror:
                self._mirror.removed((name,))
