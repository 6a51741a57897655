"""A local cluster over an agent of its own: certificates everywhere, restarts at the same place with the same data."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.api.registry.v1 import registry_service_pb2 as registry_pb
from tandem.client import calls
from tandem.local_cluster.consul import ClusterConsul
from tandem.testing.eventually import assert_eventually
from tandem.tls.authority import issue_all
from tandem.tls.paths import client_tls
from tests.integration.conftest import SIMULATED, running
from tests.integration.support.calls import generate, request_of

pytestmark = pytest.mark.timeout(120)


async def test_with_certificates_the_agent_wants_one_and_shows_its_own(consul_binary: Path, tmp_path: Path) -> None:
    issue_all(tmp_path / "certs")
    tls = client_tls(tmp_path / "certs")
    own = {"consul": ClusterConsul(binary=consul_binary), "tls": tmp_path / "certs"}
    async with running(tmp_path / "logs", engine="simulated", worker_flags=SIMULATED, **own) as cluster:
        assert cluster.consul is not None
        assert cluster.consul.access.url.startswith("https://")

        async def checks() -> set[str]:
            found = await cluster.consul.access.get("/v1/agent/checks")  # type: ignore[union-attr]
            return {check["Output"].rpartition(": ")[2] for check in found.values()}

        # A check that has been made has an output; until then an entry was only said to pass.
        await assert_eventually(checks, lambda found: found == {"success"}, within_s=30, what="checks that were made")
        listed = await calls.list_members(cluster.registry.address, tls=tls)
        assert {entry.health for entry in listed.workers} == {registry_pb.LISTED_HEALTH_PASSING}


async def test_registry_and_consul_come_back_at_their_places(consul_binary: Path, tmp_path: Path) -> None:
    own = {"consul": ClusterConsul(binary=consul_binary), "registries": 2}
    async with running(tmp_path, engine="simulated", worker_flags=SIMULATED, **own) as cluster:
        assert cluster.consul is not None
        before = await calls.list_members(cluster.registry.address)
        for process in (cluster.consul, cluster.registries[0], cluster.consul):
            address = process.address
            process.kill()
            await process.wait_ended()
            stream = await generate(cluster, request_of("Once upon a time"))
            assert stream.finish.usage.completion_tokens > 0
            await cluster.restart(process.name)
            assert process.address == address

        async def views() -> list[tuple[str, registry_pb.ViewSource.ValueType, int]]:
            listed = [await calls.list_members(registry.address) for registry in cluster.registries]
            return [(one.registry_id, one.source, len(one.workers)) for one in listed]

        # The same life of Consul's data: it came back with them.
        live = (before.registry_id, registry_pb.VIEW_SOURCE_LIVE, 2)
        await assert_eventually(views, lambda found: found == [live, live], within_s=30, what="the same view as before")

        async def entered() -> list[str]:
            services = (await cluster.consul.access.get("/v1/agent/services")).values()  # type: ignore[union-attr]
            return sorted(f"{one['Address']}:{one['Port']}" for one in services if "registry" in one["Tags"])

        # A killed registry's entry would pass its check for ever, because the one that was started again answers it.
        own_addresses = sorted(registry.address for registry in cluster.registries)
        await assert_eventually(entered, lambda found: found == own_addresses, within_s=15, what="one entry each")
