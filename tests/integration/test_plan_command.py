"""`tandem plan` against a running cluster of simulated engines: what it saw, its answer, and what it refuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tandem.local_cluster.cluster import LocalCluster
from tests.integration.conftest import running
from tests.integration.support.calls import generate, request_of
from tests.integration.support.command_line import TANDEM, run

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]

STEP_S = 0.005
SPEEDS = {"engine-extra": json.dumps({"prefill_tokens_per_s": 20_000, "decode_step_s": STEP_S})}
GOALS = ("--ttft", "5", "--itl", "0.5", "--percentile", "0.9")
REQUESTS, ANSWER_TOKENS = 12, 20


SHAPES: dict[str, dict[str, int]] = {
    "aggregated": {"prefill": 0, "decode": 0, "aggregated": 1},
    "pair": {"prefill": 1, "decode": 1, "aggregated": 0},
}


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=SHAPES)
async def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(shape: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    logs = tmp_path_factory.mktemp("plan")
    async with running(logs, engine="simulated", worker_flags=SPEEDS, **SHAPES[shape]) as started:
        yield started


async def planned(cluster: LocalCluster, tmp_path: Path, *arguments: str) -> tuple[int | None, str, str]:
    command = (*TANDEM, "plan", *arguments, "--address", cluster.registry.address)
    return await run(*command, state=tmp_path / "none.json")


async def test_a_cluster_without_requests_is_refused(cluster: LocalCluster, tmp_path: Path) -> None:
    status, out, err = await planned(cluster, tmp_path, *GOALS, "--window", "30")
    assert (status, out) == (1, "")
    assert err.startswith("tandem plan: no requests seen in the last 30 s")


async def test_a_plan_of_what_a_cluster_saw(cluster: LocalCluster, shape: str, tmp_path: Path) -> None:
    prompts = [f"Once upon a time {number} " * (1 + number) for number in range(REQUESTS)]
    await asyncio.gather(*(generate(cluster, request_of(one, max_tokens=ANSWER_TOKENS)) for one in prompts))
    figures = tmp_path / "plan.json"
    status, out, err = await planned(cluster, tmp_path, *GOALS, "--json", str(figures))
    assert (status, err) == (0, "")
    present = " + ".join(f"{count} {role}" for role, count in SHAPES[shape].items() if count)
    assert f"{present}; {REQUESTS} requests" in out
    for words in ("queue: ", "latency: TTFT p90", "measured: prompts ", "plan: "):
        assert words in out
    assert (", KV transfer " in out) == (shape == "pair")
    plan = json.loads(figures.read_text())
    assert plan["plan"]["reaches"]
    # What was measured is about what the engine was started with, or slower: this machine has other work as well. Steps
    # that were late are caught up with by faster ones.
    assert plan["settings"]["engine"]["decode_step_s"] + plan["settings"]["engine"]["decode_request_s"] > 0.5 * STEP_S
    assert plan["candidates"][0]["counts"] == SHAPES[shape]
    assert plan["candidates"][0]["requests"] == REQUESTS


async def test_goals_that_no_engine_reaches_are_refused_by_name(cluster: LocalCluster, tmp_path: Path) -> None:
    await generate(cluster, request_of("Once", max_tokens=ANSWER_TOKENS))
    status, _, err = await planned(cluster, tmp_path, "--ttft", "5", "--itl", "0.0001")
    assert status == 2
    assert err.startswith("tandem plan: --itl: must be at least one decode step of the fleet's engine")


async def test_a_model_that_is_not_served_is_refused(cluster: LocalCluster, tmp_path: Path) -> None:
    status, _, err = await planned(cluster, tmp_path, *GOALS, "--model", "other")
    assert status == 2
    assert err.startswith("tandem plan: --model: must be one of tandem-demo, not 'other'")


async def test_a_load_that_is_observed_counts(cluster: LocalCluster, tmp_path: Path) -> None:
    """Requests that come while the command reads are in its trace."""
    observing = asyncio.create_task(planned(cluster, tmp_path, *GOALS, "--window", "1", "--observe", "8"))
    sent = 0
    while not observing.done():
        await generate(cluster, request_of(f"Upon {sent}", max_tokens=ANSWER_TOKENS))
        sent += 1
    status, out, err = await observing
    assert (status, err) == (0, "")
    assert sent > 3
    assert "requests (" in out
