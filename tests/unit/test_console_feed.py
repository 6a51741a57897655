"""The console's stream of the fleet: what viewers get, in which form, and that without viewers nothing is computed."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

from tandem_frontend.console.feed import FleetFeed

from tandem.api.admin.v1 import admin_service_pb2 as admin_pb
from tandem.testing.virtual_time import VirtualTimeLoop
from tests.unit.support.scripted_fleet import ScriptedFleet, ScriptedFrontends, report
from tests.wire.support.registry_host import make_worker

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028\u202e\x85\n'\"&"


def feed_of(fleet: ScriptedFleet, frontends: ScriptedFrontends | None = None) -> FleetFeed:
    return FleetFeed(fleet, frontends or ScriptedFrontends(), {"frontend": "f"}, now=lambda: 12.0)


async def read(texts: Any, feed: FleetFeed) -> dict[str, Any]:
    """Take a snapshot, and what a viewer gets of it."""
    waiting = asyncio.ensure_future(anext(texts))
    await asyncio.sleep(0)
    feed.look()
    event: dict[str, Any] = json.loads(await waiting)
    return event


def ids(event: dict[str, Any]) -> list[str]:
    return [row["id"] for row in event["workers"]]


async def test_feed_after_the_first_text_sends_only_what_has_changed() -> None:
    first, second = make_worker("a"), make_worker("b")
    fleet = ScriptedFleet(first, second)
    feed = feed_of(fleet)
    texts = feed.texts()
    event = await read(texts, feed)
    assert (event["is_whole"], ids(event), event["removed"]) == (True, ["a", "b"], [])
    assert event["workers"][0]["state"] == "unreachable"

    event = await read(texts, feed)
    assert (event["is_whole"], ids(event)) == (False, [])

    fleet.loads[first.start] = (None, report(1, running_requests=3))
    event = await read(texts, feed)
    assert ids(event) == ["a"]
    assert (event["workers"][0]["running_requests"], event["workers"][0]["state"]) == (3, "serving")

    fleet.loads[first.start] = (fleet.loads[first.start][1], report(2, running_requests=3))
    assert ids(await read(texts, feed)) == [], "the report is another one and says the same"

    fleet.down, fleet.broken = frozenset({first.start}), frozenset({second.start})
    event = await read(texts, feed)
    assert [row["health"] for row in event["workers"]] == ["unhealthy", "ejected"]

    fleet.view = (second,)
    event = await read(texts, feed)
    assert (ids(event), event["removed"]) == ([], ["a"])

    fleet.view = (replace(second, epoch=2),)
    event = await read(texts, feed)
    assert [(row["id"], row["epoch"]) for row in event["workers"]] == [("b", 2)]
    await texts.aclose()


async def test_feed_for_a_viewer_that_missed_a_change_sends_the_whole_fleet() -> None:
    fleet = ScriptedFleet(make_worker("a"), make_worker("b"))
    feed = feed_of(fleet)
    slow = feed.texts()
    await read(slow, feed)
    feed.look()
    fleet.view = fleet.view[:1]
    feed.look()
    event = json.loads(await anext(slow))
    assert (event["is_whole"], ids(event)) == (True, ["a"])
    await slow.aclose()


async def test_feed_counts_failures_of_a_worker_over_the_frontends() -> None:
    stats = admin_pb.WatchFiguresResponse(open_requests=4, failed_requests=1)
    stats.leg_failures.add(worker_id="a", count=2)
    stats.leg_failures.add(worker_id="a", count=3)
    feed = feed_of(ScriptedFleet(make_worker("a")), ScriptedFrontends(stats))
    texts = feed.texts()
    event = await read(texts, feed)
    assert event["workers"][0]["failures"] == 5
    assert (event["totals"]["open_requests"], event["frontends"][0]["failed_requests"]) == (4, 1)
    assert event["frontends"][0]["ttft_p50_s"] is None
    await texts.aclose()


async def test_row_of_a_worker_has_rates_and_null_for_what_is_unknown() -> None:
    worker = make_worker("decode-0")
    fleet = ScriptedFleet(worker)
    before = report(1, completion_tokens=10, kv_transfer_bytes=0, prompt_tokens=8, cached_tokens=0)
    load = report(3, completion_tokens=50, kv_transfer_bytes=4096, prompt_tokens=10, cached_tokens=5, kv_used_tokens=7)
    fleet.loads[worker.start] = (before, load)
    feed = feed_of(fleet)
    texts = feed.texts()
    (row,) = (await read(texts, feed))["workers"]
    assert (row["tokens_per_s"], row["kv_bytes_per_s"], row["hit_ratio"]) == (20, 2048, 0.5)
    assert (row["kv_used_tokens"], row["kv_free_tokens"], row["waiting_requests"]) == (7, None, None)
    await texts.aclose()


async def test_text_of_a_hostile_name_is_one_line_and_the_same_after_parsing() -> None:
    worker = replace(make_worker("a"), worker_id=HOSTILE, address=HOSTILE)
    worker = replace(worker, capabilities=replace(worker.capabilities, model=HOSTILE))
    feed = feed_of(ScriptedFleet(worker))
    texts = feed.texts()
    waiting = asyncio.ensure_future(anext(texts))
    await asyncio.sleep(0)
    feed.look()
    text = await waiting
    assert len(text.splitlines()) == 1
    (row,) = json.loads(text)["workers"]
    assert (row["id"], row["address"], row["model"]) == (HOSTILE, HOSTILE, HOSTILE)
    await texts.aclose()


def test_feed_without_viewers_reads_nothing_and_viewers_share_one_snapshot() -> None:
    fleet, frontends = ScriptedFleet(make_worker("a")), ScriptedFrontends()
    feed = feed_of(fleet, frontends)

    async def scene() -> None:
        running = asyncio.create_task(feed.run())
        await asyncio.sleep(60)
        assert (fleet.reads, frontends.is_followed) == (0, False)

        viewers = [feed.texts() for _ in range(3)]
        first = await asyncio.gather(*(anext(viewer) for viewer in viewers))
        assert (len(set(first)), fleet.reads, feed.viewer_count) == (1, 1, 3)
        assert frontends.is_followed
        assert not json.loads((await asyncio.gather(*(anext(viewer) for viewer in viewers)))[2])["is_whole"]
        assert fleet.reads == 2

        for viewer in viewers:
            await viewer.aclose()
        await asyncio.sleep(60)
        reads = fleet.reads
        await asyncio.sleep(60)
        assert (fleet.reads, frontends.is_followed, feed.viewer_count) == (reads, False, 0)

        again = feed.texts()
        assert json.loads(await anext(again))["is_whole"]
        await again.aclose()
        running.cancel()
        await asyncio.wait({running})

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(scene())
