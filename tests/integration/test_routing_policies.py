"""Routing policies on a cluster of simulated engines: load, sessions, and the policy that a finish names."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.rpc.channels import open_channel
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import DEMO_MODEL, SIMULATED, running
from tests.integration.support.calls import request_of

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

PROMPT = "Once upon a time there was a fox, " * 12


async def routed(cluster: LocalCluster, count: int, *metadata: tuple[str, str]) -> list[pb.Route]:
    """Routes of requests made one after the other."""
    routes = []
    async with open_channel(cluster.frontend.address) as channel:
        stub = InferenceServiceStub(channel)
        for _ in range(count):
            request = pb.GenerateUnaryRequest(generate=request_of(PROMPT, max_tokens=2))
            answer = await stub.GenerateUnary(request, metadata=metadata or None)
            routes.append(answer.finish.route)
    return routes


async def test_prompts_go_by_themselves_where_they_are_cached(tmp_path: Path) -> None:
    """No policy is set: the workers publish their caches."""
    async with running(tmp_path, engine="simulated", prefill=3, decode=2, worker_flags=SIMULATED) as cluster:

        async def cached_tokens() -> int:
            (route,) = await routed(cluster, 1)
            assert route.policy == "prefix"
            return route.expected_cached_tokens

        # The events of the first prompt need a moment.
        await assert_eventually(cached_tokens, lambda count: count > 0, within_s=10, what="a prompt that is cached")
        routes = await routed(cluster, 6)
    assert len({route.prefill_worker_id for route in routes}) == 1
    assert all(route.expected_cached_tokens for route in routes)


async def test_prompts_go_by_themselves_by_load_where_no_cache_is_published(tmp_path: Path) -> None:
    """No policy is set either."""
    spec = ClusterSpec(
        model=DEMO_MODEL,
        log_directory=tmp_path,
        engine="simulated",
        prefill=2,
        worker_flags={**SIMULATED, "kv-events": "false"},
    )
    cluster = LocalCluster(spec)
    slow = {"prefill_step_s": 0.3, "decode_step_s": 0.004}
    cluster.process("prefill-0").flags["engine-extra"] = json.dumps(slow)
    async with cluster:
        # Until both have been measured.
        seen = await routed(cluster, 6)
        assert {route.policy for route in seen} == {"least_work"}
        assert {route.prefill_worker_id for route in seen} == {"prefill-0", "prefill-1"}
        later = Counter(route.prefill_worker_id for route in await routed(cluster, 10))
        assert later["prefill-1"] >= 9


async def test_a_session_sticks_and_moves_when_its_worker_dies(tmp_path: Path) -> None:
    flags = {"frontend": {"routing-policy": "session", "session-header": "x-chat"}}
    async with running(
        tmp_path, engine="simulated", prefill=3, decode=2, worker_flags=SIMULATED, role_flags=flags
    ) as cluster:
        sessions = [await routed(cluster, 4, ("x-chat", str(number))) for number in range(8)]
        for routes in sessions:
            assert {route.policy for route in routes} == {"session"}
            assert len({(route.prefill_worker_id, route.decode_worker_id) for route in routes}) == 1
        assert len({routes[0].prefill_worker_id for routes in sessions}) > 1
        gone = sessions[0][0].prefill_worker_id
        killed = cluster.process(gone)
        killed.signal(signal.SIGKILL)
        await killed.wait_ended()
        for number, (route, *_) in enumerate(sessions):
            now = (await routed(cluster, 1, ("x-chat", str(number))))[0]
            assert now.prefill_worker_id != gone
            if route.prefill_worker_id != gone:
                assert now.prefill_worker_id == route.prefill_worker_id


async def test_the_edge_passes_the_session_of_an_http_client(tmp_path: Path) -> None:
    flags = {"frontend": {"routing-policy": "session"}}
    async with running(
        tmp_path, engine="simulated", prefill=3, edge=True, worker_flags=SIMULATED, role_flags=flags
    ) as cluster:
        assert cluster.edge is not None
        url = f"http://{cluster.edge.address}/v1/generate"
        async with httpx.AsyncClient() as client:
            for session in map(str, range(6)):
                (expected,) = await routed(cluster, 1, ("x-session-id", session))
                answer = await client.post(
                    url, json={"prompt": PROMPT, "stopping": {"max_tokens": 2}}, headers={"x-session-id": session}
                )
                assert expected.prefill_worker_id in answer.text
