"""Conditional disaggregation on a cluster of both kinds: where prompts go, what reports it, and workers that die."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tandem.api.types.v1 import generation_pb2
from tandem.cli.generate import summary
from tandem.cli.timeline import render
from tandem.client import admin_calls, calls
from tandem.engine.simulated.tokens import expected_tokens
from tandem.errors import TandemError
from tandem.local_cluster.cluster import LocalCluster
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import running
from tests.integration.support.calls import Stream, generate, request_of
from tests.integration.test_simulated_cluster import VOCABULARY

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(90)]

SHORT, LONG = 40, 600
"""Prompt tokens; the default makes a prompt of up to 512 a short one."""
MIXED: dict[str, Any] = {
    "engine": "simulated",
    "aggregated": 1,
    "worker_flags": {"engine-extra": '{"decode_step_s": 0.004}'},
}
SHORT_PROMPT, NO_PAIR = generation_pb2.PLACEMENT_SHORT_PROMPT, generation_pb2.PLACEMENT_NO_PAIR
CLIENTS = 6


def prompt_of(length: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(6, 1536) for _ in range(length)]


async def answer_to(cluster: LocalCluster, prompt: list[int], max_tokens: int = 4) -> Stream:
    """A stream whose tokens are those of an undisturbed engine."""
    request = request_of(token_ids=prompt, max_tokens=max_tokens, ignore_eos=True)
    stream = await generate(cluster, request)
    assert stream.token_ids == expected_tokens(VOCABULARY, prompt, max_tokens)
    return stream


@contextlib.asynccontextmanager
async def mixed(tmp_path: Path, **spec: Any) -> AsyncIterator[LocalCluster]:
    """A pair and an aggregated worker, whose load reports the frontend has."""
    async with running(tmp_path, **{**MIXED, **spec}) as cluster:

        async def placement() -> int:
            return (await answer_to(cluster, prompt_of(SHORT, 0), 1)).finish.route.placement

        await assert_eventually(placement, lambda found: found == SHORT_PROMPT, what="a load report")
        yield cluster


async def test_short_prompts_go_to_the_aggregated_worker_and_long_ones_to_the_pair(tmp_path: Path) -> None:
    async with mixed(tmp_path) as cluster:
        for number in range(4):
            for length, workers, why in (
                (SHORT, ("", "aggregated-0"), "short prompt"),
                (LONG, ("prefill-0", "decode-0"), "long prompt"),
            ):
                stream = await answer_to(cluster, prompt_of(length, number))
                finish, route = stream.finish, stream.finish.route
                assert (route.prefill_worker_id, route.decode_worker_id) == workers
                assert finish.timings.HasField("kv_transfer_bytes") == (length == LONG)
                assert f"{workers[1]} ({why}) · " in summary(finish)
                request_id = stream.accepted.request_id
                (timeline,) = await admin_calls.request_timelines(cluster.frontend.address, request_id)
                assert timeline.attempts[0].placement == route.placement
                kind = "an aggregated worker" if length == SHORT else "a pair"
                assert f"on {kind}: {why}" in render(timeline, "frontend-0")


async def test_without_the_rule_the_policy_picks_among_both_kinds(tmp_path: Path) -> None:
    flags = {"frontend": {"local-prefill": "false", "routing-policy": "random"}}
    async with running(tmp_path, **MIXED, role_flags=flags) as cluster:
        routes = [(await answer_to(cluster, prompt_of(SHORT, number))).finish.route for number in range(40)]
        assert {route.placement for route in routes} == {generation_pb2.PLACEMENT_UNSPECIFIED}
        assert {route.decode_worker_id for route in routes} == {"decode-0", "aggregated-0"}


@dataclass
class Load:
    """Streams of short and long prompts, each checked token by token."""

    streams: list[Stream] = field(default_factory=list)
    failures: list[TandemError] = field(default_factory=list)

    async def client(self, cluster: LocalCluster, number: int) -> None:
        for turn in range(10_000):
            try:
                prompt = prompt_of(LONG if (number + turn) % 2 else SHORT, number * 10_000 + turn)
                self.streams.append(await answer_to(cluster, prompt, max_tokens=60))
            except TandemError as problem:
                self.failures.append(problem)

    async def more(self, count: int) -> list[Stream]:
        """The next streams that end."""
        before = len(self.streams)
        await assert_eventually(
            lambda: len(self.streams) - before, lambda more: more >= count, within_s=30, what=f"{count} more streams"
        )
        return self.streams[before:]

    async def comes_back(self, name: str) -> None:
        """Return when the last stream that ended was served by a worker."""

        def last() -> tuple[str, str]:
            route = self.streams[-1].finish.route
            return route.prefill_worker_id, route.decode_worker_id

        await assert_eventually(last, lambda names: name in names, within_s=20, what=f"a stream on {name}")


@contextlib.asynccontextmanager
async def under_load(cluster: LocalCluster) -> AsyncIterator[Load]:
    load = Load()
    tasks = [asyncio.create_task(load.client(cluster, number)) for number in range(CLIENTS)]
    try:
        yield load
    finally:
        for task in tasks:
            task.cancel()
        done, _ = await asyncio.wait(tasks)
        for task in done:
            assert task.cancelled(), task.exception()


async def kill(cluster: LocalCluster, name: str) -> None:
    process = cluster.process(name)
    process.flags["port"] = process.address.rpartition(":")[2]
    process.signal(signal.SIGKILL)
    await process.wait_ended()


async def test_no_request_fails_when_every_prefill_worker_is_killed(tmp_path: Path) -> None:
    # Prompts take so long that the kill meets some.
    slow = {"engine-extra": '{"decode_step_s": 0.004, "prefill_step_s": 0.2}'}
    async with mixed(tmp_path, worker_flags=slow) as cluster:
        async with under_load(cluster) as load:
            before = await load.more(20)
            assert {stream.finish.route.prefill_worker_id for stream in before} == {"", "prefill-0"}
            address = cluster.process("prefill-0").address

            async def open_legs() -> int:
                return (await calls.worker_load(address)).open_legs

            await assert_eventually(open_legs, bool, every_s=0.01, what="a prompt at the prefill worker")
            await kill(cluster, "prefill-0")
            met = await load.more(30)
            after = await load.more(15)
            assert not load.failures
            assert [stream for stream in met if stream.finish.route.attempt > 1], "no request met the dead worker"
            assert {stream.finish.route.decode_worker_id for stream in after} == {"aggregated-0"}
            assert {stream.finish.route.placement for stream in after} == {NO_PAIR}
            await cluster.restart("prefill-0")
            await load.comes_back("prefill-0")
            assert not load.failures
        reasons = Counter(stream.finish.reason for stream in load.streams)
        assert set(reasons) == {generation_pb2.FINISH_REASON_LENGTH}


async def test_streams_continue_on_the_other_kind_and_back(tmp_path: Path) -> None:
    """Each worker that streams is killed under load: its streams go on where it was not, token by token."""
    async with mixed(tmp_path) as cluster, under_load(cluster) as load:
        for killed, heir in (("decode-0", "aggregated-0"), ("aggregated-0", "decode-0")):
            await load.more(20)
            await kill(cluster, killed)
            met = await load.more(40)
            assert not load.failures
            moved = [stream for stream in met if stream.finish.route.attempt > 1]
            assert {stream.finish.route.decode_worker_id for stream in moved} == {heir}
            begun = [s for s in moved if s.accepted.route.decode_worker_id == killed and s.chunks[0].token_ids]
            assert begun, "no stream was broken after its first token"
            await cluster.restart(killed)
            await load.comes_back(killed)
        assert not load.failures
