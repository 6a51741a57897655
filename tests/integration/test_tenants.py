"""Tenants end to end, on simulated engines: two frontends of two processes each behind a real Envoy with API keys.

Quotas hold over all four processes; the headers, the error and the billing lines say what happened; caches are apart.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tandem.errors import InvalidRequest, QuotaExceeded
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import DEMO_MODEL, SIMULATED, running
from tests.integration.support import baseline
from tests.integration.support.calls import request_of
from tests.integration.support.edge_host import client_of, error_of
from tests.integration.support.openai_calls import MODEL
from tests.integration.support.tenant_calls import generate_as, open_streams_as, usage_lines

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]

QUOTAS = {
    "free": "",
    "minute": "requests_per_minute=20",
    "words": "tokens_per_minute=600",
    "few": "open_requests=2 requests_per_minute=1000 tokens_per_minute=1000000",
    "changed": "requests_per_minute=1",
}
SLOW = {"engine-extra": json.dumps({"decode_step_s": 0.05})}


def key_of(client: str) -> str:
    return f"sk-{client}-0123456789abcdef"


def keys_text(quotas: dict[str, str]) -> str:
    return "".join(f"{client}: {key_of(client)} {quota}\n" for client, quota in quotas.items())


@dataclass(frozen=True)
class World:
    cluster: LocalCluster
    client: httpx.AsyncClient
    keys: Path
    log: Path

    async def ask(self, client: str, **body: Any) -> httpx.Response:
        """A completion, as a client of HTTP."""
        given = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 4, **body}
        headers = {"authorization": f"Bearer {key_of(client)}", **given.pop("headers", {})}
        return await self.client.post("/v1/completions", json=given, headers=headers)

    async def lines(self, client: str, count: int) -> list[dict[str, Any]]:
        """The usage lines of a client, once there are so many."""
        return await assert_eventually(
            lambda: [line for line in usage_lines(self.log.read_text()) if line["tenant"] == client],
            lambda lines: len(lines) >= count,
            what=f"{count} lines of {client}",
        )


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    directory = tmp_path_factory.mktemp("tenants")
    keys, log = directory / "keys", directory / "usage.jsonl"
    keys.write_text(keys_text(QUOTAS))
    keys.chmod(0o600)
    flags = {"edge": {"api-keys": str(keys)}, "frontend": {"usage-log": str(log)}}
    spec: dict[str, Any] = {"engine": "simulated", "frontends": 2, "frontend_processes": 2, "edge": True}
    spec |= {"model": DEMO_MODEL, "log_directory": directory, "worker_flags": SLOW, "role_flags": flags}
    async with LocalCluster(ClusterSpec(**spec)) as cluster:
        assert cluster.edge is not None
        # From the first caller with a quota on, each process follows the others.
        for frontend in cluster.frontends:
            async with open_streams_as("first;open_requests=100", [frontend.address] * 8, request_of("Once")):
                pass
        before = await baseline.take(cluster)
        async with client_of(cluster.edge) as client:
            yield World(cluster, client, keys, log)
        await baseline.assert_back(cluster, before)


def addresses_of(world: World) -> list[str]:
    return [frontend.address for frontend in world.cluster.frontends]


async def test_a_quota_of_requests_holds_over_all_frontends_and_says_when_to_return(world: World) -> None:
    admitted: list[httpx.Response] = []
    refused: list[httpx.Response] = []
    for _ in range(40):
        response = await world.ask("minute", max_tokens=1)
        (admitted if response.status_code == 200 else refused).append(response)
    assert 20 <= len(admitted) <= 20 + 4, "a minute's worth, what is refilled meanwhile, and what is on the way"
    left = [int(response.headers["x-ratelimit-remaining-requests"]) for response in admitted]
    assert left[0] == 19
    assert left[-1] == 0
    assert {response.headers["x-ratelimit-limit-requests"] for response in (*admitted, *refused)} == {"20"}
    assert "x-ratelimit-limit-tokens" not in admitted[0].headers
    for response in refused:
        assert response.status_code == 429
        error = error_of(response)
        assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "quota_exceeded", None)
        assert "requests_per_minute" in error["message"]
        assert 1 <= int(response.headers["retry-after"]) <= 3 * (len(admitted) - 20 + 1) + 1, "one in three seconds"
        assert response.headers["x-ratelimit-remaining-requests"] == "0"
        assert response.headers["x-ratelimit-reset-requests"].startswith(("5", "1m"))


async def test_a_stream_has_the_headers_too(world: World) -> None:
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 3, "stream": True}
    headers = {"authorization": f"Bearer {key_of('few')}"}
    async with world.client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["x-ratelimit-limit-open-requests"] == "2"
        assert response.headers["x-ratelimit-remaining-open-requests"] == "1"
        assert response.headers["x-ratelimit-limit-tokens"] == "1000000"
        assert b"[DONE]" in await response.aread()


async def test_tokens_of_prompts_and_answers_count_and_are_waited_for(world: World) -> None:
    first = await world.ask("words", prompt=[9] * 300, max_tokens=8, ignore_eos=True)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-limit-tokens"] == "600"
    assert int(first.headers["x-ratelimit-remaining-tokens"]) in range(292, 310), "all of it had been used by then"
    second = await world.ask("words", prompt=[9] * 400, max_tokens=8, ignore_eos=True)
    assert second.status_code == 200, "tokens were left, and what is beyond them is owed"
    third = await assert_refused(world, "words")
    assert "tokens_per_minute" in error_of(third)["message"]
    assert third.headers["x-ratelimit-remaining-tokens"] == "0"
    assert int(third.headers["retry-after"]) in range(5, 14)


async def assert_refused(world: World, client: str) -> httpx.Response:
    """What another process admitted is known everywhere within a moment."""
    return await assert_eventually(
        lambda: world.ask(client, max_tokens=1), lambda response: response.status_code == 429, what="a refusal"
    )


async def test_open_requests_count_over_both_frontends_until_they_end(world: World) -> None:
    quota, long = "few-direct;open_requests=2", request_of("Once", max_tokens=400, ignore_eos=True)
    one, other = addresses_of(world)
    short = request_of("Once", max_tokens=1)
    for address in (one, other):
        await generate_as(quota, address, short)
    async with open_streams_as(quota, [one, other], long):
        for address in (one, other):
            await assert_eventually(partial(refusal_of, quota, address), lambda limit: limit == "open_requests")
    await assert_eventually(lambda: refusal_of(quota, one), lambda limit: limit is None, what="room again")


async def refusal_of(quota: str, address: str) -> str | None:
    try:
        await generate_as(quota, address, request_of("Once", max_tokens=1))
    except QuotaExceeded as refused:
        return refused.metadata["limit"]
    return None


async def test_more_choices_than_may_be_open_are_refused_by_their_field(world: World) -> None:
    response = await world.ask("few", n=3)
    assert response.status_code == 400
    assert error_of(response)["param"] == "n"
    with pytest.raises(InvalidRequest, match="x-client-id"):
        await generate_as("few;open_requests=none", addresses_of(world)[0], request_of("Once"))


async def test_a_changed_quota_and_a_forged_one(world: World) -> None:
    """The keys' file is read again, and what a client says of itself is dropped at the edge."""
    assert (await world.ask("changed")).status_code == 200
    await assert_refused(world, "changed")
    for forged in ("free", "changed;requests_per_minute=9000"):
        assert (await world.ask("changed", headers={"x-client-id": forged})).status_code == 429
    world.keys.write_text(keys_text({**QUOTAS, "changed": "requests_per_minute=100000"}))
    response = await assert_eventually(
        lambda: world.ask("changed"), lambda response: response.status_code == 200, what="the new quota"
    )
    assert response.headers["x-ratelimit-limit-requests"] == "100000"
    assert "x-ratelimit-limit-requests" not in (await world.ask("free")).headers


