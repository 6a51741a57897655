"""KV accounting of the simulated engine: no page is leaked or duplicated, in any order of operations."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from tandem.domain.kv_blocks import block_hashes
from tandem.engine.kv_mirror import KvCacheMirror
from tandem.engine.port import KvEvent
from tandem.engine.simulated.kv_pool import KvLease, KvPool
from tests.unit.support.examples import examples
from tests.unit.support.simulated_legs import PAGE

CAPACITY_PAGES = 12
Held = tuple[KvLease, list[int]]


class PoolMachine(RuleBasedStateMachine):
    """Any order of what can happen to pages; few different tokens, so that prefixes collide often."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.log = KvCacheMirror(PAGE)
        self.pool = KvPool(CAPACITY_PAGES * PAGE, PAGE, mirror=self.log)
        self.live: list[KvLease] = []

    @rule(target=leases, sequence=st.lists(st.integers(0, 1), min_size=1, max_size=50))
    def open(self, sequence: list[int]) -> Held:
        names = block_hashes(sequence[:-1], PAGE)
        lease = self.pool.open(names)
        assert lease.cached_tokens == self.pool.cached_pages(names) * PAGE < len(sequence)
        self.live.append(lease)
        return lease, sequence

    @rule(target=leases, beginning=st.integers(0, 1), length=st.integers(1, 24))
    def compute(self, beginning: int, length: int) -> Held:
        """A whole leg as the scheduler makes it, of one of two sequences: legs share pages and press others out."""
        sequence = [beginning] * length
        held: Any = self.open(sequence)
        if self.pool.grow(held[0], length):
            self.checkpoint(held)
        return cast("Held", held)

    @rule(held=leases, tokens=st.integers(0, 50))
    def grow(self, held: Held, tokens: int) -> None:
        lease, sequence = held
        tokens = min(tokens, len(sequence))
        before, available = lease.pages, self.pool.available_pages
        grown = self.pool.grow(lease, tokens)
        needed = max(self.pool.pages_for(tokens) - before, 0)
        assert grown == (needed <= available)
        assert lease.pages == before + (needed if grown else 0)

    @rule(held=leases)
    def checkpoint(self, held: Held) -> None:
        lease, sequence = held
        pages = min(lease.pages, len(sequence) // PAGE)
        self.pool.checkpoint(lease, block_hashes(sequence, PAGE)[:pages], sequence)
        assert len(lease.shared) == pages

    @rule(held=leases, moving=st.booleans())
    def move(self, held: Held, moving: bool) -> None:
        self.pool.set_moving(held[0], moving)

    @rule(held=consumes(leases))
    def close(self, held: Held) -> None:
        self.live.remove(held[0])
        self.pool.close(held[0])

    @rule()
    def flush(self) -> None:
        assert self.pool.flush() == (not self.live)

    @precondition(lambda self: len(self.live) > 1)
    @rule()
    def withhold(self) -> None:
        self.pool.withhold()
        assert self.pool.available_pages == 0

    @rule()
    def restore(self) -> None:
        self.pool.restore()

    @invariant()
    def pages_are_conserved(self) -> None:
        self.pool.check()
        account = self.pool.account()
        everything = account.free + account.cached + account.lent + account.transferring + account.withheld
        assert everything == CAPACITY_PAGES
        if not self.live:
            assert account.lent == account.transferring == 0
        if not any(lease.moving for lease in self.live):
            assert account.transferring == 0

    @invariant()
    def events_tell_the_cache(self) -> None:
        known: set[int] = set()
        events = list(self.log._log.values())
        for place, event in enumerate(events):
            assert event.sequence == events[0].sequence + place
            apply(event, known)
        if events and events[0].sequence == 1:
            assert known == set(self.pool._tree)
        assert set(self.log.snapshot().block_hashes) == set(self.pool._tree)


def apply(event: KvEvent, known: set[int]) -> None:
    """One event on a reader's picture of the cache, in which every stored block's parent must be."""
    if event.kind == "cleared":
        known.clear()
    elif event.kind == "removed":
        known.difference_update(event.block_hashes)
    else:
        assert event.parent_block_hash is None or event.parent_block_hash in known
        assert len(event.token_ids) == len(event.block_hashes) * PAGE
        known.update(event.block_hashes)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=examples(120), stateful_step_count=40, deadline=None)


def used(pool: KvPool, sequence: list[int], salt: str | None = None) -> KvLease:
    """A lease that computed a whole sequence and is still open."""
    names = block_hashes(sequence, PAGE, salt)
    lease = pool.open(names[: (len(sequence) - 1) // PAGE])
    assert pool.grow(lease, len(sequence))
    pool.checkpoint(lease, names, sequence)
    return lease


def test_repeated_prefix_is_cached_but_never_the_last_token() -> None:
    pool = KvPool(100, PAGE)
    prompt = list(range(16))
    pool.close(used(pool, prompt))
    assert used(pool, prompt).cached_tokens == 12


def test_salt_keeps_caches_apart() -> None:
    pool = KvPool(100, PAGE)
    prompt = list(range(16))
    for salt, cached_tokens in (("a", 0), ("b", 0), ("a", 12)):
        lease = used(pool, prompt, salt)
        assert lease.cached_tokens == cached_tokens
        pool.close(lease)


def test_least_recently_used_goes_first() -> None:
    pool = KvPool(6 * PAGE, PAGE)
    old, new = list(range(9)), list(range(100, 109))
    for prompt in (old, new, old):
        pool.close(used(pool, prompt))
    big = pool.open()
    assert pool.grow(big, 16)
    pool.close(big)
    assert [pool.cached_pages(block_hashes(prompt, PAGE)) for prompt in (old, new)] == [2, 0]


def test_a_branch_is_evicted_from_its_end() -> None:
    pool = KvPool(4 * PAGE, PAGE)
    pool.close(used(pool, list(range(16))))
    assert pool.grow(pool.open(), 2 * PAGE)
    assert pool.cached_pages(block_hashes(list(range(16)), PAGE)) == 2


def test_two_legs_that_computed_the_same_hold_it_once() -> None:
    pool = KvPool(100, PAGE)
    prompt = list(range(8))
    leases = [pool.open(), pool.open()]
    for lease in leases:
        assert pool.grow(lease, 8)
    assert pool.account().lent == 4
    for lease in leases:
        pool.checkpoint(lease, block_hashes(prompt, PAGE), prompt)
    assert pool.account().lent == 2
    pool.close(leases[0])
    assert (pool.account().lent, pool.account().cached) == (2, 0)
    pool.close(leases[1])
    assert (pool.account().lent, pool.account().cached) == (0, 2)


def test_a_page_that_a_running_leg_holds_too_is_not_in_transfer() -> None:
    pool = KvPool(100, PAGE)
    runs, moves = used(pool, list(range(8))), used(pool, list(range(12)))
    pool.set_moving(moves, True)
    assert (pool.account().lent, pool.account().transferring) == (2, 1)
    pool.close(runs)
    assert (pool.account().lent, pool.account().transferring) == (0, 3)


def test_a_lease_is_closed_once() -> None:
    pool = KvPool(100, PAGE)
    lease = pool.open()
    pool.close(lease)
    with pytest.raises(AssertionError, match="twice"):
        pool.close(lease)


def test_a_page_that_was_lost_is_found_out() -> None:
    pool = KvPool(100, PAGE)
    lease = pool.open()
    pool.grow(lease, 8)
    lease.private_pages = 1
    with pytest.raises(AssertionError):
        pool.check()
