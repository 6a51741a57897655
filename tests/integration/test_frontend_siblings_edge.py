"""A frontend of two processes behind a real edge, and one that asks for certificates: all of it is as with one process.

What a dead process costs is seen by clients of HTTP here; natively it is in test_frontend_siblings.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tandem.client import admin_calls, calls
from tandem.errors import StartError, TandemError
from tandem.local_cluster.child_process import ClusterProcess
from tandem.local_cluster.cluster import LocalCluster
from tandem.observability.merged_scrape import LABEL
from tandem.testing.eventually import assert_eventually
from tandem.tls.authority import issue_all
from tandem.tls.paths import client_tls
from tests.integration.support.calls import request_of
from tests.integration.support.edge_host import client_of, error_of
from tests.integration.support.openai_calls import MODEL, ask, chat, completion
from tests.integration.support.scraped import samples, scrape
from tests.integration.test_frontend_siblings import Processes, several
from tests.integration.test_openai_door import CHAT_IDS, TOKENIZER, text_of
from tests.integration.test_simulated_cluster import STORY, oracle

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]

COUNT = 2
STREAMS = 32
"""With eight of them on a connection, Envoy's two threads need four connections at least."""
ENGINE = {
    "engine-extra": json.dumps({"decode_step_s": 0.01}),
    "running-requests-max": "64",
    "kv-capacity-tokens": "100000",
}
"""Has room for all of them at a time."""


def edge_of(cluster: LocalCluster) -> ClusterProcess:
    assert cluster.edge is not None
    return cluster.edge


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    async with several(tmp_path_factory.mktemp("edge"), ENGINE, count=COUNT, edge=True, metrics=True) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def client(cluster: LocalCluster) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(edge_of(cluster), limits=httpx.Limits(max_connections=None)) as opened:
        yield opened


async def by_process(cluster: LocalCluster, name: str) -> Counter[str]:
    """A metric of each process that serves."""
    assert cluster.frontend.metrics_address is not None
    found: Counter[str] = Counter()
    for sample, labels, value in samples(await scrape(cluster.frontend.metrics_address)):
        if sample == name and labels[LABEL] != "parent":
            found[labels[LABEL]] += int(value)
    return found


async def events_of(client: httpx.AsyncClient, body: dict[str, Any], begun: list[str] | None = None) -> list[str]:
    """The events of a stream of OpenAI's API, as far as it came; the first piece of it is noted in `begun`."""
    text = ""
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, await response.aread()
            async for piece in response.aiter_text():
                if begun is not None and not text:
                    begun.append(piece)
                text += piece
    except httpx.RemoteProtocolError:
        text += "\n\ncut off"
    return [event.removeprefix("data: ") for event in text.strip().split("\n\n")]


def text_in(events: list[str]) -> str:
    return "".join(json.loads(event)["choices"][0]["text"] for event in events if event.startswith("{"))


async def test_answers_are_those_of_one_process(cluster: LocalCluster, client: httpx.AsyncClient) -> None:
    for _ in range(2 * COUNT):
        whole = (await client.post("/v1/chat/completions", json=chat())).json()
        assert whole["choices"][0]["message"]["content"] == text_of(CHAT_IDS)
        native = (await ask(cluster.frontend.address, "ChatCompletions", chat())).json
        assert {**whole, "id": 0, "created": 0, "usage": 0} == {**native, "id": 0, "created": 0, "usage": 0}
        streamed = await events_of(client, completion(stream=True))
        assert streamed[-1] == "[DONE]"
        assert (
            text_in(streamed) == (await client.post("/v1/completions", json=completion())).json()["choices"][0]["text"]
        )
        several_choices = (await client.post("/v1/completions", json=completion(n=3))).json()["choices"]
        assert [choice["index"] for choice in several_choices] == [0, 1, 2]
        models = (await client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in models] == [MODEL]
        refused = await client.post("/v1/chat/completions", json=chat(temperature=9))
        assert (refused.status_code, error_of(refused)["param"]) == (400, "temperature")
        unknown = await client.post("/v1/chat/completions", json={**chat(), "model": "missing"})
        assert unknown.status_code == 404
        healthy = await client.get("/healthz")
        assert healthy.status_code == 200


