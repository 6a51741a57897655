"""Embeddings through a real Envoy, on simulated engines: every form of OpenAI's request, refusals, a killed worker."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import struct
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import worker_pb2
from tandem.client import calls
from tandem.errors import DeadlinePassed, NotSupported
from tandem.local_cluster.child_process import ClusterProcess
from tandem.local_cluster.cluster import LocalCluster
from tandem.testing.eventually import assert_eventually
from tandem.testing.fake_model import write_fake_model
from tests.integration.conftest import REPOSITORY, running
from tests.integration.support.calls import refusal, request_of
from tests.integration.support.edge_host import client_of, error_of

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]

MODEL, GENERATING = "embedder", "tandem-demo"
SIZE, SHORTER = 64, 16
STEPS = {"engine-extra": json.dumps({"prefill_step_s": 0.02})}
"""Both workers are equally fast, and a call of many inputs lasts."""
TEXTS = [f"Bytes of memory move from one machine to the other, number {number}." for number in range(40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedder") / MODEL
    return write_fake_model(folder, matryoshka_dimensions=[SHORTER, SIZE], architectures=["Qwen3Model"])


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    logs, more = tmp_path_factory.mktemp("embeddings"), {"embedding_models": {MODEL: model}}
    async with running(logs, engine="simulated", edge=True, worker_flags=STEPS, metrics=True, **more) as started:
        yield started


@pytest_asyncio.fixture(loop_scope="session")
async def client(cluster: LocalCluster) -> AsyncIterator[openai.AsyncOpenAI]:
    assert cluster.edge is not None
    async with openai.AsyncOpenAI(base_url=f"http://{cluster.edge.address}/v1", api_key="none", max_retries=0) as one:
        yield one


@pytest_asyncio.fixture(loop_scope="session")
async def http(cluster: LocalCluster) -> AsyncIterator[httpx.AsyncClient]:
    assert cluster.edge is not None
    async with client_of(cluster.edge) as one:
        yield one


def request_for(*texts: str, **more: Any) -> pb.EmbedRequest:
    return pb.EmbedRequest(model=MODEL, inputs=[pb.EmbedInput(text=text) for text in texts], **more)


async def test_openai_sdk_every_form_of_input_and_both_encodings_give_the_same_vectors(
    client: openai.AsyncOpenAI, model: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = [tokenizer.encode(text).ids for text in TEXTS[:3]]
    forms: list[Any] = [TEXTS[:3], ids]
    vectors: list[list[float]] = []
    # The SDK asks for base64 unless a format is given, and decodes it.
    for form in forms:
        coded = await client.embeddings.create(model=MODEL, input=form)
        plain = await client.embeddings.create(model=MODEL, input=form, encoding_format="float", user="someone")
        assert [entry.index for entry in coded.data] == [0, 1, 2]
        assert [entry.embedding for entry in coded.data] == [
            [struct.unpack("<f", struct.pack("<f", value))[0] for value in entry.embedding] for entry in plain.data
        ]
        assert coded.usage.prompt_tokens == coded.usage.total_tokens == sum(map(len, ids))
        assert coded.model == MODEL
        vectors.append(coded.data[0].embedding)
    alone = [await client.embeddings.create(model=MODEL, input=one) for one in (TEXTS[0], ids[0])]
    vectors += [response.data[0].embedding for response in alone]
    assert all(vector == vectors[0] for vector in vectors)
    assert len(vectors[0]) == SIZE
    assert math.isclose(sum(value * value for value in vectors[0]), 1.0, abs_tol=1e-5)


async def test_embeddings_base64_body_is_little_endian_float32(http: httpx.AsyncClient) -> None:
    body = {"model": MODEL, "input": TEXTS[0], "encoding_format": "base64", "dimensions": SHORTER}
    said = (await http.post("/v1/embeddings", json=body)).json()
    numbers = (await http.post("/v1/embeddings", json={**body, "encoding_format": "float"})).json()
    coded = base64.b64decode(said["data"][0]["embedding"])
    assert len(coded) == 4 * SHORTER
    assert list(struct.unpack(f"<{SHORTER}f", coded)) == pytest.approx(numbers["data"][0]["embedding"], abs=1e-7)
    assert said["object"] == "list"
    assert said["data"][0]["object"] == "embedding"


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"input": ""}, "input", "must not be empty"),
        ({"input": []}, "input", "must be 1 to 2048"),
        ({"input": ["a", ""]}, "input[1]", "must not be empty"),
        ({"input": [[1, 2], []]}, "input[1]", "must not be empty"),
        ({"input": [1, 100000]}, "input", "outside the vocabulary"),
        ({"input": [[5], [1, -1]]}, "input[1]", "outside the vocabulary"),
        ({"input": [9] * 3000}, "input", "maximum context length"),
        ({"input": ["a"] * 2049}, "input", "must be 1 to 2048"),
        ({"input": "a", "dimensions": 17}, "dimensions", "one of 16, 64"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "not supported"),
        ({"input": "a", "normalize": True}, "normalize", "not a parameter"),
        ({"input": "a", "priority": 101}, "priority", "-100 to 100"),
    ],
)
async def test_embeddings_invalid_body_is_refused_by_parameter(
    http: httpx.AsyncClient, body: dict[str, Any], field: str, words: str
) -> None:
    response = await http.post("/v1/embeddings", json={"model": MODEL, **body})
    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == field
    assert words in error_of(response)["message"]


async def test_a_model_asked_for_the_other_task_is_refused_by_name_before_dispatch(
    cluster: LocalCluster, http: httpx.AsyncClient
) -> None:
    before = await attempts_of(cluster)
    bodies: dict[str, dict[str, Any]] = {
        "/v1/embeddings": {"model": GENERATING, "input": "a"},
        "/v1/completions": {"model": MODEL, "prompt": "a"},
        "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "a"}]},
        "/v1/responses": {"model": MODEL, "input": "a"},
    }
    for path, body in bodies.items():
        response = await http.post(path, json=body)
        assert (response.status_code, error_of(response)["param"]) == (501, "model"), (path, response.text)
        assert str(body["model"]) in error_of(response)["message"]
    request = request_of("a")
    request.model = MODEL
    problem = await refusal(cluster, request)
    assert isinstance(problem, NotSupported)
    with pytest.raises(NotSupported, match="computes no embeddings"):
        await calls.embed(cluster.frontend.address, pb.EmbedRequest(model=GENERATING, inputs=[pb.EmbedInput(text="a")]))
    assert await attempts_of(cluster) == before, "a worker was asked"


async def test_models_list_names_the_task_and_size_of_an_embedding_model(
    cluster: LocalCluster, client: openai.AsyncOpenAI
) -> None:
    entries: dict[str, dict[str, Any]] = {entry.id: entry.model_dump() async for entry in client.models.list()}
    assert (entries[MODEL]["task"], entries[MODEL]["embedding_size"]) == ("embed", SIZE)
    assert "task" not in entries[GENERATING]
    listed = {model.name: model for model in await calls.list_models(cluster.frontend.address)}
    assert (listed[MODEL].task, listed[MODEL].embedding_size) == (worker_pb2.MODEL_TASK_EMBED, SIZE)
    assert listed[GENERATING].task == worker_pb2.MODEL_TASK_GENERATE


async def test_typed_api_over_http_and_grpc_gives_vectors_and_their_worker(
    cluster: LocalCluster, http: httpx.AsyncClient
) -> None:
    response = await calls.embed(cluster.frontend.address, request_for(*TEXTS[:2], request_id="mine"))
    assert (response.request_id, response.model) == ("mine", MODEL)
    assert [len(each.values) for each in response.embeddings] == [SIZE, SIZE]
    assert {each.worker_id for each in response.embeddings} == {"aggregated-0"}
    assert response.usage.prompt_tokens == sum(each.prompt_tokens for each in response.embeddings)
    said = (await http.post("/v1/embed", json={"model": MODEL, "inputs": [{"text": TEXTS[0]}]})).json()
    assert said["embeddings"][0]["values"] == pytest.approx(list(response.embeddings[0].values), abs=1e-6)


async def test_a_call_of_many_inputs_is_complete_and_in_order(http: httpx.AsyncClient) -> None:
    texts = [str(number) for number in range(200)]
    said = (await http.post("/v1/embeddings", json={"model": MODEL, "input": texts}, timeout=100)).json()
    assert [entry["index"] for entry in said["data"]] == list(range(200))
    vectors = {tuple(entry["embedding"]) for entry in said["data"]}
    assert len(vectors) == 200
    one = (await http.post("/v1/embeddings", json={"model": MODEL, "input": texts[199]})).json()
    assert one["data"][0]["embedding"] == said["data"][199]["embedding"]


async def metrics_of(cluster: LocalCluster) -> str:
    assert cluster.frontend.metrics_address is not None
    async with httpx.AsyncClient() as scraper:
        return (await scraper.get(f"http://{cluster.frontend.metrics_address}/metrics")).text


async def attempts_of(cluster: LocalCluster) -> float:
    """Attempts that the frontend has sent to workers, over all closed requests."""
    lines = (await metrics_of(cluster)).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("tandem_pairs_chosen_total{"))


async def test_usage_and_metrics_of_embeddings_are_recorded_under_their_operation(
    cluster: LocalCluster, http: httpx.AsyncClient
) -> None:
    before = await attempts_of(cluster)
    await http.post("/v1/embeddings", json={"model": MODEL, "input": TEXTS[:2]})
    assert await attempts_of(cluster) == before + 2
    text = await metrics_of(cluster)
    about = [line for line in text.splitlines() if f'gen_ai_request_model="{MODEL}"' in line]
    assert any("request_duration" in line and 'gen_ai_operation_name="embeddings"' in line for line in about)
    assert any("token_usage" in line and 'gen_ai_token_type="input"' in line for line in about)
    assert not any("token_usage" in line and 'gen_ai_token_type="output"' in line for line in about)


async def test_a_worker_killed_under_a_call_costs_no_input_and_the_call_is_spread(
    cluster: LocalCluster, model: Path, temporary: Path
) -> None:
    flags = {"registry": cluster.registry.address, "model": str(model), "model-name": MODEL, "engine": "simulated"}
    flags |= {"role": "aggregated", "task": "embed", "worker-id": "second", **STEPS}
    second = ClusterProcess("second", "aggregated", flags, cluster.log_directory)
    await second.start(temporary)
    try:
        await second.wait_ready()
        many = request_for(*(f"{text} {number}" for number in range(5) for text in TEXTS))
        before = await calls.embed(cluster.frontend.address, many)

        async def spread() -> set[str]:
            response = await calls.embed(cluster.frontend.address, request_for(*TEXTS))
            return {each.worker_id for each in response.embeddings}

        await assert_eventually(spread, lambda workers: workers == {"aggregated-0", "second"}, within_s=30)
        call = asyncio.create_task(calls.embed(cluster.frontend.address, many))

        async def busy() -> int:
            async with grpc.aio.insecure_channel(second.address) as channel:
                return await open_legs(channel)

        await assert_eventually(busy, lambda count: count > 0, within_s=20)
        assert not call.done(), "the worker was killed after the call"
        second.kill()
        after = await call
        assert {each.worker_id for each in after.embeddings} >= {"aggregated-0"}
        assert [list(each.values) for each in after.embeddings] == [list(each.values) for each in before.embeddings]
    finally:
        await second.stop()


async def open_legs(channel: grpc.aio.Channel) -> int:
    from tandem.api.worker.v1 import worker_service_pb2
    from tandem.api.worker.v1.worker_service_pb2_grpc import WorkerServiceStub

    stub: Any = WorkerServiceStub(channel)
    call = stub.WatchLoad(worker_service_pb2.WatchLoadRequest(interval_ms=10))
    report = await call.read()
    call.cancel()
    return int(report.open_legs)


async def test_a_deadline_ends_the_call_and_its_legs(cluster: LocalCluster) -> None:
    texts = [TEXTS[0] * 20] * 400
    with pytest.raises(DeadlinePassed):
        await calls.embed(cluster.frontend.address, request_for(*texts), 0.05)
    worker = next(process for process in cluster.workers if process.flags.get("task") == "embed")

    async def left() -> int:
        async with grpc.aio.insecure_channel(worker.address) as channel:
            return await open_legs(channel)

    await assert_eventually(left, lambda count: count == 0, within_s=20)
    assert len((await calls.embed(cluster.frontend.address, request_for("a"))).embeddings) == 1


async def test_example_of_embeddings_prints_the_nearest_text_and_a_refusal(cluster: LocalCluster) -> None:
    assert cluster.edge is not None
    environment = {**os.environ, "TANDEM_URL": f"http://{cluster.edge.address}", "TANDEM_EMBEDDING_MODEL": MODEL}
    example = REPOSITORY / "examples" / "openai_embeddings.py"
    child = await asyncio.create_subprocess_exec(
        sys.executable, str(example), env=environment, stdout=asyncio.subprocess.PIPE
    )
    printed = (await child.communicate())[0].decode().splitlines()
    assert printed[0].startswith(f"{SIZE} numbers each, ")
    assert printed[1:] == [
        "nearest: Mia hid the red key in the old barn.",
        "refused: input (invalid_request)",
    ]
