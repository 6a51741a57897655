"""Following SGLang's KV events: order, gaps, replays, dumps, and events that are refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tandem.domain.kv_blocks import block_hashes
from tandem.domain.worker import WorkerRole
from tandem.engine.kv_mirror import KvCacheMirror
from tandem.engine.port import KvSnapshot, KvUnknown
from tandem.engine.settings import EngineSettings
from tandem.errors import EngineFailed
from tandem.testing.eventually import assert_eventually
from tests.unit.support.kv_publisher import KvPublisher, publisher

pytest.importorskip("zmq")
msgspec = pytest.importorskip("msgspec")

from tandem.engine.sglang import kv_events, kv_follower  # noqa: E402
from tandem.engine.sglang.kv_events import EventReader, Refused  # noqa: E402
from tandem.engine.sglang.kv_follower import KvFollower  # noqa: E402

PAGE = 4
PROMPT = list(range(100, 140))


def stored(tokens: list[int], after: int = 0, **more: Any) -> dict[str, Any]:
    """The event of a prompt whose first `after` blocks were cached before."""
    hashes = block_hashes(tokens, PAGE, more.get("cache_salt"))
    return {
        "type": "BlockStored",
        "block_hashes": hashes[after:],
        "parent_block_hash": hashes[after - 1] if after else None,
        "token_ids": tokens[after * PAGE : len(hashes) * PAGE],
        "block_size": PAGE,
        "medium": "GPU",
        **more,
    }


def removed(hashes: list[int], **more: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU", **more}


CLEARED = {"type": "AllBlocksCleared"}


def batch(*events: Any) -> bytes:
    encoded: bytes = msgspec.msgpack.encode([0.0, events, 0])
    return encoded


@asynccontextmanager
async def following(engine: KvPublisher, quiet_s: float = 60) -> AsyncIterator[tuple[KvFollower, KvCacheMirror]]:
    mirror = KvCacheMirror(PAGE)
    follower = KvFollower(engine.directory, mirror, engine.dump, quiet_s)
    task = asyncio.create_task(follower.run())
    try:
        yield follower, mirror
    finally:
        task.cancel()
        await asyncio.wait({task})


async def subscribed(engine: KvPublisher, mirror: KvCacheMirror) -> None:
    """Publish until the follower has read a message from the event socket."""
    # What a socket publishes before the subscription has reached it is lost without a trace.
    await engine.publish(stored(PROMPT))
    # This one comes from the replay at the start, what is published after it does not.
    await assert_contents(engine, mirror)
    before = mirror.sequence
    async with asyncio.timeout(10):
        while mirror.sequence == before:
            await engine.publish(CLEARED, stored(PROMPT))
            await asyncio.sleep(0.02)
    await assert_contents(engine, mirror)


async def assert_contents(engine: KvPublisher, mirror: KvCacheMirror) -> None:
    await assert_eventually(
        lambda: (mirror.is_known, set(mirror.snapshot().block_hashes)),
        lambda seen: seen == (True, engine.cached),
        what="the mirror's contents",
    )


async def test_messages_from_before_the_subscription_are_replayed() -> None:
    async with publisher() as engine:
        await engine.publish(stored(PROMPT))
        await engine.publish(stored([*PROMPT, 1, 2, 3, 4], after=10))
        async with following(engine) as (_, mirror):
            await assert_contents(engine, mirror)
            assert len(engine.cached) == 11
            assert not engine.asked


async def test_gap_is_announced_and_repaired_by_a_replay() -> None:
    async with publisher() as engine, following(engine) as (_, mirror):
        await subscribed(engine, mirror)
        reader = mirror.follow()
        assert isinstance(await anext(reader), KvSnapshot)
        hashes = block_hashes(PROMPT, PAGE)
        await engine.publish(removed(hashes[5:]), drop=True)
        await engine.publish(removed(hashes[3:5]))
        assert isinstance(await anext(reader), KvUnknown)
        snapshot = await anext(reader)
        assert isinstance(snapshot, KvSnapshot)
        assert set(snapshot.block_hashes) == engine.cached == set(hashes[:3])
        assert not engine.asked, "the replay had all of it"


async def test_loss_of_the_last_message_is_noticed_in_a_quiet_time() -> None:
    async with publisher() as engine, following(engine, quiet_s=0.1) as (_, mirror):
        await subscribed(engine, mirror)
        await engine.publish(removed(block_hashes(PROMPT, PAGE)[5:]), drop=True)
        await assert_contents(engine, mirror)
        assert len(engine.cached) == 5


async def test_gap_beyond_the_replay_is_repaired_by_a_dump() -> None:
    async with publisher(kept=2) as engine, following(engine) as (_, mirror):
        await subscribed(engine, mirror)
        reader = mirror.follow()
        await anext(reader)
        for salt in "abc":
            await engine.publish(stored(PROMPT, cache_salt=salt), drop=True)
        await engine.publish(stored(PROMPT, cache_salt="d"))
        assert isinstance(await anext(reader), KvUnknown)
        snapshot = await anext(reader)
        assert isinstance(snapshot, KvSnapshot)
        assert set(snapshot.block_hashes) == engine.cached
        assert (len(engine.cached), engine.asked) == (50, [1])
        await engine.publish(CLEARED)
        await assert_contents(engine, mirror)


async def test_dump_that_does_not_come_is_asked_for_again() -> None:
    async with publisher(kept=1) as engine, following(engine, quiet_s=0.1) as (_, mirror):
        await subscribed(engine, mirror)
        engine.answers = False
        for salt in "ab":
            await engine.publish(stored(PROMPT, cache_salt=salt), drop=True)
        await engine.publish(stored(PROMPT, cache_salt="c"))
        await assert_eventually(lambda: len(engine.asked) >= 2)
        assert not mirror.is_known
        engine.answers = True
        await assert_contents(engine, mirror)


async def test_beginning_that_the_replay_has_dropped_is_noticed_in_a_quiet_time() -> None:
    async with publisher(kept=1) as engine:
        await engine.publish(stored(PROMPT))
        await engine.publish(stored([*PROMPT, 1, 2, 3, 4], after=10))
        async with following(engine, quiet_s=0.1) as (_, mirror):
            await assert_contents(engine, mirror)
            assert len(engine.cached) == 11


async def test_lost_dump_is_asked_for_again_in_the_midst_of_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_follower, "ANSWER_TIMEOUT_S", 0.1)
    async with publisher(kept=1) as engine, following(engine) as (_, mirror):
        await subscribed(engine, mirror)
        engine.answers = False
        for salt in "ab":
            await engine.publish(stored(PROMPT, cache_salt=salt), drop=True)
        async with asyncio.timeout(10):
            while len(engine.asked) < 2:
                await engine.publish(stored(PROMPT, cache_salt="c"))
                await asyncio.sleep(0.02)
        engine.answers = True
        async with asyncio.timeout(10):
            while not mirror.is_known:
                await engine.publish(stored(PROMPT, cache_salt="d"))
                await asyncio.sleep(0.02)
        await assert_contents(engine, mirror)


async def test_failure_of_the_follower_leaves_nothing_to_believe(monkeypatch: pytest.MonkeyPatch) -> None:
    async with publisher() as engine, following(engine) as (_, mirror):
        await subscribed(engine, mirror)
        monkeypatch.setattr(EventReader, "apply", lambda *_: 1 / 0)
        await engine.publish(CLEARED)
        assert "following them failed" in (await asyncio.wait_for(mirror.wait_refused(), 10) or "")
        assert not mirror.is_known


async def test_contents_are_read_in_order_with_the_events(monkeypatch: pytest.MonkeyPatch) -> None:
    async with publisher() as engine, following(engine) as (follower, mirror):
        await subscribed(engine, mirror)
        found = await follower.read()
        assert (set(found.block_hashes), found.sequence) == (engine.cached, mirror.sequence)
        engine.answers = False
        monkeypatch.setattr(kv_follower, "ANSWER_TIMEOUT_S", 0.05)
        with pytest.raises(EngineFailed, match="did not report the contents"):
            await follower.read()


async def test_refused_events_end_the_following() -> None:
    async with publisher() as engine, following(engine) as (_, mirror):
        await engine.publish({**stored(PROMPT), "block_size": 8})
        assert await mirror.wait_refused() == "its blocks have 8 tokens, its pages 4"
        assert not mirror.is_known


def test_events_of_one_batch_are_applied_in_order() -> None:
    mirror = KvCacheMirror(PAGE)
    reader = EventReader(mirror)
    hashes = block_hashes(PROMPT, PAGE)
    reader.apply(batch(stored(PROMPT)))
    reader.apply(batch(removed(hashes[2:]), stored(PROMPT[:12], after=2)))
    assert set(mirror.snapshot().block_hashes) == set(hashes[:3])
    reader.apply(batch(stored(PROMPT, cache_salt="a"), CLEARED, stored(PROMPT[:4])))
    assert set(mirror.snapshot().block_hashes) == set(hashes[:1])


def test_copies_outside_the_engines_memory_do_not_count() -> None:
    mirror = KvCacheMirror(PAGE)
    reader = EventReader(mirror)
    hashes = block_hashes(PROMPT, PAGE)
    reader.apply(batch(stored(PROMPT), stored(PROMPT, medium="CPU_PINNED"), removed(hashes)))
    assert not mirror.snapshot().block_hashes
    reader.apply(batch(stored(PROMPT), removed(hashes, medium="CPU_PINNED")))
    assert len(mirror.snapshot().block_hashes) == 10


@pytest.mark.parametrize(
    ("payload", "sentence"),
    [
        (b"\xc1", "its message cannot be read"),
        (b"\x01", "its message cannot be read"),
        (batch({"kind": 1}), "an event without a type"),
        (batch({"type": "BlockMoved"}), "an event of the unknown type BlockMoved"),
        (batch({**stored(PROMPT), "block_size": 16}), "its blocks have 16 tokens, its pages 4"),
        (batch({**stored(PROMPT), "token_ids": PROMPT[1:]}), "its blocks have 4 tokens"),
        (batch({**stored(PROMPT), "block_hashes": list(range(10))}), "do not follow the rule sha256-chain-v1"),
        (batch({**stored(PROMPT, cache_salt="a"), "cache_salt": "b"}), "do not follow the rule"),
        (batch({**stored(PROMPT), "token_ids": [[1, 2]] * 40}), "its event BlockStored cannot be read"),
        (batch({"type": "BlockRemoved"}), "its event BlockRemoved cannot be read"),
    ],
)
def test_unknown_events_are_refused(payload: bytes, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        EventReader(KvCacheMirror(PAGE)).apply(payload)


@pytest.mark.parametrize(
    ("role", "settings", "reason"),
    [
        (WorkerRole.PREFILL, {"extra": {"page_size": 16}}, None),
        (WorkerRole.AGGREGATED, {"extra": {"page_size": 64}}, None),
        (WorkerRole.AGGREGATED, {"kv_events": True}, None),
        (WorkerRole.DECODE, {"kv_events": True, "extra": {"disaggregation_decode_enable_radix_cache": True}}, None),
        (WorkerRole.DECODE, {"kv_events": True}, "disaggregation_decode_enable_radix_cache is not set"),
        (WorkerRole.PREFILL, {}, "page_size"),
        (WorkerRole.PREFILL, {"extra": {"page_size": 8}}, "pages of 8 tokens"),
        (WorkerRole.PREFILL, {"kv_events": False, "extra": {"page_size": 16}}, "without KV events"),
        (WorkerRole.PREFILL, {"kv_events": True, "extra": {"disable_radix_cache": True}}, "no prefix cache"),
        (WorkerRole.PREFILL, {"kv_events": True, "extra": {"dp_size": 2}}, "dp_size"),
    ],
)
def test_engines_without_events_say_why(role: WorkerRole, settings: dict[str, Any], reason: str | None) -> None:
    found = kv_events.unavailable(EngineSettings(role=role, model_path=Path("m"), model_name="m", **settings))
    assert found is None if reason is None else reason in (found or "")
