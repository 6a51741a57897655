"""Frontends that know no worker: they live, edges send them nothing, and the first worker makes them ready."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tandem.client import calls
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
