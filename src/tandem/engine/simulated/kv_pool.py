"""KV memory in pages: what running requests hold, what the prefix cache keeps, what is free.

Owns the account only (there are no bytes) and checks nothing it is not asked. Pages of the prefix cache are named by a
hash over all tokens before them, so that equal prefixes share pages; those that no request holds are evicted, least
recently used first. At any time: free + cached + private = capacity.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from tandem.engine.simulated.kv_events import KvEventLog


@dataclass(slots=True)
class _Block:
    """One cached page."""

    holders: int = 0


@dataclass(slots=True, eq=False)
class KvLease:
    """The pages of one request, from admission to release."""

    shared: tuple[int, ...]
    """Hashes of the cached pages it reads."""
    private_pages: int
    cached_tokens: int
    salt: str | None = None
    released: bool = False


def block_hashes(token_ids: Sequence[int], page_size_tokens: int, salt: str | None = None) -> list[int]:
    """Names of the full pages of a sequence; each depends on all tokens before its end and on the salt."""
    parent = blake2b((salt or "").encode(), digest_size=8).digest()
    hashes = []
    for start in range(0, len(token_ids) - page_size_tokens + 1, page_size_tokens):
        page = b"".join(t.to_bytes(8, "little") for t in token_ids[start : start + page_size_tokens])
        parent = blake2b(parent + page, digest_size=8).digest()
        hashes.append(int.from_bytes(parent, "little", signed=True))
    return hashes


class KvPool:
    """Pages of one engine."""

    def __init__(
        self, capacity_tokens: int, page_size_tokens: int, *, prefix_cache: bool = True, log: KvEventLog | None = None
    ) -> None:
        self.page_size_tokens = page_size_tokens
        self.capacity_pages = capacity_tokens // page_size_tokens
        self._prefix_cache = prefix_cache
        self._log = log
        self._private_pages = 0
        self._leases = 0
        # Least recently used first. A chain is always touched from its end to its root, so that a page stands before
        # its parent here and is evicted before it.
        self._cached: OrderedDict[int, _Block] = OrderedDict()

    @property
    def free_pages(self) -> int:
        """Pages that hold nothing."""
        return self.capacity_pages - self._private_pages - len(self._cached)

    @property
    def evictable_pages(self) -> int:
        """Cached pages that no request holds."""
        return sum(1 for block in self._cached.values() if block.holders == 0)

    @property
    def used_tokens(self) -> int:
        """Tokens' worth of pages that running requests hold, shared ones counted once."""
        return (self.capacity_pages - self.free_pages - self.evictable_pages) * self.page_size_tokens

    @property
    def capacity_tokens(self) -> int:
        """Tokens that fit in all pages."""
        return self.capacity_pages * self.page_size_tokens

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens take, the last one perhaps not full."""
        return -(-tokens // self.page_size_tokens)

    def reserve(self, prompt: Sequence[int], total_tokens: int, salt: str | None = None) -> KvLease | None:
        """Take the pages of a request for its whole life, evicting as needed; None when they do not fit now."""
        shared = self._cached_prefix(prompt, salt)
        private_pages = self.pages_for(total_tokens) - len(shared)
        self._hold(shared)
        if private_pages > self.free_pages + self.evictable_pages:
            self._let_go(shared)
            return None
        self._evict(private_pages - self.free_pages)
        self._private_pages += private_pages
        self._leases += 1
        return KvLease(tuple(shared), private_pages, len(shared) * self.page_size_tokens, salt)

    def release(self, lease: KvLease, computed: Sequence[int] = ()) -> None:
        """Give a request's pages back; full pages of `computed` (a prefix of what it ran) stay in the cache."""
        assert not lease.released, "a lease was released twice"
        lease.released = True
        self._leases -= 1
        self._private_pages -= lease.private_pages
        self._let_go(lease.shared)
        if self._prefix_cache:
            self._store(computed, lease.salt, lease.private_pages + len(lease.shared))

    def flush(self) -> bool:
        """Forget the prefix cache; refused while a request runs."""
        if self._leases:
            return False
        self._cached.clear()
        if self._log:
            self._log.cleared()
        return True

    def _cached_prefix(self, prompt: Sequence[int], salt: str | None) -> list[int]:
        found: list[int] = []
        if not self._prefix_cache:
            return found
        # The last prompt token is always computed: its output is the first new token.
        for name in block_hashes(prompt[:-1], self.page_size_tokens, salt):
            if name not in self._cached:
                break
            found.append(name)
        return found

    def _hold(self, names: Sequence[int]) -> None:
        for name in reversed(names):
            self._cached[name].holders += 1
            self._cached.move_to_end(name)

    def _let_go(self, names: Sequence[int]) -> None:
        for name in names:
            self._cached[name].holders -= 1

    def _evict(self, pages: int) -> None:
        for name in [n for n, block in self._cached.items() if block.holders == 0][: max(pages, 0)]:
            del self._cached[name]
            if self._log:
                self._log.removed(name)

    def _store(self, computed: Sequence[int], salt: str | None, pages_max: int) -> None:
        names = block_hashes(computed, self.page_size_tokens, salt)[:pages_max]
        known = next((i for i, name in enumerate(names) if name not in self._cached), len(names))
        new = names[known:]
        for name in new:
            self._cached[name] = _Block()
        for name in reversed(names):
            self._cached.move_to_end(name)
        if new and self._log:
            page = self.page_size_tokens
            parent = names[known - 1] if known else None
            self._log.stored(new, parent, computed[known * page : len(names) * page])
