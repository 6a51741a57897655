"""Adapters on the real engine: a pair's tokens are an aggregated engine's, also with eight of them in one batch."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.client import calls
from tandem.client.adapter_calls import load_adapter, unload_adapter
from tandem.errors import AdapterRefused, ModelNotFound
from tandem.local_cluster.child_process import ClusterProcess
from tandem.local_cluster.cluster import LocalCluster
from tandem.testing.adapters import write_adapter
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import DEMO_MODEL
from tests.integration.support.calls import Stream, generate, request_of

pytestmark = [
    pytest.mark.engine_sglang,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs requirements/cpu-engine.txt"),
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(300),
]

COUNT = 8
MODULES = (("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
PROMPT = "Mia hid the red key in the old barn. Where did Mia hide the red key? " * 3
PAIR, ALONE = "tandem-demo", "alone"
LOAD_S_MAX = 2.0


async def ask(cluster: LocalCluster, model: str, tokens: int = 12) -> Stream:
    request = request_of(PROMPT, max_tokens=tokens)
    request.sampling.temperature = 0.0
    request.model = model
    return await generate(cluster, request)


async def load(cluster: LocalCluster, name: str, path: str, model: str) -> None:
    """Load an adapter while a request runs; it takes at most LOAD_S_MAX at each worker."""
    begin_s = time.monotonic()
    response = await load_adapter(cluster.registry.address, name, path, model=model)
    took_s = max(one.duration.ToNanoseconds() / 1e9 for one in response.workers)
    total_s = time.monotonic() - begin_s
    print(f"{name}: {took_s:.3f} s at the slowest of {len(response.workers)}, {total_s:.3f} s in all")
    assert took_s < LOAD_S_MAX


@contextlib.asynccontextmanager
async def aggregated(cluster: LocalCluster, root: Path, run: Path) -> AsyncIterator[None]:
    """One aggregated worker of the same files under another name, with an adapter from its start."""
    flags = {"registry": cluster.registry.address, "model": str(DEMO_MODEL), "model-name": ALONE, "engine": "sglang"}
    flags |= {"role": "aggregated", "worker-id": ALONE, "dtype": "float32"}
    flags |= {"adapter-root": str(root), "adapters": f"alone-0={root / '0'}"}
    worker = ClusterProcess(ALONE, "aggregated", flags, cluster.log_directory)
    await worker.start(run)
    try:
        await worker.wait_ready()
        yield
    finally:
        await worker.stop()


async def names(cluster: LocalCluster) -> set[str]:
    return {model.name for model in await calls.list_models(cluster.frontend.address)}


async def test_a_pair_generates_with_eight_mixed_adapters_what_an_aggregated_engine_does(
    http_pair: LocalCluster, temporary: Path
) -> None:
    cluster, root = http_pair, Path(http_pair.workers[0].flags["adapter-root"])
    for number in range(COUNT):
        write_adapter(root / f"{number}", DEMO_MODEL, number, modules=MODULES[number % 2], scale=0.2)
    pairs, alone = ([PAIR, *(f"{kind}-{number}" for number in range(COUNT))] for kind in ("pair", "alone"))
    alone[0] = ALONE
    async with aggregated(cluster, root, temporary):
        await assert_eventually(lambda: names(cluster), lambda found: "alone-0" in found, within_s=20)
        # Requests run on both while adapters are loaded, and none of them fails.
        during = [asyncio.create_task(ask(cluster, model, 200)) for model in (PAIR, ALONE)]
        for number in range(COUNT):
            await load(cluster, f"pair-{number}", str(number), PAIR)
            await load(cluster, f"alone-{number}", str(number), ALONE)
        streams = await asyncio.gather(*during)
        assert streams[0].token_ids == streams[1].token_ids
        await assert_eventually(lambda: names(cluster), lambda found: {*pairs, *alone} <= found, within_s=20)
        reference = [(await ask(cluster, name)).token_ids for name in alone]
        assert len(set(map(tuple, reference))) == len(reference), "each adapter changes the tokens in its own way"
        mixed = await asyncio.gather(*(ask(cluster, name) for name in pairs * 2))
        for name, stream, tokens in zip(pairs * 2, mixed, reference * 2, strict=True):
            assert (name, stream.token_ids) == (name, tokens)
            assert stream.finish.timings.kv_transfer_bytes > 0
            assert stream.finish.route.decode_worker_id == "decode-0"
        await assert_an_adapter_of_another_shape_is_refused(cluster, root)
        assert (await ask(cluster, "pair-4")).token_ids == reference[pairs.index("pair-4")]
        listed = {model.name: model for model in await calls.list_models(cluster.frontend.address)}
        assert (listed["pair-4"].parent, listed["pair-4"].state) == (PAIR, pb.MODEL_STATE_SERVING)
        assert listed["pair-4"].adapter_digest == listed["alone-4"].adapter_digest
    for name in pairs[1:]:
        await unload_adapter(cluster.registry.address, name)
    await assert_eventually(lambda: names(cluster), lambda found: found.isdisjoint(pairs[1:]), within_s=20)
    with pytest.raises(ModelNotFound, match="'pair-3' not found"):
        await ask(cluster, "pair-3")


async def assert_an_adapter_of_another_shape_is_refused(cluster: LocalCluster, root: Path) -> None:
    """It would end SGLang's scheduler at its first request."""
    damaged = write_adapter(root / "damaged", DEMO_MODEL, 7)
    file = damaged / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 4}))
    with pytest.raises(AdapterRefused, match="has the shape"):
        await load_adapter(cluster.registry.address, "damaged", "damaged", model=PAIR)
