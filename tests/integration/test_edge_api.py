"""HTTP as a client sees it: the whole way through Envoy, a frontend and simulated workers, and back."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from google.protobuf.json_format import ParseDict

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.client import calls
from tandem.local_cluster.child_process import ClusterProcess
from tandem.local_cluster.cluster import LocalCluster
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import REPOSITORY, SIMULATED, running
from tests.integration.support.calls import generate, request_of
from tests.integration.support.edge_host import JSON, client_of, error_of
from tests.integration.test_simulated_cluster import STORY, idle, oracle

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

GREEDY = {"prompt": STORY, "sampling": {"temperature": 0}}


def edge_of(cluster: LocalCluster) -> ClusterProcess:
    assert cluster.edge is not None
    return cluster.edge


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    logs = tmp_path_factory.mktemp("edge")
    async with running(logs, engine="simulated", edge=True, worker_flags=SIMULATED) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def client(cluster: LocalCluster) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(edge_of(cluster)) as opened:
        yield opened


def asked(**stopping: Any) -> dict[str, Any]:
    return {**GREEDY, "stopping": stopping}


async def events_of(client: httpx.AsyncClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream. Each is one line of data and one empty line."""
    events = []
    async with client.stream("POST", "/v1/generate", json=body) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        text = (await response.aread()).decode()
    for block in text.removesuffix("\n\n").split("\n\n"):
        assert block.startswith("data: ")
        assert "\n" not in block
        events.append(json.loads(block.removeprefix("data: ")))
    return events


async def test_server_sent_events_are_the_native_stream(cluster: LocalCluster, client: httpx.AsyncClient) -> None:
    await generate(cluster, request_of(STORY, max_tokens=40))  # from now on the prompt is cached
    native = await generate(cluster, request_of(STORY, max_tokens=40))
    events = await events_of(client, asked(max_tokens=40))
    typed = [ParseDict(event, pb.GenerateResponse()) for event in events]
    assert [e.chunk for e in typed if e.HasField("chunk")] == native.chunks
    assert typed[0].HasField("accepted")
    assert typed[0].accepted.prompt_tokens == native.accepted.prompt_tokens
    assert typed[-1].finish.usage == native.finish.usage
    assert typed[-1].finish.timings.kv_transfer_bytes == native.finish.timings.kv_transfer_bytes > 0
    assert events[1]["chunk"]["index"] == 0, "an index of 0 is not left out"


async def test_unary_has_the_same_tokens(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/generate:unary", json=asked(max_tokens=12))
    assert response.status_code == 200
    assert response.json()["token_ids"] == oracle(STORY, 12)


async def test_tokenize_and_detokenize(client: httpx.AsyncClient) -> None:
    ids = (await client.post("/v1/tokenize", json={"prompt": "Größe 🙂"})).json()["token_ids"]
    assert (await client.post("/v1/detokenize", json={"token_ids": ids})).json() == {"text": "Größe 🙂"}


async def test_models(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/tandem/models")).json()["models"]
    assert [model["name"] for model in listed] == ["tandem-demo"]
    assert (await client.get("/v1/tandem/models/tandem-demo")).json()["model"] == listed[0]
    missing = await client.get("/v1/tandem/models/some/gpt")
    assert missing.status_code == 404
    assert error_of(missing)["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models")]
)
async def test_openai_paths_reach_a_frontend(client: httpx.AsyncClient, method: str, path: str) -> None:
    response = await client.request(method, path, headers=JSON, content=b"{}" if method == "POST" else None)
    assert response.status_code not in (404, 405, 415, 503), response.text


async def test_health(client: httpx.AsyncClient) -> None:
    response = await client.get("/healthz")
    assert (response.status_code, response.json()) == (200, {"status": "serving"})


REFUSED: list[tuple[str, str, dict[str, str], bytes, int, str | None]] = [
    ("GET", "/", {}, b"", 404, None),
    ("GET", "/v1/generate/", {}, b"", 405, None),
    ("POST", "/grpc.health.v1.Health/Check", JSON, b"{}", 404, None),
    ("POST", "/tandem.api.frontend.v1.InferenceService/Generate", JSON, b"{}", 404, None),
    ("DELETE", "/v1/generate", {}, b"", 405, None),
    ("OPTIONS", "/v1/generate", {}, b"", 405, None),
    ("POST", "/v1/models", JSON, b"{}", 405, None),
    ("POST", "/v1/generate", {}, b"{}", 415, None),
    ("POST", "/v1/generate", {"content-type": "text/plain"}, b"{}", 415, None),
    ("POST", "/v1/generate", {**JSON, "content-encoding": "gzip"}, b"\x1f\x8b", 415, None),
    ("POST", "/v1/generate", JSON, b"{", 400, None),
    ("POST", "/v1/generate", JSON, b"[]", 400, None),
    ("POST", "/v1/generate", JSON, b'{"prompt": "\xff"}', 400, None),
    ("POST", "/v1/generate", JSON, b"[" * 5000, 400, None),
    ("POST", "/v1/generate?stream=1", JSON, b'{"prompt": "x"}', 400, None),
    ("POST", "/v1/generate", JSON, b'{"prompt": 5}', 400, None),
    ("POST", "/v1/generate", JSON, b"{}", 400, "input"),
    ("POST", "/v1/generate", JSON, b'{"prompt":"x","sampling":{"temperature":9}}', 400, "sampling.temperature"),
    ("POST", "/v1/generate:unary", JSON, b'{"prompt":"x","stopping":{"max_tokens":0}}', 400, "stopping.max_tokens"),
    ("POST", "/v1/detokenize", JSON, b'{"token_ids":[99999]}', 400, "token_ids"),
    ("POST", "/v1/generate", JSON, b'{"prompt":"x","model":"gpt"}', 404, None),
]


