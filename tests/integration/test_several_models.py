"""Three models in one cluster: each is served by its own workers and tokenizer, and none sees what another suffers."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.client import calls
from tandem.errors import InvalidRequest, ModelNotFound, NoWorkers, TandemError
from tandem.local_cluster.child_process import ClusterProcess
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.testing.eventually import assert_eventually
from tandem.testing.fake_model import write_fake_model
from tests.integration.conftest import SIMULATED
from tests.integration.support.calls import Stream, generate, request_of

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]

CONTEXTS = {"first": 1024, "second": 2048, "third": 4096}
LINGER_S = 2
FRONTEND = {"model-aliases": "gpt-test=second", "model-linger-s": str(LINGER_S), "models-max": "5"}


def made(folder: Path, name: str) -> Path:
    """A model with a tokenizer of its own."""
    number = [*CONTEXTS].index(name)
    return write_fake_model(folder / name, vocabulary_size=400 + 50 * number, max_position_embeddings=CONTEXTS[name])


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    folder = tmp_path_factory.mktemp("models")
    first, *more = {name: made(folder, name) for name in CONTEXTS}.items()
    spec = ClusterSpec(
        model=first[1],
        model_name=first[0],
        more_models=dict(more),
        log_directory=folder,
        engine="simulated",
        edge=True,
        worker_flags=SIMULATED,
        role_flags={"frontend": FRONTEND},
    )
    async with LocalCluster(spec) as started:
        yield started


async def ask(cluster: LocalCluster, model: str | None, prompt: str = "The registry knows", **more: Any) -> Stream:
    request = request_of(prompt, **more)
    if model is not None:
        request.model = model
    return await generate(cluster, request)


async def get(cluster: LocalCluster, path: str) -> Any:
    assert cluster.edge is not None
    url = f"http://{cluster.edge.address}{path}"
    return json.loads(await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=10).read()))


def workers_of(cluster: LocalCluster, name: str) -> list[ClusterProcess]:
    return [process for process in cluster.workers if process.flags["model-name"] == name]


async def test_requests_of_three_models_each_go_to_workers_of_their_own(cluster: LocalCluster) -> None:
    streams = await asyncio.gather(*(ask(cluster, name) for name in [*CONTEXTS] * 8))
    prompts = {name: {stream.accepted.prompt_tokens for stream in streams[at::3]} for at, name in enumerate(CONTEXTS)}
    assert len({frozenset(counts) for counts in prompts.values()}) > 1, "each has a tokenizer of its own"
    for name, stream in zip([*CONTEXTS] * 8, streams, strict=True):
        route = stream.accepted.route
        own = {process.name for process in workers_of(cluster, name)}
        assert {route.prefill_worker_id, route.decode_worker_id} == own
        assert (stream.accepted.model, len(stream.token_ids)) == (name, 16)


async def test_both_lists_have_each_model_with_its_context_and_aliases(cluster: LocalCluster) -> None:
    listed = {model.name: model for model in await calls.list_models(cluster.frontend.address)}
    assert {name: model.context_tokens_max for name, model in listed.items()} == CONTEXTS
    assert all(model.state == pb.MODEL_STATE_SERVING and model.has_chat_template for model in listed.values())
    assert [*listed["second"].aliases] == ["gpt-test"]
    entries = {entry["id"]: entry for entry in (await get(cluster, "/v1/models"))["data"]}
    assert {name: entry["max_model_len"] for name, entry in entries.items()} == {**CONTEXTS, "gpt-test": 2048}
    assert (await get(cluster, "/v1/models/gpt-test"))["root"] == "second"


async def test_a_name_is_required_where_several_are_served_and_an_alias_is_one(cluster: LocalCluster) -> None:
    assert (await ask(cluster, "gpt-test")).accepted.model == "second"
    with pytest.raises(InvalidRequest, match="'first', 'second', 'third'") as unnamed:
        await ask(cluster, None)
    assert unnamed.value.field == "model"
    with pytest.raises(ModelNotFound, match="'fourth' not found") as unknown:
        await ask(cluster, "fourth")
    assert unknown.value.metadata["model"] == "fourth"


async def test_a_model_that_cannot_be_loaded_is_refused_and_hurts_no_other(
    cluster: LocalCluster, tmp_path: Path, temporary: Path
) -> None:
    broken = write_fake_model(tmp_path / "broken")
    config = json.loads((broken / "tokenizer_config.json").read_text())
    (broken / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{% if"}))
    flags = {"registry": cluster.registry.address, "model": str(broken), "engine": "simulated", "role": "aggregated"}
    worker = ClusterProcess("broken", "aggregated", flags, tmp_path)
    await worker.start(temporary)
    try:
        await worker.wait_ready()

        async def refused() -> list[pb.Model]:
            models = await calls.list_models(cluster.frontend.address)
            return [model for model in models if model.state == pb.MODEL_STATE_REFUSED]

        (model,) = await assert_eventually(refused, within_s=20)
        assert model.name == "broken"
        assert model.problem.startswith("tokenizer_config.json"), model.problem
        with pytest.raises(ModelNotFound, match="'broken' is not served"):
            await ask(cluster, "broken")
        assert "broken" not in {entry["id"] for entry in (await get(cluster, "/v1/models"))["data"]}
        assert len((await ask(cluster, "first")).token_ids) == 16
    finally:
        await worker.stop()
    logged = (cluster.log_directory / "frontend.log").read_text()
    assert logged.count("model broken is not served") == 1


async def test_a_model_whose_workers_are_killed_ends_and_the_others_see_nothing(cluster: LocalCluster) -> None:
    ending, failures = asyncio.Event(), list[TandemError]()
    counts = dict.fromkeys(("first", "second"), 0)

    async def keep_asking(name: str) -> None:
        while not ending.is_set():
            try:
                stream = await ask(cluster, name)
                assert stream.accepted.model == name
                counts[name] += 1
            except TandemError as failure:
                failures.append(failure)

    others = [asyncio.create_task(keep_asking(name)) for name in counts for _ in range(3)]
    running = asyncio.create_task(ask(cluster, "third", max_tokens=2_000, ignore_eos=True))
    await assert_eventually(lambda: all(counts.values()), within_s=20)
    for process in workers_of(cluster, "third"):
        process.kill()
        await process.wait_ended()
    with pytest.raises(TandemError):
        await running

    async def refusal() -> TandemError:
        try:
            await ask(cluster, "third")
        except TandemError as failure:
            return failure
        raise AssertionError("the model has no worker")

    seen = [await refusal()]
    while not isinstance(seen[-1], ModelNotFound):
        seen.append(await refusal())
    assert all(isinstance(failure, NoWorkers | ModelNotFound) or failure.reason == "LEG_FAILED" for failure in seen)
    assert seen[-1].metadata["model"] == "third"
    before = dict(counts)
    await assert_eventually(lambda: all(counts[name] > before[name] + 3 for name in counts), within_s=20)
    ending.set()
    await asyncio.gather(*others)
    assert failures == []
    assert {model.name for model in await calls.list_models(cluster.frontend.address)} == {"first", "second"}
    for process in workers_of(cluster, "third"):
        await cluster.restart(process.name)

    async def answers() -> int:
        try:
            return len((await ask(cluster, "third")).token_ids)
        except TandemError:
            return 0

    assert await assert_eventually(answers, within_s=20) == 16
