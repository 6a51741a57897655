"""Frontends that know no worker: they live, edges send them nothing, and the first worker makes them ready."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tandem.api.admin.v1 import admin_service_pb2 as pb
from tandem.client import admin_calls, calls
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.rpc.process_servicer import SERVICE_NAME as PROCESS_SERVICE_NAME
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import DEMO_MODEL

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

BODY = {"prompt": "Once", "stopping": {"max_tokens": 3}}


def spec(logs: Path, **more: Any) -> ClusterSpec:
    edge = {"edge": {"health-interval-s": "0.1"}}
    return ClusterSpec(
        model=DEMO_MODEL, log_directory=logs, engine="simulated", frontends=2, edge=True, role_flags=edge, **more
    )


async def test_an_edge_is_ready_with_the_first_worker_and_not_before(tmp_path: Path) -> None:
    workers = LocalCluster(spec(tmp_path)).workers
    async with LocalCluster(spec(tmp_path, prefill=0, decode=0)) as cluster:
        for frontend in cluster.frontends:
            assert not await calls.is_serving(frontend.address)
            assert await calls.is_serving(frontend.address, PROCESS_SERVICE_NAME)
        assert cluster.edge is not None
        async with httpx.AsyncClient(base_url=f"http://{cluster.edge.address}", timeout=10) as client:

            async def status(path: str) -> int:
                sent = client.get(path) if path == "/healthz" else client.post(path, json=BODY)
                return (await sent).status_code

            assert await status("/healthz") == 503
            assert await status("/v1/generate:unary") == 503
            try:
                for worker in workers:
                    worker.flags["registry"] = cluster.registry.address
                    await worker.start(tmp_path)
                    await worker.wait_ready()
                await assert_eventually(lambda: status("/healthz"), lambda code: code == 200, within_s=10)
                assert await status("/v1/generate:unary") == 200
                # The fleet scales to zero, which the registry lists.
                assert [await worker.stop() for worker in workers] == [0, 0]
                await assert_eventually(lambda: status("/healthz"), lambda code: code == 503, within_s=10)
                assert await calls.is_serving(cluster.frontend.address, PROCESS_SERVICE_NAME)
            finally:
                for worker in workers:
                    worker.kill()
                    await worker.stop()


async def test_an_edge_sends_nothing_to_a_frontend_that_knows_no_worker(tmp_path: Path) -> None:
    cluster = LocalCluster(spec(tmp_path))
    ready, other = cluster.frontends
    # The workers are of another model than this frontend's.
    other.flags["model-name"] = "other"
    async with cluster:
        assert await calls.is_serving(ready.address)
        assert not await calls.is_serving(other.address)
        assert cluster.edge is not None
        async with httpx.AsyncClient(base_url=f"http://{cluster.edge.address}", timeout=10) as client:
            for _ in range(20):
                assert (await client.post("/v1/generate:unary", json=BODY)).status_code == 200
        assert await served(ready.address) == 20
        assert await served(other.address) == 0


async def served(frontend: str) -> int:
    """Requests that a frontend has had."""
    return len((await admin_calls.list_requests(frontend, pb.ListRequestsRequest(page_size=100))).requests)
