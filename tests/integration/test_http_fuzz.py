"""Thousands of broken bodies through a real Envoy: each one is answered, none with a 500, and all goes on."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tandem.local_cluster.cluster import LocalCluster
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import running
from tests.integration.test_simulated_cluster import idle

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(180)]

CASES = 3_000
CONCURRENT = 24
MODEL = "tandem-demo"
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0.5},
        {
            "model": MODEL,
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "n"},
                {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "r"},
                {"role": "tool", "content": "4", "tool_call_id": "c"},
            ],
            "max_completion_tokens": 2,
            "stream": True,
            "stream_options": {"include_usage": True},
            "n": 2,
            "seed": 1,
            "stop": ["a"],
            "logprobs": True,
            "top_logprobs": 2,
            "logit_bias": {"5": 1},
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "tool_choice": "none",
        },
    ],
    "/v1/completions": [
        {"model": MODEL, "prompt": ["a", "b"], "max_tokens": 2, "echo": True, "stream": True},
        {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 2, "logprobs": 1, "min_tokens": 1, "stop_token_ids": [3]},
    ],
    "/v1/generate": [
        {
            "prompt": "a",
            "stopping": {"max_tokens": 2, "stop": ["x"]},
            "sampling": {"temperature": 1, "top_k": 5, "logit_bias": {"5": 1.0}},
            "logprobs": {"top_logprobs": 1},
        },
        {"chat": {"messages": [{"role": "user", "content": "hi"}]}, "stopping": {"max_tokens": 1}, "priority": 3},
    ],
    "/v1/generate:unary": [{"token_ids": {"ids": [5, 6]}, "stopping": {"max_tokens": 1}, "guided": {"regex": "a"}}],
    "/v1/tokenize": [{"prompt": "a"}, {"chat": {"messages": [{"role": "user", "content": "hi"}]}}],
    "/v1/detokenize": [{"token_ids": [5, 6], "skip_special_tokens": False}],
}
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 0.5, -0.0, 1e308, -1e308, 2**31, -(2**31) - 1, 2**63, -(2**63) - 1, 2**200, "", "a",
    "\x00", "\ud83d\ude42", "\u202e", "<|end|>", "\\", '"}',
    "x" * 5_000, [], {}, [[]], [{}], {"": ""}, [None], {"a": {"a": {"a": 1}}},
    [1] * 3_000, ["a"] * 200, "NaN", "1", "true",
]  # fmt: skip


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, the value itself included."""
    inner: list[tuple[Any, ...]] = []
    if isinstance(value, dict):
        inner = [found for name, item in value.items() for found in places(item, (*place, name))]
    elif isinstance(value, list):
        inner = [found for number, item in enumerate(value) for found in places(item, (*place, number))]
    return [place, *inner]


def mutated(body: Any, draw: random.Random) -> Any:
    """The same body with a value replaced, removed, doubled or added."""
    body = copy.deepcopy(body)
    place = draw.choice(places(body))
    if not place:
        return draw.choice([draw.choice(ODD), {**body, draw.choice(["mood", "x" * 300, "\n"]): draw.choice(ODD)}])
    holder = body
    for step in place[:-1]:
        holder = holder[step]
    match draw.randrange(5):
        case 0:
            del holder[place[-1]]
        case 1 if isinstance(holder, list):
            holder.append(copy.deepcopy(holder[place[-1]]))
        case 2 if isinstance(holder, dict):
            holder[draw.choice(list(holder))] = holder[place[-1]]
        case _:
            holder[place[-1]] = copy.deepcopy(draw.choice(ODD))
    return body


def case(number: int) -> tuple[str, bytes]:
    """A path and a body, the same for the same number."""
    draw = random.Random(number)
    path = draw.choice(list(BODIES))
    body: Any = draw.choice(BODIES[path])
    for _ in range(draw.randrange(1, 4)):
        body = mutated(body, draw) if isinstance(body, dict) else body
    data = json.dumps(body, allow_nan=True).encode()
    if draw.random() < 0.15 and data:
        at = draw.randrange(len(data))
        data = draw.choice([data[:at], data[:at] + draw.randbytes(3) + data[at:], data + data, b"", b"\xff" + data])
    return path, data


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    """Simulated engines that lose no time, behind an Envoy."""
    flags = {"engine-extra": '{"decode_step_s": 0.0005}'}
    async with running(tmp_path_factory.mktemp("fuzz"), engine="simulated", edge=True, worker_flags=flags) as one:
        yield one


async def test_every_body_is_answered(cluster: LocalCluster) -> None:
    assert cluster.edge is not None
    gate = asyncio.Semaphore(CONCURRENT)
    statuses: Counter[int] = Counter()
    async with httpx.AsyncClient(base_url=f"http://{cluster.edge.address}", timeout=20) as client:

        async def send(number: int) -> None:
            path, data = case(number)
            async with gate:
                # Unbounded budgets are legal and long: the client leaves after the headers, as some do.
                request = client.build_request("POST", path, content=data, headers={"content-type": "application/json"})
                answer = await client.send(request, stream=True)
                try:
                    statuses[answer.status_code] += 1
                    assert answer.status_code in {200, 400, 404, 413, 429, 501}, (number, path, data[:500], answer)
                    if answer.status_code != 200:
                        error = json.loads(await answer.aread())["error"]
                        assert set(error) == {"message", "type", "param", "code"}, (number, error)
                        assert error["message"], number
                        # The simulated engine follows no grammar, and says so.
                        assert (answer.status_code == 501) == (error["code"] == "not_supported"), (number, error)
                finally:
                    await answer.aclose()

        await asyncio.gather(*(send(number) for number in range(CASES)))
        said = await client.post("/v1/chat/completions", json=BODIES["/v1/chat/completions"][0])
        assert said.status_code == 200
    # Both kinds were there, or this has shown nothing.
    assert statuses[200] > CASES / 20
    assert statuses[400] > CASES / 5
    await assert_eventually(lambda: idle(cluster), bool, within_s=5, what="idle engines after all")


BOUNDED = {"stopping": {"max_tokens": 1}}


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/generate:unary"])
async def test_a_body_that_no_context_holds_is_too_large(cluster: LocalCluster, path: str) -> None:
    assert cluster.edge is not None
    async with httpx.AsyncClient(base_url=f"http://{cluster.edge.address}", timeout=20) as client:
        for length in (1_500_000, 7_000_000):
            answer = await client.post(path, json={"model": MODEL, "prompt": "x" * length})
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "request_too_large"
        assert (await client.post(path, json={"model": MODEL, "prompt": "x", **BOUNDED})).status_code == 200
