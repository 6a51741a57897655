"""The clients people have, against a real Envoy and a real pair of SGLang engines: openai, langchain, litellm, npm."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
import pytest_asyncio
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from tandem.local_cluster.cluster import LocalCluster
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import REPOSITORY
from tests.integration.test_simulated_cluster import idle

pytestmark = [
    pytest.mark.engine_sglang,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs requirements/cpu-engine.txt"),
    pytest.mark.timeout(240),
]
on_session_loop = pytest.mark.asyncio(loop_scope="session")

MODEL = "tandem-demo"
STORY = (
    "Listen carefully. Mia hid the red key in the old barn. Theo left the orange spoon in the dark forest. "
    "Sam put the blue ball near the warm window. It was a sunny day. Where did Mia hide the red key?"
)
ANSWER = "Mia hid the red key in the old barn."
MESSAGES: list[Any] = [{"role": "user", "content": STORY}]
GREEDY: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 40}


class Where(BaseModel):
    """A structured answer, small enough for a small model."""

    found: bool
    colour: Literal["red", "blue", "orange"]


def base_url(cluster: LocalCluster) -> str:
    assert cluster.edge is not None
    return f"http://{cluster.edge.address}/v1"


@pytest.fixture
def client(http_pair: LocalCluster) -> Any:
    with openai.OpenAI(base_url=base_url(http_pair), api_key="none", max_retries=0) as one:
        yield one


@pytest_asyncio.fixture(loop_scope="session")
async def async_client(http_pair: LocalCluster) -> Any:
    async with openai.AsyncOpenAI(base_url=base_url(http_pair), api_key="none", max_retries=0) as one:
        yield one


def test_a_whole_answer(client: openai.OpenAI) -> None:
    said = client.chat.completions.create(**GREEDY)
    assert said.choices[0].message.content == ANSWER
    assert said.choices[0].finish_reason == "stop"
    assert said.usage is not None
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens


def test_a_streamed_answer_with_usage(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWER
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert len({chunk.id for chunk in chunks}) == 1


@on_session_loop
async def test_many_streams_at_once(async_client: openai.AsyncOpenAI) -> None:
    async def one() -> str:
        stream = await async_client.chat.completions.create(**GREEDY, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert await asyncio.gather(*(one() for _ in range(8))) == [ANSWER] * 8


def test_the_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**GREEDY) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert deltas == final.choices[0].message.content == ANSWER


def test_parsed_answers(client: openai.OpenAI) -> None:
    said = client.beta.chat.completions.parse(**GREEDY, response_format=Where)
    assert isinstance(said.choices[0].message.parsed, Where)


def test_parsed_answers_are_streamed(client: openai.OpenAI) -> None:
    with client.beta.chat.completions.stream(**GREEDY, response_format=Where) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Where)


def test_completions(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": "Once upon a time", "temperature": 0, "max_tokens": 12}
    whole = client.completions.create(**asked)
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))
    echoed = client.completions.create(**asked, echo=True)
    assert whole.choices[0].text == streamed
    assert echoed.choices[0].text == "Once upon a time" + streamed
    assert whole.choices[0].finish_reason == "length"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "tandem"
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("gpt-4")
    assert refused.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("fields", "kind", "param", "code"),
    [
        ({"temperature": 9}, openai.BadRequestError, "temperature", "invalid_request"),
        ({"extra_body": {"mood": 1}}, openai.BadRequestError, "mood", "invalid_request"),
        ({"extra_body": {"regex": "(red"}}, openai.BadRequestError, "regex", "invalid_request"),
        ({"model": "gpt-4"}, openai.NotFoundError, None, "model_not_found"),
        (
            {"messages": [{"role": "user", "content": "word " * 3000}]},
            openai.BadRequestError,
            "messages",
            "context_length_exceeded",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals(client: openai.OpenAI, fields: Any, kind: Any, param: Any, code: str, stream: bool) -> None:
    with pytest.raises(kind) as refused:
        client.chat.completions.create(**{**GREEDY, **fields}, stream=stream)
    assert (refused.value.param, refused.value.code) == (param, code)
    assert client.chat.completions.create(**GREEDY).choices[0].message.content == ANSWER


@on_session_loop
async def test_a_client_that_leaves_ends_both_engines_work(
    http_pair: LocalCluster, async_client: openai.AsyncOpenAI
) -> None:
    await assert_eventually(lambda: idle(http_pair), bool, within_s=5, what="idle engines at the start")
    body = {**GREEDY, "max_tokens": 1900, "stream": True, "extra_body": {"ignore_eos": True}}
    stream = await async_client.chat.completions.create(**body)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await stream.close()
    await assert_eventually(lambda: idle(http_pair), bool, within_s=1.0, every_s=0.02, what="both engines idle")


@on_session_loop
async def test_a_connection_that_is_cut_ends_both_engines_work(http_pair: LocalCluster) -> None:
    body = json.dumps({**GREEDY, "max_tokens": 1900, "stream": True, "ignore_eos": True}).encode()
    assert http_pair.edge is not None
    host, port = http_pair.edge.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        + f"content-length: {len(body)}\r\n\r\n".encode()
        + body
    )
    await reader.readuntil(b'"content":"')
    writer.transport.abort()
    await assert_eventually(lambda: idle(http_pair), bool, within_s=1.0, every_s=0.02, what="both engines idle")


def test_langchain(http_pair: LocalCluster) -> None:
    chain: Any = ChatOpenAI(base_url=base_url(http_pair), api_key="none", model=MODEL, temperature=0, max_tokens=40)
    assert chain.invoke(STORY).content == ANSWER
    assert "".join(chunk.content for chunk in chain.stream(STORY)) == ANSWER
    assert isinstance(chain.with_structured_output(Where, method="json_schema").invoke(STORY), Where)


@on_session_loop
async def test_litellm(http_pair: LocalCluster) -> None:
    # In a process of its own: the library keeps threads and warns while it is imported.
    script = REPOSITORY / "tests" / "clients" / "chat_litellm.py"
    seen = json.loads(await run(REPOSITORY, sys.executable, str(script), base_url(http_pair), STORY))
    assert seen == {"whole": ANSWER, "streamed": ANSWER, "refused": "ContextWindowExceededError"}


@on_session_loop
async def test_the_npm_package(http_pair: LocalCluster, tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "tests" / "clients", tmp_path, dirs_exist_ok=True)
    await run(tmp_path, "npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--loglevel=error")
    seen = json.loads(await run(tmp_path, "node", "chat.mjs", base_url(http_pair), STORY))
    assert seen["whole"] == seen["streamed"] == seen["final"] == ANSWER
    assert seen["usage"]["total_tokens"] == seen["streamedUsage"]["total_tokens"] > 0
    assert seen["completion"]
    assert seen["models"] == [MODEL]
    assert seen["refused"] == {
        "kind": "BadRequestError",
        "status": 400,
        "param": "temperature",
        "code": "invalid_request",
    }


async def run(directory: Path, *command: str) -> str:
    child = await asyncio.create_subprocess_exec(
        *command, cwd=directory, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    stdout, stderr = await child.communicate()
    assert child.returncode == 0, stderr.decode()
    return stdout.decode()


def test_curl_like_bodies_without_any_client(http_pair: LocalCluster) -> None:
    said = httpx.post(f"{base_url(http_pair)}/chat/completions", json=GREEDY, timeout=30)
    assert said.headers["content-type"] == "application/json"
    assert said.json()["choices"][0]["message"]["content"] == ANSWER
