"""Request ids are labels: requests with one id, at once or one after the other, anywhere, do not affect each other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import pytest
import pytest_asyncio

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.client import calls
from tandem.client.admin_calls import request_timelines
from tandem.local_cluster.cluster import LocalCluster
from tests.integration.conftest import SIMULATED, running
from tests.integration.support.calls import request_of
from tests.integration.support.edge_host import client_of
from tests.integration.test_simulated_cluster import STORY, oracle

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

TOKENS = 200
EXPECTED = oracle(STORY, TOKENS)
Events = AsyncGenerator[pb.GenerateResponse, None]


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=[1, 3], ids=["one-pair", "three-pairs"])
async def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LocalCluster]:
    """Two frontends and an edge before one worker of each role, or three."""
    spec = {"engine": "simulated", "frontends": 2, "edge": True, "worker_flags": SIMULATED}
    logs = tmp_path_factory.mktemp("request-ids")
    async with running(logs, prefill=request.param, decode=request.param, **spec) as cluster:
        yield cluster


def addresses(cluster: LocalCluster, placement: str) -> list[str]:
    first, second = (frontend.address for frontend in cluster.frontends)
    return {"same": [first] * 4, "both": [first, second] * 2}[placement]


async def begun(address: str, request_id: str) -> tuple[Events, list[int]]:
    """A stream that has its first token, and what it has received."""
    request = request_of(STORY, max_tokens=TOKENS)
    request.request_id = request_id
    events = calls.generate(address, request)
    accepted = await anext(events)
    assert accepted.accepted.request_id == request_id
    return events, await received(events, count=1)


async def received(events: Events, count: int = TOKENS) -> list[int]:
    """At least so many tokens; with all of them, the stream has ended."""
    tokens: list[int] = []
    async for event in events:
        tokens += event.chunk.token_ids
        if count <= len(tokens) < TOKENS:
            break
    return tokens


@pytest.mark.parametrize("placement", ["same", "both"])
async def test_requests_of_one_id_at_once_are_all_served(cluster: LocalCluster, placement: str) -> None:
    request_id = f"at-once-{placement}"
    places = addresses(cluster, placement)
    streams = await asyncio.gather(*(begun(address, request_id) for address in places))
    rests = await asyncio.gather(*(received(events) for events, _ in streams))
    assert [first + rest for (_, first), rest in zip(streams, rests, strict=True)] == [EXPECTED] * len(places)
    known = [await request_timelines(address, request_id) for address in sorted(set(places))]
    assert sum(map(len, known)) == len(places)


@pytest.mark.parametrize("placement", ["same", "both"])
async def test_the_cancellation_of_one_request_ends_no_other_of_its_id(cluster: LocalCluster, placement: str) -> None:
    given_up, *kept = await asyncio.gather(
        *(begun(address, f"cancel-{placement}") for address in addresses(cluster, placement))
    )
    await given_up[0].aclose()
    for events, first in kept:
        assert first + await received(events) == EXPECTED


async def test_an_id_can_be_used_again(cluster: LocalCluster) -> None:
    for address in addresses(cluster, "both"):
        events, first = await begun(address, "again")
        assert first + await received(events) == EXPECTED


async def test_http_requests_of_one_id_are_all_served(cluster: LocalCluster) -> None:
    """The request id of /v1/generate, and an x-request-id at OpenAI's API."""
    assert cluster.edge is not None
    own = {
        "request_id": "http",
        "prompt": STORY,
        "sampling": {"temperature": 0},
        "stopping": {"max_tokens": TOKENS, "ignore_eos": True},
    }
    openai = {"model": cluster.spec.model.name, "prompt": STORY, "max_tokens": 8, "temperature": 0}
    async with client_of(cluster.edge) as client:
        answers = await asyncio.gather(*(client.post("/v1/generate:unary", json=own) for _ in range(4)))
        assert [answer.json()["token_ids"] for answer in answers] == [EXPECTED] * 4
        headers = {"x-request-id": "one-call"}
        answers = await asyncio.gather(
            *(client.post("/v1/completions", json=openai, headers=headers) for _ in range(4))
        )
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({answer.json()["id"] for answer in answers}) == 4
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
