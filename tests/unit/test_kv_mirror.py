"""The mirror of a prefix cache: what its readers see of losses, repairs, slow reading and long events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.engine.kv_mirror import EVENT_BLOCKS_MAX, KvCacheMirror
from tandem.engine.port import KvEvent, KvSnapshot, KvUnknown
from tandem.errors import InvalidRequest
from tandem.testing.eventually import assert_eventually

PAGE = 4


def store(mirror: KvCacheMirror, *hashes: int) -> None:
    mirror.stored(hashes, None, [7] * PAGE * len(hashes))


async def next_of(reader: AsyncIterator[Any], kind: type) -> Any:
    async with asyncio.timeout(5):
        item = await anext(reader)
    assert isinstance(item, kind), item
    return item


async def test_follower_gets_the_contents_and_then_each_change() -> None:
    mirror = KvCacheMirror(PAGE)
    store(mirror, 1, 2)
    reader = mirror.follow()
    snapshot = await next_of(reader, KvSnapshot)
    assert (snapshot.sequence, sorted(snapshot.block_hashes)) == (1, [1, 2])
    pending = asyncio.ensure_future(anext(reader))
    await asyncio.sleep(0)
    mirror.removed([1])
    mirror.cleared()
    event = await pending
    assert isinstance(event, KvEvent)
    assert (event.kind, event.sequence, list(event.block_hashes)) == ("removed", 2, [1])
    assert (await next_of(reader, KvEvent)).kind == "cleared"


async def test_follower_reads_of_a_loss_at_once_and_of_the_repair() -> None:
    mirror = KvCacheMirror(PAGE)
    reader = mirror.follow()
    await next_of(reader, KvSnapshot)
    mirror.lost()
    await next_of(reader, KvUnknown)
    repaired = asyncio.ensure_future(anext(reader))
    store(mirror, 5)
    await asyncio.sleep(0)
    assert not repaired.done(), "the contents are still unknown"
    mirror.repaired()
    snapshot = await repaired
    assert isinstance(snapshot, KvSnapshot)
    assert list(snapshot.block_hashes) == [5]


async def test_newcomer_to_unknown_contents_gets_no_snapshot() -> None:
    mirror = KvCacheMirror(PAGE)
    store(mirror, 1)
    mirror.lost()
    reader = mirror.follow()
    await next_of(reader, KvUnknown)
    mirror.replace([2, 3])
    assert sorted((await next_of(reader, KvSnapshot)).block_hashes) == [2, 3]


async def test_follower_that_missed_a_whole_loss_gets_a_new_snapshot() -> None:
    mirror = KvCacheMirror(PAGE)
    reader = mirror.follow()
    await next_of(reader, KvSnapshot)
    mirror.lost()
    mirror.replace([9])
    assert list((await next_of(reader, KvSnapshot)).block_hashes) == [9]


async def test_slow_follower_gets_a_new_snapshot() -> None:
    mirror = KvCacheMirror(PAGE, kept_max=3)
    reader = mirror.follow()
    await next_of(reader, KvSnapshot)
    for block in range(5):
        store(mirror, block)
    snapshot = await next_of(reader, KvSnapshot)
    assert (snapshot.sequence, sorted(snapshot.block_hashes)) == (5, [0, 1, 2, 3, 4])


async def test_kept_events_are_bounded_by_their_contents() -> None:
    mirror = KvCacheMirror(PAGE, kept_numbers_max=3 * (1 + PAGE))
    for block in range(10):
        store(mirror, block)
    reader = mirror.events(8)
    assert (await next_of(reader, KvEvent)).sequence == 8
    with pytest.raises(InvalidRequest, match="from_sequence: 7 is no longer kept, only 8 and later"):
        await anext(mirror.events(7))


async def test_readers_of_events_miss_nothing_and_see_a_gap() -> None:
    mirror = KvCacheMirror(PAGE, kept_max=3)
    reader = mirror.events(1)
    mirror.removed([1])
    assert (await next_of(reader, KvEvent)).sequence == 1
    pending = asyncio.ensure_future(anext(reader))
    await asyncio.sleep(0)
    mirror.cleared()
    assert (await pending).kind == "cleared"
    for i in range(5):
        mirror.removed([i])
    assert (await next_of(reader, KvEvent)).sequence == 5, "events 3 and 4 are no longer kept"
    mirror.lost()
    mirror.repaired()
    store(mirror, 1)
    assert (await next_of(reader, KvEvent)).sequence == 9, "number 8 stands for the lost ones"


async def test_long_chain_comes_in_parts_that_are_chained() -> None:
    mirror = KvCacheMirror(PAGE)
    count = EVENT_BLOCKS_MAX + 2
    mirror.stored(range(1, count + 1), None, range(count * PAGE))
    mirror.removed(range(1, count + 1))
    reader = mirror.events(1)
    first, second, rest, removed = [await next_of(reader, KvEvent) for _ in range(4)]
    assert (len(first.block_hashes), list(second.block_hashes)) == (EVENT_BLOCKS_MAX, [count - 1, count])
    assert second.parent_block_hash == first.block_hashes[-1]
    assert list(second.token_ids) == list(range(EVENT_BLOCKS_MAX * PAGE, count * PAGE))
    assert (len(removed.block_hashes), list(rest.block_hashes)) == (EVENT_BLOCKS_MAX, [count - 1, count])


async def test_refused_cache_stays_unknown() -> None:
    mirror = KvCacheMirror(PAGE)
    store(mirror, 1)
    waiting = asyncio.ensure_future(mirror.wait_refused())
    reader = mirror.follow()
    await next_of(reader, KvSnapshot)
    mirror.refuse("a block of 5 tokens")
    assert await waiting == "a block of 5 tokens"
    await next_of(reader, KvUnknown)
    assert not mirror.snapshot().block_hashes


changes = st.lists(
    st.one_of(
        st.tuples(st.just("stored"), st.lists(st.integers(0, 9), min_size=1, max_size=3)),
        st.tuples(st.just("removed"), st.lists(st.integers(0, 9), min_size=1, max_size=3)),
        st.tuples(st.sampled_from(["cleared", "lost", "repaired", "read"]), st.just([])),
    ),
    max_size=30,
)


@given(changes)
def test_follower_that_applies_what_it_reads_has_the_contents(steps: list[tuple[str, list[int]]]) -> None:
    asyncio.run(_follow(steps))


async def _follow(steps: list[tuple[str, list[int]]]) -> None:
    mirror = KvCacheMirror(PAGE, kept_max=4)
    known: set[int] | None = None
    sequence = 0

    async def read() -> None:
        nonlocal known, sequence
        async for item in mirror.follow():
            if isinstance(item, KvUnknown):
                known = None
            elif isinstance(item, KvSnapshot):
                known, sequence = set(item.block_hashes), item.sequence
            else:
                assert known is not None
                assert item.sequence == sequence + 1
                sequence += 1
                if item.kind == "stored":
                    known |= set(item.block_hashes)
                else:
                    known -= set(item.block_hashes) if item.kind == "removed" else known

    reader = asyncio.create_task(read())
    for name, hashes in steps:
        if name == "read":
            await asyncio.sleep(0)
        elif name == "stored":
            mirror.stored(hashes, None, [0] * PAGE * len(hashes))
        elif name == "removed":
            mirror.removed(hashes)
        else:
            getattr(mirror, name)()
    expected = set(mirror.snapshot().block_hashes) if mirror.is_known else None
    await assert_eventually(lambda: known, lambda seen: seen == expected)
    reader.cancel()
