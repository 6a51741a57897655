"""Responses and Messages over gRPC, as the edge calls them, on a frontend process before a simulated engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.api.httpbody_pb2 import HttpBody

from tandem.api.frontend.v1.anthropic_service_pb2_grpc import AnthropicServiceStub
from tandem.api.frontend.v1.openai_service_pb2_grpc import OpenAiServiceStub
from tandem.errors import InvalidRequest, TandemError
from tandem.local_cluster.cluster import LocalCluster
from tandem.rpc.channels import open_channel
from tandem.rpc.status import from_rpc_error
from tests.integration.conftest import SIMULATED, running
from tests.integration.support.openai_calls import MODEL, ask, chat

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

TEXT = "Once upon a time"
RESPONSE: dict[str, Any] = {"model": MODEL, "input": TEXT, "temperature": 0, "max_output_tokens": 12}
MESSAGE: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": TEXT}],
    "temperature": 0,
    "max_tokens": 12,
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    one: dict[str, Any] = {"prefill": 0, "decode": 0, "aggregated": 1}
    async with running(tmp_path_factory.mktemp("doors"), engine="simulated", worker_flags=SIMULATED, **one) as started:
        yield started


async def call(cluster: LocalCluster, method: str, body: dict[str, Any]) -> bytes:
    """The whole body of a response.

    Raises:
        TandemError: the call failed.
    """
    async with open_channel(cluster.frontend.address) as channel:
        stub: Any = OpenAiServiceStub(channel) if method == "Responses" else AnthropicServiceStub(channel)
        request = HttpBody(data=json.dumps(body).encode())
        try:
            if method == "CountTokens":
                return (await stub.CountTokens(request, timeout=30)).data  # type: ignore[no-any-return]
            return b"".join([part.data async for part in getattr(stub, method)(request, timeout=30)])
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None


def events_of(data: bytes) -> list[dict[str, Any]]:
    """The events of a stream: each has its type as its name too."""
    events = []
    for block in data.decode().removesuffix("\n\n").split("\n\n"):
        name, _, line = block.partition("\n")
        event = json.loads(line.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


async def test_the_doors_write_what_chat_completions_do(cluster: LocalCluster) -> None:
    said = (await ask(cluster.frontend.address, "ChatCompletions", chat(TEXT))).json
    text, usage = said["choices"][0]["message"]["content"], said["usage"]
    response = json.loads(await call(cluster, "Responses", RESPONSE))
    message = json.loads(await call(cluster, "Messages", MESSAGE))
    counted = json.loads(await call(cluster, "CountTokens", MESSAGE))
    assert [part["text"] for part in response["output"][0]["content"]] == [text]
    assert message["content"] == [{"type": "text", "text": text}]
    assert (response["status"], message["stop_reason"]) == ("incomplete", "max_tokens")
    read = message["usage"]["cache_read_input_tokens"]
    prompts = [response["usage"]["input_tokens"], message["usage"]["input_tokens"] + read, counted["input_tokens"]]
    assert prompts == [usage["prompt_tokens"]] * 3
    assert response["usage"]["output_tokens"] == message["usage"]["output_tokens"] == usage["completion_tokens"] == 12


async def test_a_stream_adds_up_to_the_whole_response(cluster: LocalCluster) -> None:
    whole = json.loads(await call(cluster, "Responses", RESPONSE))
    events = events_of(await call(cluster, "Responses", {**RESPONSE, "stream": True}))
    deltas = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert deltas == whole["output"][0]["content"][0]["text"]
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"].keys() == whole.keys()


async def test_a_stream_adds_up_to_the_whole_message(cluster: LocalCluster) -> None:
    whole = json.loads(await call(cluster, "Messages", MESSAGE))
    events = events_of(await call(cluster, "Messages", {**MESSAGE, "stream": True}))
    deltas = "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
    assert [{"type": "text", "text": deltas}] == whole["content"]
    assert events[-2]["delta"]["stop_reason"] == whole["stop_reason"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_sequence_is_named(cluster: LocalCluster, stream: bool) -> None:
    whole = json.loads(await call(cluster, "Messages", MESSAGE))
    text = whole["content"][0]["text"]
    stop = text[len(text) // 2 :][:4]
    data = await call(cluster, "Messages", {**MESSAGE, "stop_sequences": [stop], "stream": stream})
    end = events_of(data)[-2]["delta"] if stream else json.loads(data)
    assert (end["stop_reason"], end["stop_sequence"]) == ("stop_sequence", stop)


@pytest.mark.parametrize(
    ("method", "body", "field"),
    [
        ("Responses", {**RESPONSE, "temperature": 9}, "temperature"),
        ("Responses", {**RESPONSE, "max_output_tokens": 0}, "max_output_tokens"),
        ("Responses", {**RESPONSE, "input": "word " * 5_000}, "input"),
        ("Responses", {**RESPONSE, "tools": [{"type": "function", "name": "f"}]}, "tools"),
        ("Messages", {**MESSAGE, "top_p": 2}, "top_p"),
        ("Messages", {**MESSAGE, "stop_sequences": ["x" * 2_000]}, "stop_sequences"),
        ("Messages", {**MESSAGE, "messages": [{"role": "user", "content": "word " * 5_000}]}, "messages"),
        ("Messages", {**MESSAGE, "thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.type"),
        ("CountTokens", {"model": MODEL}, "messages"),
    ],
)
async def test_a_refusal_names_the_doors_own_field(
    cluster: LocalCluster, method: str, body: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await call(cluster, method, body)
    assert refused.value.field == field


@pytest.mark.parametrize("method", ["Responses", "Messages"])
async def test_another_model_is_not_found(cluster: LocalCluster, method: str) -> None:
    body = {**(RESPONSE if method == "Responses" else MESSAGE), "model": "other"}
    with pytest.raises(TandemError) as refused:
        await call(cluster, method, body)
    assert refused.value.reason == "MODEL_NOT_FOUND"
