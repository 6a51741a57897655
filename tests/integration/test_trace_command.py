"""`tandem trace` and the calls behind it, on a cluster of simulated engines, without any collector."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio

from tandem.api.admin.v1 import admin_service_pb2 as pb
from tandem.api.admin.v1.admin_service_pb2_grpc import FrontendAdminServiceStub
from tandem.client import admin_calls, calls
from tandem.errors import AdminDisabled, InvalidRequest, NotSupported, RequestNotFound
from tandem.local_cluster.cluster import LocalCluster
from tandem.rpc.channels import open_channel
from tests.integration.conftest import running
from tests.integration.support.calls import generate, request_of
from tests.integration.support.command_line import TANDEM, run
from tests.integration.support.edge_host import client_of

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

SLOW = {"engine-extra": '{"decode_step_s": 0.01}'}
KEPT = 20


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    flags = {"frontend": {"admin-enabled": "true", "timelines-kept": str(KEPT)}}
    logs = tmp_path_factory.mktemp("trace")
    many = {"decode": 2, "frontends": 2, "edge": True}
    async with running(logs, engine="simulated", worker_flags=SLOW, role_flags=flags, **many) as started:
        yield started


async def traced(cluster: LocalCluster, tmp_path: Path, *arguments: str) -> tuple[int | None, str, str]:
    return await run(*TANDEM, "trace", *arguments, state=tmp_path / "none.json")


async def test_both_attempts_of_a_stream_whose_worker_was_killed(cluster: LocalCluster, tmp_path: Path) -> None:
    request = request_of("Once upon a time", max_tokens=120)
    request.request_id = "killed-in-mid-stream"
    address, registry = cluster.frontend.address, cluster.registry.address
    token_count, killed = 0, ""
    async with contextlib.aclosing(calls.generate(address, request, 60)) as events:
        async for event in events:
            if event.HasField("accepted"):
                killed = event.accepted.route.decode_worker_id
            token_count += len(event.chunk.token_ids)
            if token_count == 20:
                (still_open,) = await admin_calls.request_timelines(address, request.request_id)
                cluster.process(killed).signal(signal.SIGKILL)
                await cluster.process(killed).wait_ended()
    assert token_count == 120
    assert still_open.outcome == pb.REQUEST_OUTCOME_OPEN
    assert still_open.completion_tokens >= 20
    assert not still_open.attempts[0].HasField("end")

    status, out, err = await traced(cluster, tmp_path, request.request_id, "--address", registry, "--json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert document["frontend_id"] == "frontend-0"
    first, second = document["timeline"]["attempts"]
    assert first["failure"] == {
        "leg": "WORKER_ROLE_DECODE",
        "worker_id": killed,
        "phase": "decoding",
        "reason": "ERROR_REASON_UNAVAILABLE",
    }
    assert first["decode"]["worker_id"] == killed
    assert second["decode"]["worker_id"] == next(n for n in ("decode-0", "decode-1") if n != killed)
    assert int(second["tokens_before"]) >= 20
    assert first["bootstrap_room"] != second["bootstrap_room"]
    assert int(second["prefill"]["timings"]["kv_transfer_bytes"]) > 0
    assert document["timeline"]["usage"]["completion_tokens"] == 120

    status, out, err = await traced(cluster, tmp_path, request.request_id, "--address", registry)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "request killed-in-mid-stream · finished: length"
    order = [
        next(n for n, line in enumerate(lines) if words in line)
        for words in (
            "attempt 1",
            f"decode leg on {killed} failed in phase decoding: UNAVAILABLE",
            "attempt 2, continues",
        )
    ]
    assert order == sorted(order)
    assert "Once upon" not in out

    stats = await admin_calls.frontend_figures(address)
    assert stats.continuations >= 1
    assert killed in {broken.worker_id for broken in stats.leg_failures}
    await cluster.restart(killed)


async def test_an_answer_over_http_is_found_by_its_header(cluster: LocalCluster, tmp_path: Path) -> None:
    assert cluster.edge is not None
    body = {"model": "tandem-demo", "messages": [{"role": "user", "content": "Hi"}], "n": 2, "max_tokens": 3}
    async with client_of(cluster.edge) as client:
        answer = await client.post("/v1/chat/completions", json=body)
    call_id = answer.headers["x-request-id"]
    status, out, err = await traced(cluster, tmp_path, call_id, "--address", cluster.registry.address, "--json")
    assert (status, err) == (0, "")
    timelines = [json.loads(line)["timeline"] for line in out.splitlines()]
    assert [timeline["call_id"] for timeline in timelines] == [call_id, call_id]
    assert len({timeline["request_id"] for timeline in timelines}) == 2
    assert {timeline["operation"] for timeline in timelines} == {"chat"}
    assert not any("Hi" in json.dumps(timeline) for timeline in timelines)


async def test_an_unknown_request_gives_one_sentence(cluster: LocalCluster, tmp_path: Path) -> None:
    registry, worker = cluster.registry.address, cluster.process("prefill-0").address
    for arguments, words in (
        (
            ["nope", "--address", registry],
            "request nope not found on frontend-0, frontend-1 (each keeps the timelines of",
        ),
        (["nope", "--frontend", worker], f"{worker} is not a Tandem frontend: it has no admin service"),
        (["x" * 129, "--address", registry], "request_id: must be 1 to 128 characters long"),
    ):
        status, out, err = await traced(cluster, tmp_path, *arguments)
        assert (status, out) == (1, "")
        assert words in err
        assert len(err.strip().splitlines()) == 1
    with pytest.raises(RequestNotFound) as unknown:
        await admin_calls.request_timelines(cluster.frontend.address, "nope")
    assert unknown.value.metadata == {"request_id": "nope"}


async def test_pages_of_requests_newest_first_and_bounded(cluster: LocalCluster) -> None:
    address = cluster.frontend.address
    for _ in range(KEPT + 5):
        await generate(cluster, request_of("Once", max_tokens=1))
    seen: list[Any] = []
    request = pb.ListRequestsRequest(page_size=7)
    while True:
        page = await admin_calls.list_requests(address, request)
        assert len(page.requests) <= 7
        seen += page.requests
        if not page.next_page_token:
            break
        # What comes meanwhile does not move the pages.
        await generate(cluster, request_of("Once", max_tokens=1))
        request.page_token = page.next_page_token
    begins = [summary.begin_time.ToNanoseconds() for summary in seen]
    assert begins == sorted(begins, reverse=True)
    assert len({summary.request_id for summary in seen}) == len(seen)
    assert KEPT - 3 <= len(seen) <= KEPT
    assert all(s.outcome == pb.REQUEST_OUTCOME_FINISHED and s.attempts == 1 for s in seen)
    assert not (await admin_calls.list_requests(address, pb.ListRequestsRequest(open_only=True))).requests
    wrong = (
        (pb.ListRequestsRequest(page_size=0), "page_size"),
        (pb.ListRequestsRequest(page_size=1_001), "page_size"),
        (pb.ListRequestsRequest(page_token="x"), "page_token"),
    )
    for request, field in wrong:
        with pytest.raises(InvalidRequest) as refusal:
            await admin_calls.list_requests(address, request)
        assert refusal.value.field == field


async def test_figures_come_at_the_interval_asked_for(cluster: LocalCluster) -> None:
    async with open_channel(cluster.frontend.address) as channel:
        stub: Any = FrontendAdminServiceStub(channel)
        call = stub.WatchFigures(pb.WatchFiguresRequest(interval_ms=100))
        first = await call.read()
        await generate(cluster, request_of("Once", max_tokens=30))
        messages = [await call.read() for _ in range(5)]
        call.cancel()
        assert [message.sequence for message in messages] == [2, 3, 4, 5, 6]
        assert messages[-1].finished_requests == first.finished_requests + 1
        assert messages[-1].completion_tokens == first.completion_tokens + 30
        assert messages[-1].kv_transfer_bytes > first.kv_transfer_bytes
        assert messages[-1].time_to_first_token.count > first.time_to_first_token.count
        assert messages[-1].inter_token_latency.p50.ToMilliseconds() >= 9
        for interval_ms in (99, 60_001):
            refused = stub.WatchFigures(pb.WatchFiguresRequest(interval_ms=interval_ms))
            assert await refused.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_edge_has_no_way_to_it(cluster: LocalCluster) -> None:
    """Neither as gRPC nor as a path; the frontend itself answers the same call."""
    assert cluster.edge is not None
    await admin_calls.list_requests(cluster.frontend.address, pb.ListRequestsRequest())
    with pytest.raises(NotSupported):
        await admin_calls.list_requests(cluster.edge.address, pb.ListRequestsRequest())
    with pytest.raises(NotSupported):
        async for _ in admin_calls.capture_profile(cluster.edge.address, pb.CaptureProfileRequest()):
            pass
    async with client_of(cluster.edge) as client:
        for service in ("FrontendAdminService/ListRequests", "ProfileService/CaptureProfile"):
            answer: httpx.Response = await client.post(f"/tandem.api.admin.v1.{service}", json={})
            assert answer.status_code == 404


async def test_a_profile_needs_the_setting(cluster: LocalCluster, tmp_path: Path) -> None:
    registry = cluster.registry.address
    (_, _, err), (status, out, _) = await asyncio.gather(
        run(*TANDEM, "profile", "prefill-0", "--address", registry, state=tmp_path / "none.json"),
        run(
            *TANDEM, "profile", "frontend-1", "--seconds", "0.5", "--address", registry, "--out", str(tmp_path),
            state=tmp_path / "none.json",
        ),
    )  # fmt: skip
    assert "start the process with admin_enabled, or the cluster with `tandem up --admin` (ADMIN_DISABLED)" in err
    assert status == 0
    file = tmp_path / "frontend-1-profile.speedscope.json"
    assert out == f"{file} ({file.stat().st_size:,} bytes)\n"
    frames = json.loads(file.read_text())["shared"]["frames"]
    loop = [frame for frame in frames if frame["name"] == "run" and frame["file"].endswith("asyncio/runners.py")]
    assert loop, "an idle process is in its event loop"
    with pytest.raises(AdminDisabled):
        async for _ in admin_calls.capture_profile(
            cluster.process("decode-0").address, pb.CaptureProfileRequest(duration_ms=100)
        ):
            pass
