"""Conditional disaggregation on the real engine: a pair and an aggregated worker, tokens equal on both ways."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem.local_cluster.cluster import LocalCluster
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import running
from tests.integration.support.calls import Stream, generate, request_of

pytestmark = [
    pytest.mark.engine_sglang,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs requirements/cpu-engine.txt"),
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(300),
]

MAX_TOKENS = 100
"""Below it a prompt is short; the demo model's tests have prompts of up to 600 tokens."""
NEW_TOKENS = 16


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def mixed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    """A prefill, a decode and an aggregated worker."""
    flags = {"frontend": {"local-prefill-max-tokens": str(MAX_TOKENS)}}
    logs = tmp_path_factory.mktemp("mixed")
    async with running(logs, aggregated=1, worker_flags={"dtype": "float32"}, role_flags=flags) as cluster:

        async def placement() -> int:
            return (await answer(cluster, 5)).finish.route.placement

        await assert_eventually(
            placement, lambda found: found == generation_pb2.PLACEMENT_SHORT_PROMPT, what="a load report"
        )
        yield cluster


def request(length: int) -> pb.GenerateRequest:
    draw = random.Random(length)
    prompt = [draw.randrange(6, 1536) for _ in range(length)]
    return request_of(token_ids=prompt, max_tokens=NEW_TOKENS, ignore_eos=True)


async def answer(cluster: LocalCluster, length: int) -> Stream:
    return await generate(cluster, request(length))


async def test_prompts_go_by_their_length_and_tokens_are_equal_on_both_ways(mixed: LocalCluster) -> None:
    first: dict[int, list[int]] = {}
    for length in (MAX_TOKENS - 1, MAX_TOKENS, MAX_TOKENS + 1, 400):
        stream = await answer(mixed, length)
        first[length], finish = stream.token_ids, stream.finish
        is_local = length <= MAX_TOKENS
        expected = generation_pb2.PLACEMENT_SHORT_PROMPT if is_local else generation_pb2.PLACEMENT_LONG_PROMPT
        assert finish.route.placement == expected
        workers = ("", "aggregated-0") if is_local else ("prefill-0", "decode-0")
        assert (finish.route.prefill_worker_id, finish.route.decode_worker_id) == workers
        assert (finish.timings.kv_transfer_bytes > 0) == (not is_local), "KV moves on a pair, and only there"
    # The same prompts the other way: first without the aggregated worker, then without the prefill worker.
    for stopped, left, lengths in (
        ("aggregated-0", "decode-0", (MAX_TOKENS - 1, MAX_TOKENS)),
        ("prefill-0", "aggregated-0", (MAX_TOKENS + 1, 400)),
    ):
        if stopped == "prefill-0":
            await mixed.restart("aggregated-0")
        await mixed.process(stopped).stop()
        for length in lengths:
            stream = await answer(mixed, length)
            assert stream.finish.route.decode_worker_id == left
            assert stream.token_ids == first[length]
