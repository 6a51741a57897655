"""The outages that matter most, with the real engine: its streams run on while registries and Consul are gone.

One pair of SGLang engines, started once. Answers are compared with those the same pair gave before.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from tests.faults.support import verdicts
from tests.faults.support.consul_proofs import generation, kill_first
from tests.faults.support.fault_cluster import Plan, fault_cluster
from tests.faults.support.outage import Place, RequestTrace, last_known, silent, through_outage
from tests.faults.support.process_faults import kill
from tests.faults.support.steady_load import Shape, steady_load
from tests.integration.support.consul_host import consul_servers

pytestmark = [
    pytest.mark.engine_sglang,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs requirements/cpu-engine.txt"),
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(300),
]

LEASE_S = 3.0
DRAW = random.Random(5)
PROMPTS = tuple(tuple(DRAW.randrange(6, 1536) for _ in range(24)) for _ in range(6))
# Each prompt is asked at both lengths in its turn: seven is prime to six.
SHAPE = Shape(rate_per_s=3, prompts=PROMPTS, short_tokens=8, long_tokens=160, long_every=7)
FLOOR = 8


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def place(consul_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Place]:
    logs = tmp_path_factory.mktemp("sglang-outages")
    flags = {"engine": "sglang", "dtype": "float32"}
    async with consul_servers(consul_binary, logs, 1) as consul:
        plan = Plan(consul=consul.address, lease_s=LEASE_S, frontends=1, prefill=1, decode=1, worker_flags=flags)
        async with fault_cluster(logs, plan) as cluster:
            yield Place(cluster, consul)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def trace(place: Place) -> RequestTrace:
    """What is asked, with the answers that an undisturbed pair gives."""
    shape = Shape(rate_per_s=2, prompts=PROMPTS, short_tokens=SHAPE.long_tokens, long_every=0)
    async with steady_load([frontend.address for frontend in place.cluster.frontends], shape) as load:
        await load.wait_ended(len(PROMPTS), within_s=60)
    verdicts.none_failed(load.history)
    answers = {asked.prompt: asked.tokens for asked in load.history.asked}
    assert len({tuple(answer) for answer in answers.values()}) == len(PROMPTS), "they do not depend on the prompt"

    def oracle(prompt: Sequence[int], count: int) -> list[int]:
        return answers[tuple(prompt)][:count]

    return RequestTrace(shape=SHAPE, oracle=oracle, floor=FLOOR, victim=None)


async def test_streams_outlive_a_consul_that_comes_back_with_nothing(place: Place, trace: RequestTrace) -> None:
    before = await generation(place.consul)

    async def end(place: Place) -> None:
        await place.consul.restart(place.consul.first, empty=True)

    await through_outage(place, trace, lambda place: kill_first(place.consul), end, last_known)
    assert await generation(place.consul) != before, "it has kept its memory"


async def test_streams_outlive_both_registries(place: Place, trace: RequestTrace) -> None:
    async def begin(place: Place) -> None:
        for registry in place.cluster.registries:
            await kill(registry)

    async def end(place: Place) -> None:
        await place.cluster.restart("registry-0", "registry-1")

    await through_outage(place, trace, begin, end, silent)