@pytest.mark.parametrize(("method", "path", "headers", "body", "status", "param"), REFUSED)
async def test_every_error_has_one_form(
    client: httpx.AsyncClient,
    method: str,
    path: str,
    headers: dict[str, str],
    body: bytes,
    status: int,
    param: str | None,
) -> None:
    response = await client.request(method, path, headers=headers, content=body)
    assert response.status_code == status, response.text
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["code"] == ("invalid_request" if param else "model_not_found" if b"gpt" in body else None)
    assert ("allow" in response.headers) == (status == 405)


async def test_no_answer_says_what_stands_behind(client: httpx.AsyncClient) -> None:
    for response in (
        await client.post("/v1/tokenize", json={"prompt": "x"}),
        await client.post("/v1/tokenize", json={}),
        await client.get("/nowhere"),
        await client.get("/healthz"),
    ):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
        assert response.headers["cache-control"] == "no-store"
        leaks = {name for name in response.headers if name.startswith(("grpc-", "x-envoy-"))} | {"server"}
        assert not leaks & set(response.headers)


async def test_a_client_that_leaves_ends_both_legs(cluster: LocalCluster, client: httpx.AsyncClient) -> None:
    async with client.stream("POST", "/v1/generate", json=asked(max_tokens=1900)) as response:
        # Not a loop with a break: httpx would close the connection there and then.
        lines = response.aiter_lines()
        while '"index": 3' not in await anext(lines):
            pass

        async def open_legs() -> int:
            return (await calls.worker_load(cluster.process("decode-0").address)).open_legs

        await assert_eventually(open_legs, bool, within_s=5, every_s=0.1, what="an open leg")
    await assert_eventually(lambda: idle(cluster), bool, within_s=1.0, every_s=0.02, what="both engines idle")


async def test_native_grpc_passes_too(cluster: LocalCluster) -> None:
    tokens: list[int] = []
    async for event in calls.generate(edge_of(cluster).address, request_of(STORY, max_tokens=5), 10):
        tokens.extend(event.chunk.token_ids)
    assert tokens == oracle(STORY, 5)


async def test_a_failure_after_the_first_event_is_the_last_event(tmp_path: Path) -> None:
    started = running(tmp_path, engine="simulated", edge=True, worker_flags=SIMULATED)
    async with started as cluster, client_of(edge_of(cluster)) as client:
        events = asyncio.create_task(events_of(client, asked(max_tokens=1900)))

        async def open_legs() -> int:
            return (await calls.worker_load(cluster.process("decode-0").address)).open_legs

        await assert_eventually(open_legs, bool, within_s=5, what="an open stream")
        await asyncio.sleep(0.1)
        cluster.process("decode-0").signal(signal.SIGKILL)
        received = await events
        assert "accepted" in received[0]
        assert "chunk" in received[1]
        assert not [event for event in received if "finish" in event]
        error = received[-1]["error"]
        assert (error["type"], error["param"], error["code"]) == ("service_unavailable_error", None, "leg_failed")
        assert "decode leg on decode-0 failed" in error["message"]
        # The next one has not begun when it fails: a status of HTTP.
        response = await client.post("/v1/generate", json=asked(max_tokens=5))
        assert response.status_code == 503
        assert error_of(response)["code"] in ("leg_failed", "no_workers")


CURL = re.compile(r"```sh\n(curl .*?)\n```(?:\n\n```(?:json|text)\n(.*?)\n```)?", re.DOTALL)
EXAMPLES = CURL.findall((REPOSITORY / "docs" / "guide" / "clients.md").read_text())


@pytest.mark.parametrize(("command", "shown"), EXAMPLES)
async def test_examples_of_the_documentation_work_as_written(cluster: LocalCluster, command: str, shown: str) -> None:
    command = command.replace("127.0.0.1:8080", edge_of(cluster).address)
    process = await asyncio.create_subprocess_exec("sh", "-ec", command, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert process.returncode == 0
    assert out
    if shown and "…" not in shown:
        assert json.loads(out) == json.loads(shown)
