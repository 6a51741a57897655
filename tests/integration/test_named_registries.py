"""A worker and a frontend that know a name in Consul's DNS and nothing else, among registries that come and go."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.cli.membership import registry_addresses
from tandem.client import calls
from tandem.local_cluster.child_process import ClusterProcess
from tandem.local_cluster.cluster import LocalCluster
from tandem.local_cluster.consul import ClusterConsul
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import SIMULATED, running
from tests.integration.support.calls import request_of

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(90)]

LEASE_S = 2.0


@contextlib.asynccontextmanager
async def named(cluster: LocalCluster, like: str, directory: Path, **flags: str) -> AsyncIterator[ClusterProcess]:
    """One more process like one of the cluster's, which finds its registry by name."""
    assert cluster.consul is not None
    model = cluster.process(like)
    registry = f"srv://registry.tandem.service.consul@{cluster.consul.dns}"
    process = ClusterProcess(f"{like}-named", model.role, {**model.flags, "registry": registry, **flags}, directory)
    await process.start(directory)
    try:
        await process.wait_ready()
        yield process
    finally:
        await process.stop()


async def finish_of(frontend: ClusterProcess) -> pb.GenerateFinish:
    events = [event async for event in calls.generate(frontend.address, request_of("Once"), 20)]
    return events[-1].finish


async def ids(registry: ClusterProcess) -> set[str]:
    return {entry.worker.worker_id for entry in await calls.list_workers(registry.address)}


async def test_they_move_to_a_registry_that_is_left(consul_binary: Path, tmp_path: Path) -> None:
    flags = {"registry": {"lease-ttl-s": str(LEASE_S)}}
    spec = {"engine": "simulated", "worker_flags": SIMULATED, "role_flags": flags}
    consul = ClusterConsul(binary=consul_binary)
    async with running(tmp_path, **spec, consul=consul, registries=2) as cluster:
        first, second = cluster.registries
        async with (
            named(cluster, "decode-0", tmp_path, **{"worker-id": "decode-named", "port": "0"}),
            named(cluster, "frontend", tmp_path, **{"frontend-id": "frontend-named", "port": "0"}) as frontend,
        ):
            assert (await finish_of(frontend)).usage.completion_tokens == 16
            assert cluster.consul is not None
            found = await registry_addresses(f"srv://registry.tandem.service.consul@{cluster.consul.dns}")
            assert set(found) == {first.address, second.address}
            await assert_eventually(lambda: ids(second), lambda known: "decode-named" in known)
            for gone, left in ((first, second), (second, first)):
                gone.signal(signal.SIGKILL)
                await gone.wait_ended()
                # Longer than a lease lives that no registry keeps, and than Consul takes to see which servers are left.
                await asyncio.sleep(2 * LEASE_S)
                await assert_eventually(partial(ids, left), lambda known: "decode-named" in known, within_s=10)
                assert (await finish_of(frontend)).usage.completion_tokens == 16
                await cluster.restart(gone.name)
