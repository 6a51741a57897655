"""A queue at prefill that is longer than the engines wait for a hand-over: everything in it is served."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.local_cluster.cluster import LocalCluster
from tests.integration.conftest import running
from tests.integration.support.calls import generate, request_of

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]

PROMPTS = 20
PROMPT_TOKENS = 400
TIMEOUT_S = 4.0
"""Of a hand-over. The prompts take twice as long."""
REAL_PROMPT_TOKENS = 1_500
REAL_TIMEOUT_S = 12.0
SLOW = {"prefill_tokens_per_s": 1_000.0, "decode_step_s": 0.002, "prefix_cache": False}


def flags(frontends: int) -> dict[str, Any]:
    """Settings of a cluster with one slow prefill worker."""
    worker = {"engine-extra": json.dumps(SLOW), "handover-timeout-s": str(TIMEOUT_S), "running-requests-max": "32"}
    queue = {"frontend": {"prefill-queue-s": "0.5"}}
    return {"engine": "simulated", "worker_flags": worker, "role_flags": queue, "frontends": frontends}


def prompt(number: int, tokens: int = PROMPT_TOKENS) -> pb.GenerateRequest:
    """A prompt that no other begins like."""
    ids = [10 + number, *(20 + (number * 7 + place) % 900 for place in range(tokens - 1))]
    return request_of(token_ids=ids, max_tokens=2)


async def seconds(cluster: LocalCluster, request: pb.GenerateRequest, frontend: int = 0) -> tuple[float, int]:
    """How long the request took, and the number of its attempt."""
    began_s = time.monotonic()
    finish = (await generate(cluster, request, frontend=frontend)).finish
    return time.monotonic() - began_s, finish.route.attempt


@pytest.mark.parametrize("frontends", [1, 2])
async def test_a_queue_longer_than_the_hand_over_timeout_is_served(tmp_path: Path, frontends: int) -> None:
    async with running(tmp_path, **flags(frontends)) as cluster:
        asked = [seconds(cluster, prompt(number), number % frontends) for number in range(PROMPTS)]
        took = await asyncio.gather(*asked)
    assert max(second for second, _ in took) > 1.5 * TIMEOUT_S, "the queue was longer than the timeout"
    assert {attempt for _, attempt in took} == {1}


async def test_a_short_prompt_does_not_wait_for_all_long_ones(tmp_path: Path) -> None:
    async with running(tmp_path, **flags(1)) as cluster:
        await generate(cluster, prompt(99))
        burst = [asyncio.create_task(seconds(cluster, prompt(number))) for number in range(PROMPTS)]
        await asyncio.sleep(0.5)
        await generate(cluster, prompt(77, 8))
        before = sum(one.done() for one in burst)
        await asyncio.gather(*burst)
    # Half a second in the frontend, as much at prefill, and the prompts that are being computed: about five.
    assert before <= PROMPTS // 2


@pytest.mark.engine_sglang
@pytest.mark.timeout(400)
async def test_the_same_queue_on_the_real_engine(tmp_path: Path) -> None:
    """As many prompts as take twice the hand-over timeout, on a prefill worker with the smallest chunks."""
    worker = {"dtype": "float32", "handover-timeout-s": str(REAL_TIMEOUT_S), "running-requests-max": "128"}
    roles = {"frontend": {"prefill-queue-s": "0.5"}, "prefill": {"engine-extra": '{"chunked_prefill_size": 128}'}}
    async with running(tmp_path, worker_flags=worker, role_flags=roles) as cluster:
        await generate(cluster, prompt(998, REAL_PROMPT_TOKENS))
        one_s, _ = await seconds(cluster, prompt(997, REAL_PROMPT_TOKENS))
        count = min(100, int(2 * REAL_TIMEOUT_S / one_s) + 1)
        took = await asyncio.gather(*(seconds(cluster, prompt(number, REAL_PROMPT_TOKENS)) for number in range(count)))
    assert max(second for second, _ in took) > REAL_TIMEOUT_S, f"{count} prompts of {one_s:.2f} s were no queue"
    assert {attempt for _, attempt in took} == {1}
