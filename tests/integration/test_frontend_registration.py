"""The frontends' own places in the registry, and what workers say of themselves there."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest

import tandem
from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from tandem.api.types.v1 import worker_pb2
from tandem.client import calls
from tandem.domain.worker import LEG_CONTRACT, capabilities_digest
from tandem.local_cluster.cluster import LocalCluster
from tandem.rpc.channels import open_channel
from tandem.rpc.convert import worker_from_proto
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import SIMULATED, running
from tests.integration.support.calls import generate, request_of

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]


async def listed(cluster: LocalCluster) -> pb.ListResponse:
    async with open_channel(cluster.registry.address) as channel:
        stub: Any = RegistryServiceStub(channel)
        response: pb.ListResponse = await stub.List(pb.ListRequest(), timeout=5)
        return response


async def frontends(cluster: LocalCluster) -> dict[str, worker_pb2.Frontend]:
    return {entry.frontend.frontend_id: entry.frontend for entry in (await listed(cluster)).frontends}


async def test_a_frontend_is_listed_with_what_edges_need(tmp_path: Path) -> None:
    flags = {"frontend": {"frontend-id": "door", "advertise-host": "localhost"}}
    async with running(tmp_path, engine="simulated", worker_flags=SIMULATED, role_flags=flags) as cluster:
        known = await assert_eventually(lambda: frontends(cluster))
        door = known["door"]
        assert door.address == f"localhost:{cluster.frontend.address.rpartition(':')[2]}"
        assert (door.model, door.release) == ("tandem-demo", tandem.__version__)
        assert door.state == worker_pb2.WORKER_STATE_SERVING
        assert door.epoch > 0


async def test_workers_say_their_release_and_the_digest_of_what_they_can_do(simulated: LocalCluster) -> None:
    for entry in (await listed(simulated)).workers:
        worker = worker_from_proto(entry.worker)
        assert worker.release == tandem.__version__
        assert worker.leg_contract == LEG_CONTRACT
        assert worker.capabilities_digest == capabilities_digest(worker.capabilities)


async def test_a_frontend_that_drains_says_so_and_leaves_at_its_end(tmp_path: Path) -> None:
    slow = {"engine-extra": '{"decode_step_s": 0.02}'}
    async with running(tmp_path, engine="simulated", worker_flags=slow) as cluster:
        await assert_eventually(lambda: frontends(cluster))
        stream = asyncio.create_task(generate(cluster, request_of("Once", max_tokens=100)))
        await assert_eventually(
            lambda: calls.worker_load(cluster.process("decode-0").address), lambda load: load.open_legs
        )
        stopping = asyncio.create_task(cluster.frontend.stop())
        known = await assert_eventually(
            lambda: frontends(cluster),
            lambda known: [f.state for f in known.values()] == [worker_pb2.WORKER_STATE_DRAINING],
        )
        assert known
        assert len((await stream).token_ids) == 100
        assert await stopping == 0
        assert not await frontends(cluster), "it left by itself, long before its lease's end"


async def test_a_frontend_comes_back_to_a_registry_that_was_started_again(tmp_path: Path) -> None:
    async with running(tmp_path, engine="simulated", worker_flags=SIMULATED) as cluster:
        before = await assert_eventually(lambda: frontends(cluster))
        cluster.registry.kill()
        await cluster.registry.wait_ended()
        assert len((await generate(cluster, request_of("Once"))).token_ids) == 16
        await cluster.restart("registry")
        with contextlib.suppress(AssertionError):
            await assert_eventually(lambda: frontends(cluster), within_s=10)
        assert await frontends(cluster) == before
