"""A stream of cache events over a faulty link: a credit is never for a block that the engine did not hold at the last
event applied, and a new stream restores equality.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tandem_frontend.routing.prefix_index import PrefixIndex
from tandem_frontend.routing.prompt_blocks import PromptBlocks

from tandem.api.worker.v1 import worker_service_pb2 as pb
from tandem.client.kv_feed import SLICE_BLOCKS, FeedBroken, FeedRefused, KvFeed
from tandem.domain.worker import Start
from tests.unit.support.cache_events import PublishedCache
from tests.unit.support.examples import examples
from tests.unit.support.frontend_workers import prefill
from tests.unit.support.prefix_trees import Prefix

WORKER = prefill()
Message = pb.WatchKvEventsResponse
TOKENS = st.lists(st.integers(0, 1), min_size=2, max_size=9).map(tuple)
CHANGES = st.lists(
    st.tuples(st.sampled_from(["store", "store", "evict", "clear", "unknown", "snapshot"]), TOKENS), max_size=12
)
FAULTS = st.sampled_from(["none", "drop", "duplicate", "swap", "cut"])


async def feed_all(feed: KvFeed, messages: Iterable[Message]) -> None:
    for message in messages:
        await feed.apply(message)


def credit(index: PrefixIndex, tokens: Prefix) -> int:
    return index.match(PromptBlocks(tokens)).get(WORKER.start, 0)


def messages_of(cache: PublishedCache, changes: list[tuple[str, Prefix]]) -> list[Message]:
    """A stream from its snapshot on."""
    messages = [*cache.snapshot()]
    for kind, tokens in changes:
        if kind == "store":
            messages.append(cache.store(tokens))
        elif kind == "evict":
            messages.append(cache.evict(tokens[:2]))
        elif kind == "clear":
            messages.append(cache.clear())
        elif kind == "unknown":
            messages.append(cache.unknown())
        else:
            messages += cache.snapshot()
    return messages


def faulty(messages: list[Message], fault: str, at: int) -> list[Message]:
    """The messages as a faulty link would deliver them."""
    at %= len(messages)
    before, there, after = messages[:at], messages[at : at + 1], messages[at + 1 :]
    match fault:
        case "drop":
            return before + after
        case "duplicate":
            return before + there + there + after
        case "swap":
            return before + after[:1] + there + after[1:]
        case "cut":
            return before
    return messages


@settings(max_examples=examples(800), deadline=None)
@given(first=CHANGES, rounds=st.lists(st.tuples(CHANGES, FAULTS, st.integers(0, 30)), max_size=3), prompt=TOKENS)
def test_feed_with_any_fault_credits_only_what_was_cached(
    first: list[tuple[str, Prefix]], rounds: list[tuple[list[tuple[str, Prefix]], str, int]], prompt: Prefix
) -> None:
    asyncio.run(check_faults(first, rounds, prompt))


async def check_faults(
    first: list[tuple[str, Prefix]], rounds: list[tuple[list[tuple[str, Prefix]], str, int]], prompt: Prefix
) -> None:
    cache, index = PublishedCache(epoch=WORKER.epoch), PrefixIndex(1_000)
    messages_of(cache, first)
    for changes, fault, at in rounds:
        feed = KvFeed(WORKER, index)
        for message in faulty(messages_of(cache, changes), fault, at):
            try:
                await feed.apply(message)
            except FeedBroken:
                index.suspect(WORKER.start)
                break
            expected = cache.cached_tokens(prompt, message.sequence)
            assert credit(index, prompt) == (expected if feed.is_current else 0)
        index.suspect(WORKER.start)
    await feed_all(KvFeed(WORKER, index), cache.snapshot())
    assert credit(index, prompt) == cache.cached_tokens(prompt, cache.sequence)


async def broken_by(damage: Callable[[list[Message]], list[Message]]) -> str:
    """Why a feed breaks whose messages are damaged."""
    cache, index = PublishedCache(epoch=WORKER.epoch), PrefixIndex(1_000)
    cache.store(tuple(range(20)))
    messages = [*cache.snapshot(), cache.store((5, 5, 5, 5)), cache.store((6, 6))]
    with pytest.raises(FeedBroken) as broken:
        await feed_all(KvFeed(WORKER, index), damage(messages))
    return broken.value.why


@pytest.mark.parametrize(
    "damage",
    [
        lambda messages: messages[1:],
        lambda messages: messages[:2] + messages[3:],
        lambda messages: messages[:2] + messages[1:],
        lambda messages: messages[:2] + messages[-1:],
        lambda messages: messages[:-2] + messages[-1:],
        lambda messages: messages[:-1] + messages[-2:-1],
        lambda messages: [*messages, Message(sequence=messages[-1].sequence + 1)],
        lambda messages: messages[-1:],
    ],
    ids=["description", "part", "part twice", "cut part", "event", "event twice", "kind", "no description"],
)
async def test_feed_with_missing_or_foreign_messages_is_broken(
    damage: Callable[[list[Message]], list[Message]],
) -> None:
    assert await broken_by(damage) == "gap"


async def test_feed_of_another_epoch_is_broken_and_changes_nothing() -> None:
    cache, index = PublishedCache(epoch=WORKER.epoch + 1), PrefixIndex(1_000)
    with pytest.raises(FeedBroken, match="epoch 8 answers instead of 7"):
        await KvFeed(WORKER, index).apply(cache.description())
    assert (index.trusted_count, index.suspected_count) == (0, 0)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"hash_rule": "xx-v9"}, "hash_rule is 'xx-v9', this frontend knows sha256-chain-v1"),
        ({"block_size_tokens": -1}, "block_size_tokens is -1, must be 1 to "),
        ({"block_size_tokens": 2**21}, "block_size_tokens is 2097152, must be 1 to "),
    ],
    ids=["rule", "negative", "huge"],
)
async def test_feed_with_an_unknown_rule_or_block_size_is_refused(fields: dict[str, object], text: str) -> None:
    with pytest.raises(FeedRefused, match=text):
        await KvFeed(WORKER, PrefixIndex(1_000)).apply(PublishedCache().description(**fields))


async def test_feed_whose_event_has_another_block_size_is_refused() -> None:
    cache = PublishedCache()
    feed = KvFeed(WORKER, PrefixIndex(1_000))
    await feed_all(feed, cache.snapshot())
    event = cache.store((1, 2))
    event.stored.block_size_tokens = 3
    with pytest.raises(FeedRefused, match="block_size_tokens of an event is 3, that of the cache 2"):
        await feed.apply(event)


class ListedIndex(PrefixIndex):
    """Lists what it is called with, and lets a test look at other tasks in between."""

    def __init__(self) -> None:
        super().__init__(1_000_000)
        self.removed: list[list[int]] = []

    def remove(self, start: Start, hashes: Iterable[int]) -> None:
        self.removed.append(list(hashes))
        super().remove(start, self.removed[-1])


async def test_feed_with_a_large_message_lets_other_tasks_run() -> None:
    """Parents are removed last, so that a lookup in between finds a closed cache."""
    index, turns = ListedIndex(), 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    hashes = [*range(20 * SLICE_BLOCKS - 1)]
    feed, other = KvFeed(WORKER, index), asyncio.create_task(count_turns())
    cache = PublishedCache()
    await feed.apply(cache.description(blocks=len(hashes)))
    await feed.apply(Message(snapshot=pb.KvSnapshot(block_hashes=hashes, is_last=True)))
    assert turns >= 19
    assert index.block_count == len(hashes)
    await feed.apply(Message(sequence=1, removed=pb.KvBlocksRemoved(block_hashes=hashes)))
    other.cancel()
    assert turns >= 38
    assert index.block_count == 0
    assert [one for part in reversed(index.removed) for one in part] == hashes
