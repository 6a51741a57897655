"""KV memory in pages: what legs hold, what is on its way to a peer, what the prefix cache keeps, what is free.

Owns the account only: there are no bytes. Pages of the prefix cache are shared by name; those that nobody holds are
evicted leaf by leaf, the least recently used first. At any time, every page is counted exactly once:
free + cached + lent + transferring + withheld = capacity.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from tandem.engine.simulated.kv_events import KvEventLog


class PageNames:
    """The names of one growing sequence's full pages."""

    def __init__(self, page_size_tokens: int, salt: str | None = None) -> None:
        self._page_size_tokens = page_size_tokens
        self._parent = blake2b((salt or "").encode(), digest_size=8).digest()
        self._names: list[int] = []

    def of(self, token_ids: Sequence[int]) -> list[int]:
        """Names of the full pages of `token_ids`, which begins as every sequence given before, or is its beginning."""
        page = self._page_size_tokens
        count = len(token_ids) // page
        for start in range(len(self._names) * page, count * page, page):
            content = b"".join(t.to_bytes(8, "little") for t in token_ids[start : start + page])
            self._parent = blake2b(self._parent + content, digest_size=8).digest()
            self._names.append(int.from_bytes(self._parent, "little", signed=True))
        return self._names[:count]


def page_names(token_ids: Sequence[int], page_size_tokens: int, salt: str | None = None) -> list[int]:
    """Names of the full pages of a sequence; each depends on all tokens before its end and on the salt."""
    return PageNames(page_size_tokens, salt).of(token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvAccount:
    """Where every page is at one moment."""

    free: int
    cached: int
    """In the prefix cache and held by nobody: can be evicted."""
    lent: int
    """Held by legs that wait, compute or decode."""
    transferring: int
    """Held by legs whose KV is on its way, and by no other."""
    withheld: int
    """Taken away by a fault."""


@dataclass(slots=True)
class _Block:
    """One cached page."""

    holders: int = 0
    moving: int = 0
    """Holders whose KV is on its way."""


@dataclass(slots=True, eq=False)
class KvLease:
    """The pages of one leg, from its admission to its release."""

    shared: list[int] = field(default_factory=list)
    """Names of the cached pages it holds: the beginning of its sequence."""
    private_pages: int = 0
    cached_tokens: int = 0
    """Tokens found in the cache when the lease was opened."""
    moving: bool = False
    closed: bool = False

    @property
    def pages(self) -> int:
        """All pages it holds."""
        return len(self.shared) + self.private_pages


class KvPool:
    """Pages of one engine."""

    def __init__(
        self, capacity_tokens: int, page_size_tokens: int, *, prefix_cache: bool = True, log: KvEventLog | None = None
    ) -> None:
        self.page_size_tokens = page_size_tokens
        self.capacity_pages = capacity_tokens // page_size_tokens
        self._prefix_cache = prefix_cache
        self._log = log
        self._free = self.capacity_pages
        self._withheld = 0
        self._leases: set[KvLease] = set()
        self._private = {False: 0, True: 0}
        self._shared = {False: 0, True: 0}
        """Cached pages that somebody holds, by whether all who hold them are moving."""
        self._tree: dict[int, _Block] = {}
        # Least recently used first. Pages are let go from the end of a sequence to its beginning, so that a page
        # stands before its parent here and goes before it.
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available_pages(self) -> int:
        """Pages that can be had at once: free ones, and cached ones that nobody holds."""
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
        """Where every page is."""
        return KvAccount(
            free=self._free,
            cached=len(self._idle),
            lent=self._private[False] + self._shared[False],
            transferring=self._private[True] + self._shared[True],
            withheld=self._withheld,
        )

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens take, the last one perhaps not full."""
        return -(-tokens // self.page_size_tokens)

    def tokens_for(self, tokens: int) -> int:
        """Tokens rounded up to whole pages."""
        return self.pages_for(tokens) * self.page_size_tokens

    def cached_pages(self, names: Sequence[int]) -> int:
        """How many of the first pages of a sequence are in the cache."""
        return next((i for i, name in enumerate(names) if name not in self._tree), len(names))

    def open(self, names: Sequence[int] = ()) -> KvLease:
        """Begin a lease with the pages of a sequence that are in the cache."""
        lease = KvLease(shared=list(names[: self.cached_pages(names)]))
        lease.cached_tokens = len(lease.shared) * self.page_size_tokens
        self._hold(lease.shared, moving=False)
        self._leases.add(lease)
        return lease

    def grow(self, lease: KvLease, tokens: int) -> bool:
        """Make a lease hold so many tokens, evicting as needed; False, and nothing is done, if they do not fit."""
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
        """Put the full pages that a leg has computed into the cache, where it goes on holding them.

        A page that another leg has put there meanwhile is given back, and the other's is held instead.
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
        if len(names) > stored and self._log:
            page = self.page_size_tokens
            parent = names[stored - 1] if stored else None
            self._log.stored(names[stored:], parent, token_ids[stored * page : len(names) * page])

    def set_moving(self, lease: KvLease, moving: bool) -> None:
        """Say whether a lease's KV is on its way to or from a peer."""
        if lease.moving == moving:
            return
        self._private[lease.moving] -= lease.private_pages
        self._private[moving] += lease.private_pages
        lease.moving = moving
        for name in lease.shared:
            block = self._tree[name]
            self._recount(block, holders=0, moving=1 if moving else -1)

    def close(self, lease: KvLease) -> None:
        """Give a lease's pages back; those in the cache stay there."""
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
        """Forget the prefix cache; refused while a lease is open."""
        if self._leases:
            return False
        self._free += len(self._tree)
        self._tree.clear()
        self._idle.clear()
        if self._log:
            self._log.cleared()
        return True

    def withhold(self) -> None:
        """Take away every page that can be had."""
        self._evict(len(self._idle))
        self._withheld += self._free
        self._free = 0

    def restore(self) -> None:
        """Give back what was withheld."""
        self._free += self._withheld
        self._withheld = 0

    def check(self) -> None:
        """Count everything anew and compare; an AssertionError says that pages were made, lost or held twice."""
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
        assert set(self._idle) == self._tree.keys() - holders.keys(), "an idle page is held, or a held one idle"
        total = account.free + account.cached + account.lent + account.transferring + account.withheld
        assert total == self.capacity_pages, f"{account} is not {self.capacity_pages} pages"
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
            if self._log:
                self._log.removed(name)
