"""Traces of a cluster of processes with a real Envoy, as a real OTLP receiver gets them; engines are simulated."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.errors import TandemError
from tandem.local_cluster.cluster import LocalCluster
from tandem.rpc.channels import open_channel
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import SIMULATED, running
from tests.integration.support.calls import generate, request_of
from tests.integration.support.otlp_receiver import Received, Receiver, receiver

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]

STORY = "Once upon a time there was a fox"
FRONTEND_STEPS = ("admit", "tokenise", "wait", "route", "attempt", "finish")
PREFILL_STEPS = ("submit", "bootstrap", "queue", "prefill", "transfer")
DECODE_STEPS = ("submit", "pre-allocate", "wait for KV", "first token", "stream")
ALL = (
    "generate",
    *FRONTEND_STEPS,
    "dispatch",
    "await first token",
    "prefill leg",
    *PREFILL_STEPS,
    "decode leg",
    *DECODE_STEPS,
)
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def collector() -> AsyncIterator[Receiver]:
    async with receiver() as kept:
        yield kept


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(collector: Receiver, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    spec: dict[str, Any] = {"engine": "simulated", "decode": 2, "edge": True, "worker_flags": SIMULATED}
    async with running(tmp_path_factory.mktemp("traces"), otlp_endpoint=collector.address, **spec) as cluster:
        yield cluster


def one(spans: Iterable[Received], name: str, parent: Received | None = None) -> Received:
    found = [s for s in spans if s.name == name and (parent is None or s.parent_id == parent.span_id)]
    assert len(found) == 1, [(s.name, s.parent_id) for s in spans]
    return found[0]


async def call(cluster: LocalCluster, request: pb.GenerateRequest, *metadata: tuple[str, str]) -> None:
    async with open_channel(cluster.frontend.address) as channel:
        stub: Any = InferenceServiceStub(channel)
        async for _ in stub.Generate(request, metadata=metadata):
            pass


async def test_a_request_is_one_tree(cluster: LocalCluster, collector: Receiver) -> None:
    stream = await generate(cluster, request_of(STORY, max_tokens=8))
    route = stream.finish.route
    spans = await collector.trace(stream.accepted.request_id, *ALL)
    root = one(spans, "generate")
    assert root.parent_id == ""
    assert {span.trace_id for span in spans} == {root.trace_id}
    for name in FRONTEND_STEPS:
        assert one(spans, name, root).service == "tandem-frontend"
    attempt = one(spans, "attempt", root)
    one(spans, "dispatch", attempt)
    one(spans, "await first token", attempt)
    legs = {role: one(spans, f"{role} leg", attempt) for role in ("prefill", "decode")}
    assert (legs["prefill"].service, legs["prefill"].instance) == ("tandem-prefill", route.prefill_worker_id)
    assert (legs["decode"].service, legs["decode"].instance) == ("tandem-decode", route.decode_worker_id)
    for role, steps in (("prefill", PREFILL_STEPS), ("decode", DECODE_STEPS)):
        begins = [one(spans, name, legs[role]).begin_s for name in steps]
        assert begins == sorted(begins), role
    assert len(spans) == len(ALL)


async def test_spans_say_who_where_and_which(cluster: LocalCluster, collector: Receiver) -> None:
    stream = await generate(cluster, request_of(STORY, max_tokens=8))
    spans = await collector.trace(stream.accepted.request_id, *ALL)
    finish = stream.finish
    root, attempt, route = one(spans, "generate").attributes, one(spans, "attempt").attributes, one(spans, "route")
    assert root["gen_ai.usage.input_tokens"] == stream.accepted.prompt_tokens
    assert root["gen_ai.usage.output_tokens"] == 8
    assert root["gen_ai.response.finish_reasons"] == ["length"]
    assert root["tandem.kv_transfer_bytes"] == finish.timings.kv_transfer_bytes
    assert root["tandem.ttft_s"] == pytest.approx(finish.timings.time_to_first_token.ToNanoseconds() / 1e9, abs=1e-6)
    assert attempt["tandem.room"] == finish.route.bootstrap_room
    assert attempt["tandem.prefill_worker"] == finish.route.prefill_worker_id
    assert route.attributes["tandem.candidates_count"] == 2
    assert f"{finish.route.policy} among 2 of 2" in route.attributes["tandem.why"]
    assert route.attributes["tandem.policy"] == finish.route.policy == "prefix"
    assert route.attributes["tandem.cached_tokens"] == finish.usage.cached_tokens
    for role in ("prefill", "decode"):
        leg = one(spans, f"{role} leg").attributes
        assert leg["tandem.request_id"] == stream.accepted.request_id
        assert (leg["tandem.attempt"], leg["tandem.room"]) == (1, finish.route.bootstrap_room)
        assert leg["tandem.worker_epoch"] == attempt[f"tandem.{role}_epoch"] > 0
        assert leg["tandem.kv_transfer_bytes"] == finish.timings.kv_transfer_bytes
    assert one(spans, "transfer").attributes["tandem.kv_transfer_bytes"] == finish.timings.kv_transfer_bytes


async def test_no_prompt_is_in_any_span(cluster: LocalCluster, collector: Receiver) -> None:
    stream = await generate(cluster, request_of("Zebedee keeps a secret", max_tokens=4))
    spans = await collector.trace(stream.accepted.request_id, *ALL)
    assert "Zebedee" not in "".join(str(span.span) for span in spans)


async def test_a_callers_span_is_the_parent(cluster: LocalCluster, collector: Receiver) -> None:
    request = request_of(STORY, max_tokens=4)
    request.request_id = "with-a-parent"
    await call(cluster, request, ("traceparent", f"00-{TRACE}-{SPAN}-01"), ("tracestate", "vendor=1"))
    spans = await collector.trace("with-a-parent", *ALL)
    root = one(spans, "generate")
    assert (root.trace_id, root.parent_id, root.span.trace_state) == (TRACE, SPAN, "vendor=1")


async def test_what_the_caller_does_not_sample_is_not_exported(cluster: LocalCluster, collector: Receiver) -> None:
    request = request_of(STORY, max_tokens=4)
    request.request_id = "not-sampled"
    await call(cluster, request, ("traceparent", f"00-{TRACE[::-1]}-{SPAN}-00"))
    stream = await generate(cluster, request_of(STORY, max_tokens=4))
    await collector.trace(stream.accepted.request_id, *ALL)
    assert not [s for s in collector.spans if s.trace_id == TRACE[::-1]]


async def test_envoys_span_is_the_frontends_parent(cluster: LocalCluster, collector: Receiver) -> None:
    assert cluster.edge is not None
    body = {"prompt": STORY, "max_tokens": 4, "temperature": 0, "model": "tandem-demo"}
    async with httpx.AsyncClient(base_url=f"http://{cluster.edge.address}") as client:
        response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text

    def edges() -> list[Received]:
        return [span for span in collector.spans if span.service == "tandem-edge"]

    await assert_eventually(edges, within_s=15, what="a span of Envoy's")
    edge = edges()[-1]
    (root,) = await assert_eventually(
        lambda: [s for s in collector.spans if s.trace_id == edge.trace_id and s.name == "text_completion"],
        within_s=15,
        what="the frontend's span",
    )
    assert root.parent_id == edge.span_id
    assert edge.begin_s <= root.begin_s <= root.end_s <= edge.end_s + 0.002
    steps = [s.name for s in sorted(collector.spans, key=lambda s: s.begin_s) if s.parent_id == root.span_id]
    assert steps[:4] == ["tokenise", "admit", "validate", "wait"], "OpenAI's door tokenises before it asks for a place"


async def test_envoys_span_contains_no_query(cluster: LocalCluster, collector: Receiver) -> None:
    assert cluster.edge is not None
    async with httpx.AsyncClient(base_url=f"http://{cluster.edge.address}") as client:
        await client.get("/v1/models?token=hush")
    edges = await assert_eventually(
        lambda: [s for s in collector.spans if s.service == "tandem-edge" and "/v1/models" in str(s.span)],
        within_s=15,
        what="a span of Envoy's",
    )
    assert "hush" not in str(edges[-1].span)


async def test_a_continuation_is_linked_to_what_broke(cluster: LocalCluster, collector: Receiver) -> None:
    request = request_of(STORY, max_tokens=200)
    request.request_id = "continued"
    seen = 0
    async with open_channel(cluster.frontend.address) as channel:
        stub: Any = InferenceServiceStub(channel)
        async for event in stub.Generate(request):
            seen += len(event.chunk.token_ids)
            if event.HasField("accepted"):
                broken = event.accepted.route.decode_worker_id
            if seen == 20:
                cluster.process(broken).signal(signal.SIGKILL)
    assert seen == 200
    spans = await collector.trace("continued", "generate", "attempt", "decode leg")
    first, second = [span for span in spans if span.name == "attempt"][:2]
    assert first.attributes["tandem.outcome"] == "broken"
    assert first.attributes["tandem.failed_worker"] == broken
    assert first.span.status.code == 2
    assert second.links == [first.span_id]
    assert second.attributes["tandem.tokens_before"] >= 20
    assert second.parent_id == first.parent_id == one(spans, "generate").span_id
    legs = [span for span in spans if span.name == "decode leg"]
    assert [leg.parent_id for leg in legs] == [second.span_id], "the killed worker has exported nothing"
    await cluster.restart(broken)


async def test_a_refused_request_has_a_span_that_says_why(cluster: LocalCluster, collector: Receiver) -> None:
    request = request_of(STORY, max_tokens=4)
    request.request_id, request.stopping.max_tokens = "refused", 0
    with pytest.raises(TandemError):
        await generate(cluster, request)
    root = one(await collector.trace("refused", "generate"), "generate")
    assert (root.attributes["tandem.outcome"], root.attributes["error.type"]) == ("refused", "INVALID_REQUEST")


async def test_a_client_that_leaves_is_no_error(cluster: LocalCluster, collector: Receiver) -> None:
    request = request_of(STORY, max_tokens=300)
    request.request_id = "left"
    async with open_channel(cluster.frontend.address) as channel:
        stub: Any = InferenceServiceStub(channel)
        call_ = stub.Generate(request)
        for _ in range(5):
            await call_.read()
        call_.cancel()
        await asyncio.sleep(0)
    spans = await collector.trace("left", "generate", "decode leg")
    for name in ("generate", "decode leg"):
        span = one(spans, name)
        assert (span.attributes["tandem.outcome"], span.span.status.code) == ("cancelled", 0)


async def test_a_prompt_is_exported_where_the_operator_wants_it_and_one_worker_is_one_leg(
    collector: Receiver, tmp_path: Path
) -> None:
    shape: dict[str, Any] = {"engine": "simulated", "prefill": 0, "decode": 0, "aggregated": 1}
    flags = {"frontend": {"trace-prompts": "true"}}
    async with running(tmp_path, otlp_endpoint=collector.address, role_flags=flags, **shape) as cluster:
        stream = await generate(cluster, request_of("Zebedee keeps a secret", max_tokens=4))
        spans = await collector.trace(stream.accepted.request_id, "generate", "aggregated leg")
        assert one(spans, "generate").attributes["tandem.prompt"].endswith("Zebedee keeps a secret")
        leg = one(spans, "aggregated leg", one(spans, "attempt"))
        assert [s.name for s in spans if s.parent_id == leg.span_id] == [
            "submit",
            "queue",
            "prefill",
            "first token",
            "stream",
        ]
        assert "tandem.room" not in leg.attributes
        assert "Zebedee" not in cluster.frontend.log.read_text()


async def test_requests_and_the_end_of_a_cluster_do_not_wait_for_a_dead_collector(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{unused.getsockname()[1]}"
        async with running(tmp_path, otlp_endpoint=dead, engine="simulated", edge=True) as cluster:
            assert cluster.edge is not None
            async with httpx.AsyncClient(base_url=f"http://{cluster.edge.address}") as client:
                for _ in range(20):
                    body = {"prompt": STORY, "max_tokens": 4, "temperature": 0, "model": "tandem-demo"}
                    assert (await client.post("/v1/completions", json=body)).status_code == 200
            log_text = await assert_eventually(
                cluster.frontend.log.read_text, lambda text: "span export failed" in text, within_s=15, what="a warning"
            )
            assert log_text.count("span export failed") == 1
    assert {process.exit_status for process in cluster.processes} == {0}
