"""Three models at once: a pair and a worker of real engines, and a simulated one; one of them is killed."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tandem.client import calls
from tandem.errors import TandemError
from tandem.local_cluster.child_process import ClusterProcess
from tandem.local_cluster.cluster import LocalCluster
from tandem.service import owned_directory
from tandem.testing.eventually import assert_eventually
from tandem.testing.fake_model import write_fake_model
from tandem.testing.tool_model import link_tool_model
from tests.integration.conftest import DEMO_MODEL
from tests.integration.support.calls import Stream, generate, request_of

pytestmark = [
    pytest.mark.engine_sglang,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs requirements/cpu-engine.txt"),
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(240),
]

PROMPT = "Mia hid the red key in the old barn. Where did Mia hide the red key?"
REAL, OTHER, SIMULATED = "tandem-demo", "other-real", "simulated"


@contextlib.asynccontextmanager
async def joined(
    cluster: LocalCluster, name: str, model: Path, engine: str, run: Path
) -> AsyncIterator[ClusterProcess]:
    """An aggregated worker of one more model, in a cluster that runs."""
    flags = {"registry": cluster.registry.address, "model": str(model), "model-name": name, "engine": engine}
    flags |= {"role": "aggregated", "worker-id": name, "dtype": "float32"}
    worker = ClusterProcess(name, "aggregated", flags, cluster.log_directory)
    await worker.start(run)
    try:
        await worker.wait_ready()
        yield worker
    finally:
        await worker.stop()
        # What a killed engine has left.
        owned_directory.sweep(run)


async def ask(cluster: LocalCluster, model: str) -> Stream:
    request = request_of(chat=PROMPT, max_tokens=12)
    request.model = model
    return await generate(cluster, request)


async def names(cluster: LocalCluster) -> set[str]:
    return {model.name for model in await calls.list_models(cluster.frontend.address)}


async def test_a_real_pair_and_two_more_models_serve_mixed_requests_and_one_dies_alone(
    http_pair: LocalCluster, tmp_path: Path, temporary: Path
) -> None:
    expected = {REAL: (await ask(http_pair, REAL)).token_ids}
    async with contextlib.AsyncExitStack() as stack:
        other = link_tool_model(tmp_path / "other", DEMO_MODEL)
        killed = await stack.enter_async_context(joined(http_pair, OTHER, other, "sglang", temporary))
        fake = write_fake_model(tmp_path / "fake")
        await stack.enter_async_context(joined(http_pair, SIMULATED, fake, "simulated", temporary))
        assert await names(http_pair) == {REAL, OTHER, SIMULATED}
        expected |= {name: (await ask(http_pair, name)).token_ids for name in (OTHER, SIMULATED)}

        asked = [REAL, OTHER, SIMULATED] * 4
        streams = await asyncio.gather(*(ask(http_pair, name) for name in asked))
        for name, stream in zip(asked, streams, strict=True):
            assert (stream.accepted.model, stream.token_ids) == (name, expected[name])
            assert (stream.finish.timings.kv_transfer_bytes > 0) == (name == REAL)

        others = [asyncio.create_task(ask(http_pair, name)) for name in (REAL, SIMULATED) * 4]
        running = [asyncio.create_task(ask(http_pair, OTHER)) for _ in range(4)]
        killed.kill()
        await killed.wait_ended()
        await asyncio.wait(running)
        with pytest.raises(TandemError):
            await ask(http_pair, OTHER)
        for name, stream in zip((REAL, SIMULATED) * 4, await asyncio.gather(*others), strict=True):
            assert stream.token_ids == expected[name]
    await assert_eventually(lambda: names(http_pair), lambda listed: listed == {REAL}, within_s=30)
    assert (await ask(http_pair, REAL)).token_ids == expected[REAL]
    for task in running:
        assert task.exception() is None or isinstance(task.exception(), TandemError)