async def test_an_edges_connections_reach_every_process(cluster: LocalCluster, client: httpx.AsyncClient) -> None:
    before = await by_process(cluster, "tandem_requests_admitted_total")
    bodies = [completion(f"{STORY} {n}", max_tokens=500, stream=True, ignore_eos=True) for n in range(STREAMS)]
    streams = [asyncio.create_task(events_of(client, body)) for body in bodies]
    await assert_eventually(
        lambda: by_process(cluster, "tandem_requests_open"), lambda found: sum(found.values()) == STREAMS, every_s=0.1
    )
    share = await by_process(cluster, "tandem_requests_open")
    connections = await by_process(cluster, "tandem_connections_open")
    for events in await asyncio.gather(*streams):
        assert events[-1] == "[DONE]"
    after = await by_process(cluster, "tandem_requests_admitted_total")
    admitted = after - before
    assert sum(admitted.values()) == STREAMS
    assert min(share[str(number)] for number in range(COUNT)) >= STREAMS // 4, share
    assert all(connections[str(number)] >= 2 for number in range(COUNT)), connections


async def test_a_request_is_found_by_the_id_that_the_edge_gave_it(
    cluster: LocalCluster, client: httpx.AsyncClient
) -> None:
    answers = await asyncio.gather(*(client.post("/v1/completions", json=completion()) for _ in range(8)))
    for answer in answers:
        call_id = answer.headers["x-request-id"]
        for _ in range(COUNT):
            (timeline,) = await admin_calls.request_timelines(cluster.frontend.address, call_id)
            assert timeline.call_id == call_id
            assert timeline.edge_begin.time.ToNanoseconds() <= timeline.begin.time.ToNanoseconds(), "from the edge on"
            assert timeline.HasField("edge_begin")


async def test_over_http_a_killed_process_costs_its_own_streams_only(
    cluster: LocalCluster, client: httpx.AsyncClient
) -> None:
    processes = Processes(cluster)
    bodies = [completion(f"{STORY} {n}", max_tokens=200, stream=True, ignore_eos=True) for n in range(STREAMS)]
    begun: list[str] = []
    streams = [asyncio.create_task(events_of(client, body, begun)) for body in bodies]
    await assert_eventually(lambda: len(begun) == STREAMS)
    found = await processes.open_requests()
    assert sum(map(len, found.values())) == STREAMS
    os.kill(processes.pids[0], signal.SIGKILL)
    # Until Envoy has seen the end of the connections, a request may be sent to the dead one: it is one of those it had.
    await assert_eventually(lambda: sum(stream.done() for stream in streams) == len(found[0]), within_s=2)
    meanwhile = await asyncio.gather(*(client.post("/v1/completions", json=completion()) for _ in range(8)))
    assert {answer.status_code for answer in meanwhile} == {200}
    ended = await asyncio.gather(*streams)
    whole = [number for number, events in enumerate(ended) if events[-1] == "[DONE]"]
    assert STREAMS - len(whole) == len(found[0]), "exactly those that it had"
    for number in whole:
        expected = TOKENIZER.decode(oracle(f"{STORY} {number}", 200), skip_special_tokens=True)
        assert text_in(ended[number]) == expected
    await processes.all_serve(count=COUNT)
    assert (await client.get("/healthz")).status_code == 200


async def test_with_tls_every_process_asks_for_a_certificate(tmp_path: Path) -> None:
    certs = tmp_path / "certs"
    certs.mkdir()
    issue_all(certs)
    async with several(tmp_path, ENGINE, count=COUNT, tls=certs) as cluster:
        tls = client_tls(certs)
        address = cluster.frontend.address

        async def tokens(number: int) -> list[int]:
            found: list[int] = []
            request = request_of(f"{STORY} {number}", max_tokens=30)
            async for event in calls.generate(address, request, 30, tls=tls):
                found += event.chunk.token_ids
            return found

        streams = await asyncio.gather(*(tokens(number) for number in range(8)))
        assert streams == [oracle(f"{STORY} {number}", 30) for number in range(8)]
        stats = await admin_calls.frontend_figures(address, tls=tls)
        assert (stats.processes, stats.finished_requests) == (COUNT, 8)
        for _ in range(2 * COUNT):
            with pytest.raises((TandemError, StartError)):
                await calls.is_serving(address)
            assert await calls.is_serving(address, tls=tls)
