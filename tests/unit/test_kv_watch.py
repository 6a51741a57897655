"""Following caches over gRPC: reconnects with a snapshot, and workers that are not asked again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace

import pytest
from tandem_frontend.routing.prefix_index import PrefixIndex
from tandem_frontend.routing.prompt_blocks import PromptBlocks

from tandem.api.worker.v1 import worker_service_pb2 as pb
from tandem.client import kv_watch
from tandem.client.kv_watch import KvWatch
from tandem.domain.worker import Start, Worker
from tandem.errors import NotSupported
from tandem.observability.metrics import NONE, Attributes, Metrics
from tandem.rpc.channels import Channels
from tandem.testing.eventually import assert_eventually
from tests.unit.support.cache_events import PublishedCache
from tests.unit.support.cache_publisher import ScriptedWorker, publishing
from tests.unit.support.frontend_workers import prefill

PROMPT = tuple(range(20))
Message = pb.WatchKvEventsResponse


class CountingMetrics(Metrics):
    """Adds up what is counted, by name and reason."""

    def __init__(self) -> None:
        self.counts: dict[str, float] = {}

    def count(self, name: str, amount: float = 1, attributes: Attributes = NONE) -> None:
        key = ".".join([name.removeprefix("tandem.prefix."), *attributes.values()])
        self.counts[key] = self.counts.get(key, 0) + amount


@dataclass
class Scene:
    """A worker with a cache, and a frontend that follows it."""

    cache: PublishedCache
    servicer: ScriptedWorker
    worker: Worker
    watch: KvWatch
    index: PrefixIndex
    metrics: CountingMetrics

    def credit(self, start: Start | None = None) -> int:
        return self.index.match(PromptBlocks([*PROMPT, 0])).get(start or self.worker.start, 0)

    async def credit_is(self, tokens: int, start: Start | None = None) -> None:
        await assert_eventually(lambda: self.credit(start) == tokens, within_s=5)

    async def counted(self, name: str, count: int = 1) -> None:
        await assert_eventually(lambda: self.metrics.counts.get(name) == count, within_s=5)


@contextlib.asynccontextmanager
async def scene(
    first: Callable[[PublishedCache], Iterator[Message]] = PublishedCache.snapshot, blocks_max: int = 1_000
) -> AsyncIterator[Scene]:
    """The worker caches 10 tokens of the prompt; `first` is what each of its streams begins with."""
    cache = PublishedCache(epoch=prefill().epoch)
    cache.store(PROMPT[:10])
    channels, index, metrics = Channels(), PrefixIndex(blocks_max), CountingMetrics()
    watch = KvWatch(channels, index, metrics)
    async with publishing(lambda: first(cache)) as (servicer, address), asyncio.timeout(20):
        worker = replace(prefill(), address=address)
        try:
            watch.follow([worker])
            yield Scene(cache, servicer, worker, watch, index, metrics)
        finally:
            await watch.close()
            await channels.close()


async def test_a_stream_begins_with_a_snapshot_and_goes_on_with_events() -> None:
    async with scene() as now:
        await now.credit_is(10)
        assert [request.snapshot for request in now.servicer.requests] == [True]
        now.servicer.later.put_nowait(now.cache.store(PROMPT))
        await now.credit_is(20)
        now.servicer.later.put_nowait(now.cache.evict(PROMPT[:6]))
        await now.credit_is(4)
        now.servicer.later.put_nowait(now.cache.clear())
        await now.credit_is(0)
        assert now.index.is_trusted(now.worker.start)
        assert now.metrics.counts == {"snapshots": 1}


async def test_a_gap_takes_the_credit_and_the_next_stream_restores_it() -> None:
    async with scene() as now:
        await now.credit_is(10)
        now.cache.evict(PROMPT[:8])
        now.servicer.later.put_nowait(now.cache.store((9, 9)))
        await now.credit_is(6)
        assert len(now.servicer.requests) == 2
        assert now.metrics.counts == {"snapshots": 2, "suspicions.gap": 1}


async def test_a_stream_that_ends_takes_the_credit_and_is_opened_again() -> None:
    async with scene() as now:
        await now.credit_is(10)
        now.servicer.first = lambda: iter(())
        now.servicer.later.put_nowait(None)
        await now.credit_is(0)
        assert (now.index.trusted_count, now.index.suspected_count) == (0, 1)
        now.servicer.first = now.cache.snapshot
        now.servicer.later.put_nowait(None)
        await now.credit_is(10)
        assert now.metrics.counts["suspicions.broken"] >= 1


async def test_unknown_contents_take_the_credit_until_the_next_snapshot_of_the_stream() -> None:
    async with scene() as now:
        await now.credit_is(10)
        now.servicer.later.put_nowait(now.cache.unknown())
        await now.credit_is(0)
        await now.counted("suspicions.unknown")
        now.servicer.later.put_nowait(now.cache.store(PROMPT))
        for message in now.cache.snapshot():
            now.servicer.later.put_nowait(message)
        await now.credit_is(20)
        assert len(now.servicer.requests) == 1


async def test_a_worker_that_publishes_nothing_is_asked_once() -> None:
    def refuse(cache: PublishedCache) -> Iterator[Message]:
        raise NotSupported("the engine publishes no KV events")

    async with scene(refuse) as now:
        await assert_eventually(lambda: len(now.servicer.requests) == 1, within_s=5)
        [task] = now.watch._tasks.values()
        await task
        now.watch.follow([now.worker])
        assert now.watch._tasks == {now.worker.start: task}
        assert (now.index.trusted_count, now.index.suspected_count, now.metrics.counts) == (0, 0, {})


async def test_a_worker_whose_hashes_are_unknown_is_refused_once_by_name(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with scene(lambda cache: iter([cache.description(hash_rule="xx-v9")])) as now:
        await now.counted("suspicions.refused")
        [task] = now.watch._tasks.values()
        await task
        now.watch.follow([now.worker])
        assert now.watch._tasks == {now.worker.start: task}
        [record] = [one for one in caplog.records if one.name == kv_watch.__name__]
        assert "worker prefill-0 are not understood: hash_rule is 'xx-v9'" in record.getMessage()
        assert (now.index.trusted_count, now.index.suspected_count, len(now.servicer.requests)) == (0, 0, 1)


async def test_another_epoch_at_the_address_gets_no_credit_until_the_view_has_it() -> None:
    async with scene() as now:
        await now.credit_is(10)
        now.cache.epoch += 1
        now.servicer.later.put_nowait(None)
        await now.counted("suspicions.epoch")
        assert now.credit() == 0
        restarted = replace(now.worker, epoch=now.cache.epoch)
        now.watch.follow([restarted])
        await now.credit_is(10, restarted.start)
        assert (now.credit(), now.index.trusted_count, now.index.suspected_count) == (0, 1, 0)


async def test_a_silent_worker_gets_no_credit_until_a_new_stream() -> None:
    async with scene() as now:
        await now.credit_is(10)
        now.watch.silent(now.worker.start)
        assert now.credit() == 0
        await now.credit_is(10)
        assert now.metrics.counts == {"snapshots": 2, "suspicions.silent": 1}
        now.watch.silent(("another", 1))


async def test_a_worker_that_leaves_the_view_is_forgotten() -> None:
    async with scene() as now:
        await now.credit_is(10)
        now.watch.follow([])
        assert (now.credit(), now.index.trusted_count, now.index.suspected_count) == (0, 0, 0)
        await assert_eventually(lambda: now.index.block_count == 0, within_s=5)


async def test_a_cache_that_does_not_fit_waits_until_all_of_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_watch, "FULL_RETRY_S", 0.01)
    async with scene(blocks_max=8) as now:
        await now.credit_is(10)
        other = ("decode-0", 1)
        now.index.reset(other, 2)
        now.index.add(other, [1, 2])
        now.servicer.later.put_nowait(now.cache.store(PROMPT))
        await assert_eventually(lambda: now.metrics.counts.get("suspicions.bound", 0) >= 3, within_s=5)
        assert (now.index.is_followed(other), now.credit()) == (True, 0)
        now.cache.evict(PROMPT[:10])
        await now.credit_is(8)
        assert now.index.overflow_count == 1
