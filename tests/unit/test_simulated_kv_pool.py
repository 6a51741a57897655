"""The KV account of the simulated engine: pages are neither made nor lost, whatever comes in whatever order."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tandem.engine.port import KvEvent
from tandem.engine.simulated.admission import Admission
from tandem.engine.simulated.kv_events import KvEventLog
from tandem.engine.simulated.kv_pool import KvLease, KvPool, block_hashes

PAGE = 4
CAPACITY_PAGES = 12


class PoolMachine(RuleBasedStateMachine):
    """Any order of reserve, release and flush; few different tokens, so that prefixes collide often."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.log = KvEventLog(PAGE)
        self.pool = KvPool(CAPACITY_PAGES * PAGE, PAGE, log=self.log)
        self.live: list[KvLease] = []

    @rule(target=leases, prompt=st.lists(st.integers(0, 1), min_size=1, max_size=30), more=st.integers(1, 20))
    def reserve(self, prompt: list[int], more: int) -> tuple[KvLease | None, list[int]]:
        total_tokens = len(prompt) + more
        lease = self.pool.reserve(prompt, total_tokens)
        if lease is None:
            assert self.live or total_tokens > CAPACITY_PAGES * PAGE, "an empty pool refused what fits"
        else:
            self.live.append(lease)
            assert lease.private_pages + len(lease.shared) == self.pool.pages_for(total_tokens)
            assert lease.cached_tokens < len(prompt)
        return lease, prompt + [1] * (more - 1)

    @rule(pair=consumes(leases), kept=st.integers(0, 60))
    def release(self, pair: tuple[KvLease | None, list[int]], kept: int) -> None:
        lease, sequence = pair
        if lease is not None:
            self.live.remove(lease)
            self.pool.release(lease, sequence[:kept])

    @rule()
    def flush(self) -> None:
        assert self.pool.flush() == (not self.live)

    @invariant()
    def pages_are_conserved(self) -> None:
        pool = self.pool
        private_pages = sum(lease.private_pages for lease in self.live)
        shared_pages = len({name for lease in self.live for name in lease.shared})
        assert pool.free_pages >= 0
        assert pool.used_tokens == (private_pages + shared_pages) * PAGE
        assert pool.free_pages + pool.evictable_pages + private_pages + shared_pages == CAPACITY_PAGES

    @invariant()
    def events_tell_the_cache(self) -> None:
        known: set[int] = set()
        events = list(self.log._events)
        for place, event in enumerate(events):
            assert event.sequence == events[0].sequence + place
            apply(event, known)
        if events and events[0].sequence == 1:
            assert known == set(self.pool._cached)


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
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_repeated_prefix_is_cached_but_never_the_last_token() -> None:
    pool = KvPool(100, PAGE)
    prompt = list(range(16))
    first = pool.reserve(prompt, 20)
    assert first is not None
    pool.release(first, prompt)
    again = pool.reserve(prompt, 20)
    assert again is not None
    assert (first.cached_tokens, again.cached_tokens) == (0, 12)


def test_salt_keeps_caches_apart() -> None:
    pool = KvPool(100, PAGE)
    prompt = list(range(16))
    for salt, cached_tokens in (("a", 0), ("b", 0), ("a", 12)):
        lease = pool.reserve(prompt, 20, salt)
        assert lease is not None
        assert lease.cached_tokens == cached_tokens
        pool.release(lease, prompt)


def test_least_recently_used_goes_first() -> None:
    pool = KvPool(6 * PAGE, PAGE)
    old, new = list(range(9)), list(range(100, 109))
    for prompt in (old, new, old):
        lease = pool.reserve(prompt, 9)
        assert lease is not None
        pool.release(lease, prompt)
    big = pool.reserve([7] * 15, 16)
    assert big is not None
    pool.release(big)
    seen = [pool.reserve(prompt, 9) for prompt in (old, new)]
    assert [lease.cached_tokens for lease in seen if lease] == [8, 0]


def test_a_lease_is_released_once() -> None:
    pool = KvPool(100, PAGE)
    lease = pool.reserve([1], 2)
    assert lease is not None
    pool.release(lease)
    with pytest.raises(AssertionError, match="twice"):
        pool.release(lease)


@given(st.lists(st.integers(0, 5), max_size=40))
def test_block_names_depend_on_all_before(tokens: list[int]) -> None:
    names = block_hashes(tokens, PAGE)
    assert len(names) == len(tokens) // PAGE
    if names:
        assert block_hashes([tokens[0] + 1, *tokens[1:]], PAGE)[-1] != names[-1]


async def test_admission_is_first_come_first_served() -> None:
    pool = KvPool(8 * PAGE, PAGE)
    admission = Admission(pool, 2)
    order: list[str] = []

    async def run(name: str, tokens: int) -> None:
        lease = await admission.admit([1], tokens, None)
        order.append(name)
        await asyncio.sleep(0)
        admission.release(lease)

    await asyncio.gather(run("a", 20), run("big", 30), run("small", 1))
    assert order == ["a", "big", "small"]
    assert (admission.running_requests, admission.waiting_requests, pool.used_tokens) == (0, 0, 0)


async def test_cancelled_head_of_the_queue_lets_the_next_in() -> None:
    pool = KvPool(8 * PAGE, PAGE)
    admission = Admission(pool, 4)
    first = await admission.admit([1], 20, None)
    big = asyncio.create_task(admission.admit([1], 30, None))
    small = asyncio.create_task(admission.admit([1, 2], 4, None))
    await asyncio.sleep(0)
    assert (admission.waiting_requests, admission.waiting_tokens) == (2, 3)
    big.cancel()
    admission.release(await small)
    admission.release(first)
    assert (admission.running_requests, admission.waiting_requests, pool.used_tokens) == (0, 0, 0)


async def test_cancelled_at_the_moment_of_the_grant_gives_back() -> None:
    pool = KvPool(8 * PAGE, PAGE)
    admission = Admission(pool, 1)
    first = await admission.admit([1], 4, None)
    second = asyncio.create_task(admission.admit([1], 4, None))
    await asyncio.sleep(0)
    admission.release(first)  # grants the second, whose task has not run yet
    second.cancel()
    await asyncio.wait((second,))
    assert second.cancelled()
    assert (admission.running_requests, pool.used_tokens) == (0, 0)


async def test_readers_of_events_miss_nothing_and_see_a_gap() -> None:
    log = KvEventLog(PAGE, kept_max=3)
    reader = log.read(1)
    log.removed(1)
    assert (await anext(reader)).sequence == 1
    pending = asyncio.ensure_future(anext(reader))
    await asyncio.sleep(0)
    log.cleared()
    assert (await pending).kind == "cleared"
    for i in range(5):
        log.removed(i)
    assert (await anext(reader)).sequence == 5, "events 3 and 4 are no longer kept"
