"""Embeddings of a real SGLang engine, through a real Envoy, with the openai SDK: equal to those of transformers.

The worker joins the cluster of a generating pair, which the session's tests share.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio

from tandem.local_cluster.child_process import ClusterProcess
from tandem.local_cluster.cluster import LocalCluster
from tandem.service import owned_directory
from tests.integration.conftest import DEMO_MODEL
from tests.integration.support.calls import generate, request_of

pytestmark = [
    pytest.mark.engine_sglang,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs requirements/cpu-engine.txt"),
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(240),
]

MODEL = "demo-embedder"
SHORTER = 32
LENGTHS = (1, 2, 17, 64, 300)
TOLERANCE = 1e-5
"""Both compute in float32, in another order of additions."""


def prompt_of(length: int) -> list[int]:
    return [6 + (7 * length + 13 * place) % 400 for place in range(length)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, as one whose embeddings may be shortened."""
    folder = tmp_path_factory.mktemp("embedder") / MODEL
    shutil.copytree(DEMO_MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "matryoshka_dimensions": [SHORTER]}))
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def worker(http_pair: LocalCluster, model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    run = tmp_path_factory.mktemp("run")
    flags = {"registry": http_pair.registry.address, "model": str(model), "model-name": MODEL, "engine": "sglang"}
    flags |= {"role": "aggregated", "task": "embed", "worker-id": MODEL, "dtype": "float32"}
    process = ClusterProcess(MODEL, "aggregated", flags, http_pair.log_directory)
    await process.start(run)
    try:
        await process.wait_ready()
        yield process.address
    finally:
        await process.stop()
        owned_directory.sweep(run)


@pytest_asyncio.fixture(loop_scope="session")
async def client(http_pair: LocalCluster, worker: str) -> AsyncIterator[openai.AsyncOpenAI]:
    assert http_pair.edge is not None
    url = f"http://{http_pair.edge.address}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as one:
        yield one


def expected_embeddings(model: Path, prompts: list[list[int]], size: int | None = None) -> list[list[float]]:
    """The last token's hidden state after the final norm, shortened, then of length 1."""
    import torch
    from transformers import AutoModel

    found = []
    with torch.no_grad():
        network: Any = AutoModel.from_pretrained(model, dtype=torch.float32)
        for prompt in prompts:
            state = network(torch.tensor([prompt])).last_hidden_state[0, -1][:size]
            found.append((state / state.norm()).tolist())
    return found


async def test_sglang_embeddings_equal_those_of_transformers_in_one_batch_and_alone(
    client: openai.AsyncOpenAI, model: Path
) -> None:
    prompts = [prompt_of(length) for length in LENGTHS]
    expected = await asyncio.to_thread(expected_embeddings, model, prompts)
    together = await client.embeddings.create(model=MODEL, input=prompts)
    alone = [await client.embeddings.create(model=MODEL, input=prompt) for prompt in prompts]
    for place, vector in enumerate(expected):
        assert together.data[place].embedding == pytest.approx(vector, abs=TOLERANCE)
        assert alone[place].data[0].embedding == pytest.approx(vector, abs=TOLERANCE)
    assert together.usage.prompt_tokens == sum(LENGTHS)
    shorter = await client.embeddings.create(model=MODEL, input=prompts, dimensions=SHORTER)
    for entry, vector in zip(
        shorter.data, await asyncio.to_thread(expected_embeddings, model, prompts, SHORTER), strict=True
    ):
        assert entry.embedding == pytest.approx(vector, abs=TOLERANCE)


async def test_sglang_pair_and_embedding_worker_serve_at_once_and_a_generation_cannot_reach_the_latter(
    client: openai.AsyncOpenAI, http_pair: LocalCluster
) -> None:
    texts = [f"Mia hid key number {number} in the old barn." for number in range(20)]
    request = request_of("Once upon a time")
    request.model = "tandem-demo"
    streams, found = await asyncio.gather(
        asyncio.gather(*(generate(http_pair, request) for _ in range(4))),
        client.embeddings.create(model=MODEL, input=texts),
    )
    assert len({tuple(stream.token_ids) for stream in streams}) == 1
    assert len({tuple(entry.embedding) for entry in found.data}) == len(texts)
    with pytest.raises(openai.APIStatusError, match="computes embeddings") as refused:
        await client.completions.create(model=MODEL, prompt="a")
    assert refused.value.status_code == 501
    again = await client.embeddings.create(model=MODEL, input=texts[0])
    assert again.data[0].embedding == pytest.approx(found.data[0].embedding, abs=TOLERANCE)
