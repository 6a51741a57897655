"""Roles that change under load, on simulated engines: no request fails, every token is right, no page is left."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import role_change_pb2
from tandem.client import calls
from tandem.client.role_calls import change_role
from tandem.domain.checkpoint import read_checkpoint
from tandem.domain.worker import WorkerRole
from tandem.engine.simulated.tokens import expected_tokens, read_vocabulary
from tandem.errors import InvalidRequest, RoleChangeRefused, StaleEpoch, WorkerNotFound
from tandem.local_cluster.cluster import LocalCluster
from tandem.local_cluster.consul import ClusterConsul
from tandem.rpc.convert import worker_from_proto
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import DEMO_MODEL, running
from tests.integration.support.calls import generate, request_of
from tests.integration.support.command_line import TANDEM, cluster_up, run, state_of
from tests.integration.support.role_changes import (
    AGGREGATED,
    DECODE,
    PREFILL,
    assert_pages_free,
    assert_serves,
    change,
    exact_load,
    workers_of,
)

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]

TOKENIZER = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
VOCABULARY = read_vocabulary(read_checkpoint(DEMO_MODEL))
OPTIONS = json.dumps({"decode_step_s": 0.004})
CLIENTS = 6
IN_PLACE_S_MAX = 5.0


def asks(number: int) -> Iterator[tuple[pb.GenerateRequest, list[int]]]:
    """Short and long answers in turn: the long ones are open when a change begins."""
    for turn in itertools.count():
        prompt, count = f"Once {number} and {turn}", 100 if turn % 3 else 8
        yield request_of(prompt, max_tokens=count), expected_tokens(VOCABULARY, TOKENIZER.encode(prompt).ids, count)


@pytest_asyncio.fixture(loop_scope="session")
async def fleet(tmp_path: Path) -> AsyncIterator[LocalCluster]:
    flags = {"engine-extra": OPTIONS}
    async with running(tmp_path, engine="simulated", prefill=2, decode=2, worker_flags=flags) as cluster:
        yield cluster


async def turn(cluster: LocalCluster, worker_id: str, role: WorkerRole, *, in_place: bool) -> None:
    before = (await workers_of(cluster))[worker_id]
    # The way back from aggregated leaves no worker of that role.
    done = await change(cluster, worker_id, role, force=before.role is AGGREGATED)
    assert done.in_place is in_place
    if in_place:
        assert done.switch_time.ToNanoseconds() / 1e9 < IN_PLACE_S_MAX
    await assert_serves(cluster, before, role, done.worker)


@pytest.mark.parametrize(
    "path",
    [
        [("prefill-1", DECODE, True), ("prefill-1", PREFILL, True)],
        [("decode-1", PREFILL, True), ("decode-1", DECODE, True)],
        [("prefill-1", AGGREGATED, False), ("prefill-1", PREFILL, False)],
    ],
    ids=["prefill-decode-prefill", "decode-prefill-decode", "prefill-aggregated-prefill"],
)
async def test_a_role_changes_there_and_back_under_load_without_a_failure(
    fleet: LocalCluster, path: list[tuple[str, WorkerRole, bool]]
) -> None:
    pids = [process.pid for process in fleet.workers]
    async with exact_load(fleet, CLIENTS, asks) as load:
        for worker_id, role, in_place in path:
            await turn(fleet, worker_id, role, in_place=in_place)
            await load.wait_served_by((await workers_of(fleet))[worker_id])
    assert [process.pid for process in fleet.workers] == pids
    await assert_pages_free(fleet)


async def test_legs_that_outlive_the_drain_continue_on_another_worker(fleet: LocalCluster) -> None:
    prompt, count = "Once upon a time", 600
    expected = expected_tokens(VOCABULARY, TOKENIZER.encode(prompt).ids, count)
    waiting = [asyncio.create_task(generate(fleet, request_of(prompt, max_tokens=count))) for _ in range(4)]
    address = (await workers_of(fleet))["decode-1"].address

    async def open_legs() -> int:
        return (await calls.worker_load(address)).open_legs

    await assert_eventually(open_legs, lambda count: count > 0, within_s=20, what="legs of decode-1")
    await change(fleet, "decode-1", PREFILL, drain_timeout_s=0)
    streams = await asyncio.gather(*waiting)
    assert [stream.token_ids for stream in streams] == [expected] * 4
    assert {stream.finish.route.decode_worker_id for stream in streams} == {"decode-0"}
    assert any(stream.finish.route.attempt > 1 for stream in streams), "none was cut"
    await assert_pages_free(fleet)


async def test_the_last_worker_of_a_role_keeps_it_unless_forced(fleet: LocalCluster) -> None:
    await change(fleet, "prefill-1", DECODE)
    before = await workers_of(fleet)
    with pytest.raises(RoleChangeRefused, match="no other prefill worker of model tandem-demo is serving"):
        await change(fleet, "prefill-0", AGGREGATED)
    assert await workers_of(fleet) == before
    done = await change(fleet, "prefill-0", AGGREGATED, force=True)
    await assert_serves(fleet, before["prefill-0"], AGGREGATED, done.worker)


async def test_two_changes_at_once_never_leave_a_role_without_a_worker(fleet: LocalCluster) -> None:
    results = await asyncio.gather(
        *(change(fleet, f"prefill-{number}", DECODE) for number in range(2)), return_exceptions=True
    )
    assert [type(result) for result in results if isinstance(result, Exception)] == [RoleChangeRefused]
    assert [worker.role for worker in (await workers_of(fleet)).values()].count(PREFILL) == 1


async def test_a_second_change_of_a_worker_is_refused_and_changes_nothing(fleet: LocalCluster) -> None:
    async with exact_load(fleet, CLIENTS, asks):
        first = change_role(fleet.registry.address, "decode-1", PREFILL)
        step = await anext(first)
        assert step.stage == role_change_pb2.ROLE_CHANGE_STAGE_DRAINING
        with pytest.raises(RoleChangeRefused, match="it is changing to role prefill now"):
            await change(fleet, "decode-1", AGGREGATED, force=True)
        *_, last = [step async for step in first]
    assert last.worker.epoch == (await workers_of(fleet))["decode-1"].epoch


async def test_bad_input_is_refused_by_name_and_changes_nothing(fleet: LocalCluster) -> None:
    before = await workers_of(fleet)
    registry = fleet.registry.address
    with pytest.raises(RoleChangeRefused, match="it has that role"):
        await change(fleet, "decode-1", DECODE)
    with pytest.raises(WorkerNotFound, match="'decode-7'"):
        await change(fleet, "decode-7", PREFILL)
    with pytest.raises(StaleEpoch, match="its epoch is"):
        await anext(change_role(registry, "decode-1", PREFILL, epoch=before["decode-1"].epoch - 1))
    with pytest.raises(InvalidRequest, match="drain_timeout"):
        await change(fleet, "decode-1", PREFILL, drain_timeout_s=-1)
    assert await workers_of(fleet) == before


async def test_a_registry_that_does_not_keep_the_lease_changes_a_role_over_consul(
    tmp_path: Path, consul_binary: Path
) -> None:
    flags = {"engine-extra": OPTIONS}
    spec = {"engine": "simulated", "decode": 2, "registries": 2, "consul": ClusterConsul(binary=consul_binary)}
    async with running(tmp_path, worker_flags=flags, **spec) as cluster, exact_load(cluster, CLIENTS, asks) as load:
        for registry, role in zip((*cluster.registries,) * 2, (PREFILL, DECODE) * 2, strict=True):
            before = (await workers_of(cluster))["decode-1"]
            steps = change_role(registry.address, "decode-1", role)
            *_, done = [step async for step in steps]
            await load.wait_served_by(worker_from_proto(done.worker))
            assert done.worker.epoch > before.epoch


async def test_the_command_changes_a_role_and_names_what_is_wrong(state: Path) -> None:
    options = ("--no-edge", "--prefill", "1", "--decode", "2", "--engine-extra", OPTIONS)
    async with cluster_up(state, *options):
        status, out, err = await run(*TANDEM, "role", "decode-1", "aggregated", state=state)
        assert (status, err) == (0, ""), err
        lines = out.splitlines()
        assert lines[0] == "decode-1: draining, 0 open legs"
        assert lines[-1].startswith("decode-1: has role aggregated, epoch ")
        status, out, err = await run(*TANDEM, "role", "decode-0", "prefill", state=state)
        assert (status, out) == (1, "")
        assert "no other decode worker of model tandem-demo is serving; force changes it all the same" in err
        status, out, err = await run(*TANDEM, "role", "decode-0", "planner", state=state)
        assert (status, out) == (2, "")
        assert err == "tandem role: ROLE: must be prefill, decode, aggregated, not 'planner'\n"
        status, out, err = await run(*TANDEM, "role", "decode-7", "prefill", state=state)
        assert (status, out) == (1, "")
        assert "no worker decode-7 is registered (registered: decode-0, decode-1, prefill-0)" in err
        roles = {e.worker.worker_id: e.worker.role for e in await calls.list_workers(state_of(state)["registry"])}
        assert len(roles) == 3