async def test_each_call_leaves_one_line_for_billing(world: World) -> None:
    before = len([line for line in usage_lines(world.log.read_text()) if line["tenant"] == "free"])
    answered = await world.ask("free", prompt=["Once upon", "a time"], n=2, max_tokens=5)
    assert answered.status_code == 200
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 400, "stream": True, "ignore_eos": True}
    headers = {"authorization": f"Bearer {key_of('free')}"}
    async with world.client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        lines = response.aiter_lines()
        for _ in range(12):
            await anext(lines)
    added = (await world.lines("free", before + 2))[before:]
    by_outcome = {line["outcome"]: line for line in added}
    usage = answered.json()["usage"]
    finished = by_outcome["finished"]
    assert finished["prompt_tokens"] == usage["prompt_tokens"]
    assert finished["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert finished["completion_tokens"] == usage["completion_tokens"] == 4 * 5
    assert finished["choices"] == 4
    assert finished["model"] == MODEL
    assert finished["call_id"] == answered.headers["x-request-id"]
    cancelled = by_outcome["cancelled"]
    assert cancelled["reason"] == "client_left"
    assert 0 < cancelled["completion_tokens"] < 400
    assert cancelled["prompt_tokens"] > 0
    assert "Once" not in json.dumps(added)


async def test_tenants_do_not_share_a_cache_and_one_tenant_does_over_all_frontends(world: World) -> None:
    one, other = addresses_of(world)
    prompt = request_of(token_ids=[20 + number % 1_000 for number in range(256)], max_tokens=2)

    async def cached(client: str, address: str) -> int:
        return (await generate_as(client, address, prompt))[0].finish.usage.cached_tokens

    assert await cached("alice", one) == 0
    assert await cached("alice", other) > 200
    assert await cached("bob", other) == 0
    assert await cached("bob;requests_per_minute=1000", one) > 200, "a quota is no part of the tenant"


async def test_with_shared_caches_tenants_find_each_others_prefixes(tmp_path: Path) -> None:
    flags = {"frontend": {"cache-sharing": "all"}}
    async with running(tmp_path, engine="simulated", worker_flags=SIMULATED, role_flags=flags) as cluster:
        prompt = request_of(token_ids=[20 + number % 1_000 for number in range(256)], max_tokens=2)
        for client, is_cached in (("alice", False), ("bob", True)):
            response, _ = await generate_as(client, cluster.frontend.address, prompt)
            assert (response.finish.usage.cached_tokens > 200) == is_cached


async def test_a_burst_at_all_processes_at_once_is_bounded_and_owed(world: World) -> None:
    """Each process may admit a minute's worth before it knows of the others, and no more; then all wait."""
    quota, processes = 10, 4
    client = f"burst;requests_per_minute={quota}"
    one, other = addresses_of(world)
    results = await asyncio.gather(*(refusal_of(client, address) for _ in range(3 * quota) for address in (one, other)))
    admitted = results.count(None)
    assert quota <= admitted <= processes * quota
    await assert_eventually(lambda: refusal_of(client, one), lambda limit: limit == "requests_per_minute")
