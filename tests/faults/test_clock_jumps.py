"""The time of day of a worker, of a frontend and of the registry jumps by an hour, forward and back, under a load.

Nothing that counts seconds may follow it: deadlines, leases and bounds go on as if nothing were, epochs only grow, and
the times that a stream reports stay in order. Each jump is proved by what its process says of the time.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from pathlib import Path

import pytest
import pytest_asyncio

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem.client import calls
from tandem.discovery.lease_calls import give_up, grant
from tandem.domain.frontend import Frontend
from tandem.errors import DeadlinePassed, StartError
from tandem.local_cluster.child_process import ClusterProcess
from tandem.rpc.channels import open_channel
from tandem.testing.eventually import assert_eventually
from tests.faults.support.fake_time import FakeTime, find_library
from tests.faults.support.fault_cluster import Plan
from tests.faults.support.history import now_s
from tests.faults.support.leg_cluster import BUSY_MACHINE_S, LegCluster
from tests.faults.support.leg_trace import under_load
from tests.faults.support.process_faults import free_port, kill

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(90)]

HOUR_S = 3_600
JUMPS = [pytest.param(HOUR_S, id="forward", marks=pytest.mark.fault_matrix), pytest.param(-HOUR_S, id="back")]
JUMPING = ("prefill-0", "decode-0", "frontend-0", "registry-0")
LEASE_S = 15.0
"""Long enough for a process to start in on a busy machine, while the registry still lists the previous one."""
PASSES_S = 5.5
"""Longer than any bound on a leg, and than the time between two signs of life."""


class ClockCluster(LegCluster):
    """A leg cluster of which some processes have a time of day of their own."""

    def __init__(self, plan: Plan, logs: Path, stack: AsyncExitStack, library: Path) -> None:
        super().__init__(plan, logs, stack)
        self.times = {name: FakeTime(library, logs / f"{name}.time") for name in JUMPING}

    def environment(self, name: str) -> dict[str, str]:
        return self.times[name].environment if name in self.times else {}

    async def jump(self, name: str, seconds: int) -> None:
        """Set the clock of a process, and prove that it reads it."""
        self.times[name].jump(seconds)
        if self.processes[name].runs:
            await assert_eventually(
                lambda: self.offset_s(self.processes[name]),
                lambda offset_s: abs(offset_s - seconds) < 60,
                what=f"a clock of {name} that is {seconds} s off",
            )

    async def offset_s(self, process: ClusterProcess) -> float:
        """How far its time of day is from the true one, as it says itself."""
        if process.role == "frontend":
            timings = await timings_of(process.address)
            return timings.accepted_time.ToMilliseconds() / 1e3 - time.time()
        if process.role == "registry":
            return await self._registry_offset_s(process)
        return (await calls.worker_load(process.address)).measured_time.ToMilliseconds() / 1e3 - time.time()

    async def _registry_offset_s(self, registry: ClusterProcess) -> float:
        """It reports no time; but it dates its log line about a new member."""
        member = Frontend(frontend_id="looks-at-the-clock", epoch=time.time_ns(), address="127.0.0.9:9", model="m")
        async with open_channel(registry.address) as channel:
            await give_up(channel, await grant(channel, member, now_s()))
        line = next(line for line in reversed(registry.log.read_text().splitlines()) if member.frontend_id in line)
        dated = datetime.fromisoformat(json.loads(line)["time"])
        return dated.timestamp() - time.time()

    async def epochs(self) -> dict[str, int]:
        """Of all workers and frontends, as the registry lists them."""
        listed = await calls.list_members(self.registries[0].address)
        found = {entry.worker.worker_id: entry.worker.epoch for entry in listed.workers}
        return found | {entry.frontend.frontend_id: entry.frontend.epoch for entry in listed.frontends}


@pytest.fixture(scope="module")
def library() -> Path:
    """Where it cannot be had a test is skipped; in CI it fails."""
    try:
        return find_library()
    except StartError as problem:
        if os.environ.get("CI"):
            pytest.fail(str(problem))
        pytest.skip(str(problem))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(library: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ClockCluster]:
    async with AsyncExitStack() as stack:
        plan = Plan(registries=1, lease_s=LEASE_S)
        cluster = ClockCluster(plan, tmp_path_factory.mktemp("clocks"), stack, library)
        await cluster.start()
        yield cluster


@asynccontextmanager
async def true_in_the_end(cluster: ClockCluster, name: str) -> AsyncIterator[None]:
    try:
        yield
    finally:
        cluster.times[name].jump(0)


async def timings_of(frontend: str, max_tokens: int = 4, timeout_s: float = 10.0) -> generation_pb2.Timings:
    request = pb.GenerateRequest(
        token_ids={"ids": [11, 12, 13]},  # type: ignore[arg-type]
        stopping={"max_tokens": max_tokens, "ignore_eos": True},  # type: ignore[arg-type]
    )
    async for event in calls.generate(frontend, request, timeout_s):
        if event.HasField("finish"):
            return event.finish.timings
    raise AssertionError("no finish")


@pytest.mark.parametrize("jump_s", JUMPS)
@pytest.mark.parametrize(
    "name",
    ["decode-0", *(pytest.param(name, marks=pytest.mark.fault_matrix) for name in JUMPING if name != "decode-0")],
)
async def test_a_clock_that_jumps_is_nothing(cluster: ClockCluster, name: str, jump_s: int) -> None:
    way = "forward" if jump_s > 0 else "back"
    async with (
        under_load(cluster, f"clock of {name} jumps {way}, and back again") as trace,
        true_in_the_end(cluster, name),
    ):
        before = await cluster.epochs()
        await trace.hold("decode-0", "decoding")
        trace.fault_s = now_s()
        await cluster.jump(name, jump_s)
        over_s = trace.fault_s + PASSES_S
        await assert_eventually(lambda: now_s() > over_s, within_s=20, what="every bound on a leg")
        await trace.answered(20)
        await cluster.jump(name, 0)
        await trace.answered(20)
        assert await cluster.epochs() == before, "a worker was taken for another start"
    assert {asked.last_attempt for asked in trace.load.history.asked} == {1}, "a leg broke"


@pytest.mark.parametrize("jump_s", JUMPS)
async def test_the_times_that_a_stream_reports_stay_in_order(cluster: ClockCluster, jump_s: int) -> None:
    frontend = cluster.frontends[0]
    async with true_in_the_end(cluster, frontend.name):
        running = asyncio.create_task(timings_of(frontend.address, max_tokens=300))
        await asyncio.sleep(0.5)
        assert not running.done(), "void: it was over before the clock jumped"
        begun_s = now_s()
        await cluster.jump(frontend.name, jump_s)
        timings = await running
        took_s = now_s() - begun_s + 1.0
    times = [timings.accepted_time, timings.first_token_time, timings.last_token_time]
    millis = [moment.ToMilliseconds() for moment in times]
    assert millis == sorted(millis)
    assert millis[-1] - millis[0] < 1e3 * (took_s + BUSY_MACHINE_S)
    assert timings.time_to_first_token.ToMilliseconds() < 1e3 * (0.5 + BUSY_MACHINE_S)


@pytest.mark.parametrize("jump_s", JUMPS)
async def test_a_deadline_is_counted_in_seconds_and_not_by_the_time_of_day(cluster: ClockCluster, jump_s: int) -> None:
    frontend = cluster.frontends[0]
    async with true_in_the_end(cluster, frontend.name):
        begin_s = now_s()
        running = asyncio.create_task(timings_of(frontend.address, max_tokens=1_500, timeout_s=2.0))
        await asyncio.sleep(0.5)
        await cluster.jump(frontend.name, jump_s)
        with pytest.raises(DeadlinePassed):
            await running
        assert 1.5 < now_s() - begin_s < 2.0 + BUSY_MACHINE_S
        await cluster.assert_idle()


@pytest.mark.parametrize(
    "name",
    ["decode-0", *(pytest.param(name, marks=pytest.mark.fault_matrix) for name in ("prefill-0", "frontend-0"))],
)
async def test_a_start_whose_clock_went_back_is_a_later_one_at_once(cluster: ClockCluster, name: str) -> None:
    async with cluster.views() as views, true_in_the_end(cluster, name):
        await cluster.restore(views)
        former = (await cluster.epochs())[name]
        await kill(cluster.processes[name])
        await cluster.jump(name, -HOUR_S)
        await cluster.restart(name)
        # Had it waited for the lease of its dead start, its epoch would be what its clock says.
        is_later = lambda epochs: epochs.get(name, 0) > former  # noqa: E731
        await assert_eventually(cluster.epochs, is_later, within_s=LEASE_S, what="a later epoch")
        assert abs(await cluster.offset_s(cluster.processes[name]) + HOUR_S) < 60, "void: its clock is right"
        await cluster.whole(views)
        await timings_of(cluster.frontends[0].address)


@pytest.mark.fault_matrix
async def test_a_start_elsewhere_whose_clock_went_back_waits_for_the_dead_one_and_serves(cluster: ClockCluster) -> None:
    async with cluster.views() as views, true_in_the_end(cluster, "decode-0"):
        await cluster.restore(views)
        worker = cluster.processes["decode-0"]
        await kill(worker)
        await cluster.jump("decode-0", -HOUR_S)
        worker.flags["port"] = str(free_port())
        await cluster.restart("decode-0")
        await cluster.whole(views, LEASE_S * 1.5 + BUSY_MACHINE_S)
        await timings_of(cluster.frontends[0].address)


@pytest.mark.fault_matrix
async def test_a_registry_that_comes_back_in_another_hour_knows_every_worker(cluster: ClockCluster) -> None:
    scenario = "kill of the registry, back an hour earlier"
    async with true_in_the_end(cluster, "registry-0"), under_load(cluster, scenario) as trace:
        before = await cluster.epochs()
        trace.fault_s = await kill(cluster.registries[0])
        await cluster.jump("registry-0", -HOUR_S)
        await cluster.restart("registry-0")
        await trace.answered(20)
        await assert_eventually(cluster.epochs, before.__eq__, within_s=LEASE_S + 5, what="the same starts")
    assert {asked.last_attempt for asked in trace.load.history.asked} == {1}, "a leg broke"
