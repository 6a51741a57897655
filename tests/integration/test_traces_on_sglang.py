"""Traces of the real engine at a real OTLP receiver: parentage, order, times that add up, and the bytes of the KV."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import pytest
import pytest_asyncio

from tandem.client import calls
from tandem.local_cluster.cluster import LocalCluster
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import DEMO_MODEL, running
from tests.integration.support.calls import Stream, generate, request_of
from tests.integration.support.otlp_receiver import Received, Receiver, receiver
from tests.integration.test_traces import ALL, DECODE_STEPS, FRONTEND_STEPS, PREFILL_STEPS, one

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.engine_sglang, pytest.mark.timeout(600)]

FLOAT32_BYTES = 4
STORY = "Once upon a time there was a fox who lived in a small house by the river with her friends. "
TTFT_SHARE = 0.05
BUSY_S = 0.02
"""What a process may wait for a core between two spans."""
ENGINE = "tandem-engine"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def collector() -> AsyncIterator[Receiver]:
    async with receiver() as kept:
        yield kept


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pair(collector: Receiver, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    logs = tmp_path_factory.mktemp("traces-sglang")
    flags = {"dtype": "float32", "engine-spans": "true"}
    async with running(logs, otlp_endpoint=collector.address, worker_flags=flags) as cluster:
        for _ in range(3):
            # The first requests compile and connect.
            await generate(cluster, request_of(STORY, max_tokens=4))
        yield cluster


async def traced(pair: LocalCluster, collector: Receiver, prompt: str) -> tuple[Stream, list[Received]]:
    stream = await generate(pair, request_of(prompt, max_tokens=16))
    spans = await collector.trace(stream.accepted.request_id, *ALL)
    return stream, [span for span in spans if span.service != ENGINE]


async def test_the_engines_own_spans_are_below_the_legs(pair: LocalCluster, collector: Receiver) -> None:
    _, spans = await traced(pair, collector, STORY)
    legs = {one(spans, f"{role} leg").span_id for role in ("prefill", "decode")}

    def parents() -> set[str]:
        return {s.parent_id for s in collector.spans if s.service == ENGINE} & legs

    await assert_eventually(parents, lambda found: found == legs, within_s=15, what="spans of both engines")


async def test_one_tree_in_order(pair: LocalCluster, collector: Receiver) -> None:
    _, spans = await traced(pair, collector, STORY * 8)
    root = one(spans, "generate")
    attempt = one(spans, "attempt", root)
    prefill, decode = one(spans, "prefill leg", attempt), one(spans, "decode leg", attempt)
    for parent, names in ((root, FRONTEND_STEPS), (prefill, PREFILL_STEPS), (decode, DECODE_STEPS)):
        steps = [one(spans, name, parent) for name in names]
        assert [s.begin_s for s in steps] == sorted(s.begin_s for s in steps), names
    for child in (attempt, prefill, decode):
        # A worker closes its leg after it has said its last word, which the frontend does not wait for.
        assert root.begin_s <= child.begin_s <= child.end_s <= root.end_s + 0.1, child.name
    # Decode has memory for the KV before prefill computes, and its first token after the KV has come.
    assert one(spans, "pre-allocate").end_s <= one(spans, "prefill").end_s
    assert one(spans, "transfer").end_s <= one(spans, "first token").end_s
    assert len(spans) == len(ALL)


async def test_times_add_up_to_what_the_client_waits(pair: LocalCluster, collector: Receiver) -> None:
    """The way to the first token, span by span: nothing is counted twice, and next to nothing is missing."""
    for number in range(5):
        stream, spans = await traced(pair, collector, f"{number} {STORY * 12}")
        ttft_s = stream.finish.timings.time_to_first_token.ToNanoseconds() / 1e9
        way = ("admit", "tokenise", "wait", "route", "dispatch", "await first token")
        total_s = sum(one(spans, name).duration_s for name in way)
        assert total_s == pytest.approx(ttft_s, rel=TTFT_SHARE, abs=BUSY_S)
        decode = one(spans, "decode leg")
        steps = [one(spans, name, decode) for name in ("submit", "pre-allocate", "wait for KV", "first token")]
        # Without a gap between two, and within what the frontend waited: the way there and back is all that is left.
        for step, following in pairwise(steps):
            assert following.begin_s == pytest.approx(step.end_s, abs=0.001), following.name
        waited_s = one(spans, "dispatch").duration_s + one(spans, "await first token").duration_s
        assert waited_s / 2 - BUSY_S < sum(step.duration_s for step in steps) <= waited_s + 0.001


async def test_the_bytes_are_the_models_arithmetic(pair: LocalCluster, collector: Receiver) -> None:
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    token_bytes = config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * head_dim * FLOAT32_BYTES
    workers = await calls.list_workers(pair.registry.address)
    page_tokens = workers[0].worker.capabilities.page_size_tokens
    for repeats in (1, 7):
        stream, spans = await traced(pair, collector, f"{repeats} {STORY * repeats}")
        pages = -(-stream.accepted.prompt_tokens // page_tokens)
        for name in ("prefill leg", "transfer", "decode leg", "wait for KV", "generate"):
            assert one(spans, name).attributes["tandem.kv_transfer_bytes"] == pages * page_tokens * token_bytes, name
        assert one(spans, "decode leg").attributes["tandem.recomputed_tokens"] == 0


async def test_every_log_is_json_with_the_ids_of_the_request(pair: LocalCluster, collector: Receiver) -> None:
    stream, spans = await traced(pair, collector, "Zebedee whispers")
    lines = [json.loads(line) for line in Path(pair.frontend.log).read_text().splitlines()]
    (entry,) = [line for line in lines if line.get("request_id") == stream.accepted.request_id]
    root = one(spans, "generate")
    assert entry["trace_id"] == root.trace_id
    assert entry["ttft_ms"] == pytest.approx(root.attributes["tandem.ttft_s"] * 1000, abs=0.01)
    assert entry["workers"] == ["prefill-0", "decode-0"]
    for process in pair.processes:
        assert not re.search("Zebedee|whispers", process.log.read_text()), process.name
