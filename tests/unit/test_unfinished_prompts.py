"""Unfinished prompts: what a worker counts, when it reports them, and that a frontend's leg says what it expects."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, cast

import pytest
from tandem_frontend.execution.dispatch import Dispatch
from tandem_frontend.routing.candidates import Pick, Route

from tandem.api.types.v1 import leg_pb2
from tandem.api.worker.v1 import worker_service_pb2 as pb
from tandem.clock import ManualClock
from tandem.domain.generation import EngineFinish, FinishReason
from tandem.domain.worker import EngineLoad, UnfinishedPrompts, Worker
from tandem.errors import EngineFailed, InvalidRequest
from tandem.rpc.convert import load_from_proto
from tandem.rpc.status import from_status
from tandem.testing.virtual_time import run_virtually
from tandem.worker.legs import Legs
from tandem.worker.servicer import WorkerServicer
from tandem.worker.unfinished_prompts import PromptCount
from tests.unit.support.frontend_workers import decode, prefill
from tests.unit.test_worker_steps import WORKER, Scene


class Identity:
    def __init__(self, worker: Worker = WORKER) -> None:
        self.worker = worker

    def current(self) -> Worker:
        return self.worker


class IdleEngine:
    async def load(self) -> EngineLoad:
        return EngineLoad(running_requests=0)


def test_the_time_in_hand_begins_with_the_first_prompt_and_again_with_each_end() -> None:
    clock = ManualClock(10.0)
    prompts = PromptCount(clock)
    prompts.begin(100)
    clock.advance(2.0)
    prompts.begin(50)
    assert prompts.read() == UnfinishedPrompts(2, 150, 2.0)
    prompts.end(100)
    clock.advance(0.5)
    assert prompts.read() == UnfinishedPrompts(1, 50, 0.5)
    prompts.end(50)
    clock.advance(0.5)
    assert prompts.read() == UnfinishedPrompts(0, 0, 0.0)


async def test_a_prompt_is_unfinished_until_its_first_token_or_its_end() -> None:
    scene = await Scene().begin()
    prompts = scene.legs.prompts
    await scene.start(1, 2, 3)
    assert (prompts.read().count, prompts.read().tokens) == (3, 6)
    for _ in range(2):
        scene.output(1).tokens([5], ())
    assert (prompts.read().count, prompts.read().tokens) == (2, 4)
    scene.output(2).fail(EngineFailed("stopped"))
    assert scene.legs.abort("r3", None) == 1
    scene.output(1).finish(EngineFinish(reason=FinishReason.LENGTH))
    assert prompts.read() == UnfinishedPrompts()


async def test_a_leg_that_the_engine_refuses_is_not_unfinished() -> None:
    scene = await Scene().begin()
    scene.engine.refusal = EngineFailed("full")
    (result,) = await scene.start(1)
    assert result.WhichOneof("result") == "refused"
    assert scene.legs.prompts.read() == UnfinishedPrompts()


async def test_tokens_that_the_caller_expects_in_the_cache_are_not_counted() -> None:
    scene = await Scene().begin()
    await scene.start(1, expected_cached_tokens=1)
    await scene.start(2, expected_cached_tokens=9)
    assert (scene.legs.prompts.read().count, scene.legs.prompts.read().tokens) == (2, 1)
    (refused,) = await scene.start(3, expected_cached_tokens=-1)
    with pytest.raises(InvalidRequest, match=r"leg\.expected_cached_tokens"):
        raise from_status(refused.refused)


async def reports(scene: Scene, worker: Worker = WORKER, **intervals: int) -> AsyncIterator[pb.WatchLoadResponse]:
    engine: Any = IdleEngine()
    identity: Any = Identity(worker)
    servicer = WorkerServicer(engine, scene.legs, identity, lambda: None)
    async for report in servicer.WatchLoad(pb.WatchLoadRequest(**intervals), None):
        yield report


def test_a_report_comes_when_prompts_change_and_not_too_often() -> None:
    async def watched() -> list[tuple[float, int]]:
        loop = asyncio.get_running_loop()
        scene = await Scene().begin()
        begin_s, seen = loop.time(), list[tuple[float, int]]()
        loop.call_later(0.3, lambda: scene.legs.prompts.begin(7))
        loop.call_later(0.301, lambda: scene.legs.prompts.begin(5))
        loop.call_later(0.5, lambda: scene.legs.prompts.end(5))
        async for report in reports(scene, interval_ms=1_000, change_interval_ms=20):
            seen.append((round(loop.time() - begin_s, 3), report.unfinished_tokens))
            if len(seen) == 5:
                break
        return seen

    assert run_virtually(watched()) == [(0.0, 0), (0.3, 7), (0.32, 12), (0.5, 7), (1.5, 7)]


def test_a_caller_that_asks_for_no_changes_gets_the_interval_only() -> None:
    async def watched() -> list[float]:
        loop = asyncio.get_running_loop()
        scene = await Scene().begin()
        begin_s, seen = loop.time(), list[float]()
        loop.call_later(0.3, lambda: scene.legs.prompts.begin(7))
        async for _ in reports(scene, interval_ms=1_000):
            seen.append(round(loop.time() - begin_s, 3))
            if len(seen) == 3:
                break
        return seen

    assert run_virtually(watched()) == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("interval_ms", [9, 60_001])
async def test_an_interval_of_changes_out_of_range_is_refused(interval_ms: int) -> None:
    scene = await Scene().begin()
    with pytest.raises(InvalidRequest, match="change_interval_ms"):
        await anext(reports(scene, change_interval_ms=interval_ms))


async def test_a_decode_worker_counts_no_prompts() -> None:
    scene = Scene()
    identity: Any = Identity(decode())
    scene.legs = Legs(scene.engine, identity, timers=scene.timers)
    report = await anext(reports(scene, decode()))
    assert load_from_proto(report).unfinished is None
    scene.legs.prompts.begin(3)
    identity.worker = prefill()
    assert load_from_proto(await anext(reports(scene))).unfinished == UnfinishedPrompts(1, 3, 0.0)


class Links:
    """Keeps the legs that are sent."""

    def __init__(self) -> None:
        self.legs: dict[str, leg_pb2.LegRequest] = {}

    def get(self, worker: Worker) -> Links:
        self.worker = worker
        return self

    def start(self, leg: leg_pb2.LegRequest, *_: object) -> None:
        self.legs["prefill" if leg.worker_epoch == prefill().epoch else "decode"] = leg


@pytest.mark.parametrize("is_pair", [True, False])
def test_only_the_leg_that_computes_the_prompt_says_what_is_expected_in_the_cache(is_pair: bool) -> None:
    links = Links()
    streaming = replace(decode(), epoch=prefill().epoch + 1)
    route = Route(
        decode=streaming,
        prefill=prefill() if is_pair else None,
        pick=Pick(1, "", "prefix", ""),
        expected_cached_tokens=48,
    )
    sink: Any = object()
    Dispatch(cast("Any", links), random.Random(1)).send(route, leg_pb2.LegRequest(), 1, (sink, sink), None)
    computing = "prefill" if is_pair else "decode"
    assert {name: leg.expected_cached_tokens for name, leg in links.legs.items()} == {
        **({"decode": 0} if is_pair else {}),
        computing: 48,
    }
