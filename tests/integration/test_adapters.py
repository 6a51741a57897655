"""Adapters on a simulated fleet: loaded on all workers or on none, requested as models, never mixed in a pair."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.registry.v1 import registry_service_pb2 as registry_pb
from tandem.cli import adapter as adapter_command
from tandem.client import calls
from tandem.client.adapter_calls import AdapterCalls, load_adapter, unload_adapter
from tandem.domain.adapter import Adapter
from tandem.domain.checkpoint import read_checkpoint
from tandem.engine.simulated.tokens import expected_tokens, read_vocabulary
from tandem.errors import AdapterRefused, IncompatibleWorkers, InvalidRequest, ModelNotFound
from tandem.local_cluster.cluster import LocalCluster
from tandem.rpc.channels import Channels
from tandem.rpc.convert import adapter_from_proto, worker_from_proto
from tandem.testing.adapters import write_adapter
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import DEMO_MODEL, running
from tests.integration.support.calls import Stream, generate, request_of
from tests.integration.support.command_line import TANDEM, run

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]

TOKENIZER = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
VOCABULARY = read_vocabulary(read_checkpoint(DEMO_MODEL))
PROMPT = "Once upon a time there was a registry, and it knew of every worker that was alive and of those that were not."
FIRST = "always"
"""Adapter of the settings."""


@dataclass
class Fleet:
    """A cluster whose workers may load what is below `root`."""

    cluster: LocalCluster
    root: Path

    @property
    def registry(self) -> str:
        return self.cluster.registry.address

    async def ask(self, model: str, count: int = 12, prompt: str = PROMPT) -> Stream:
        request = request_of(prompt, max_tokens=count)
        request.model = model
        return await generate(self.cluster, request)

    async def models(self) -> dict[str, pb.Model]:
        return {model.name: model for model in await calls.list_models(self.cluster.frontend.address)}

    async def load(self, name: str, path: str | None = None) -> registry_pb.LoadAdapterResponse:
        """Load an adapter, and wait until the frontend serves it."""
        response = await load_adapter(self.registry, name, path or name)
        await assert_eventually(self.models, lambda models: name in models, within_s=20, what=name)
        return response

    async def unload(self, name: str) -> None:
        await unload_adapter(self.registry, name)
        await assert_eventually(self.models, lambda models: name not in models, within_s=20, what=name)

    async def adapters(self) -> dict[str, set[str]]:
        """Names of the adapters that each worker serves."""
        listed = await calls.list_workers(self.registry)
        return {one.worker.worker_id: {adapter.name for adapter in one.worker.adapters} for one in listed}


def expected(adapter: Adapter | None, count: int = 12) -> list[int]:
    return expected_tokens(VOCABULARY, TOKENIZER.encode(PROMPT).ids, count, adapter)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    folder = tmp_path_factory.mktemp("adapters")
    root = folder / "root"
    for number in range(8):
        write_adapter(root / f"a{number}", DEMO_MODEL, number)
    write_adapter(root / "wrong", DEMO_MODEL, 1, rank=64)
    rules = [{"point": "adapter", "kind": "fail", "nth": 1, "times": 1}]
    for name in ("control", "hold"):
        (folder / name).write_text("[]")
    flags = {
        "engine-extra": json.dumps({"decode_step_s": 0.004}),
        "adapters": f"{FIRST}={root / 'a7'}",
        "adapter-root": str(root),
    }
    decode, aggregated = (
        {"engine-extra": json.dumps({"decode_step_s": 0.004, "control_file": str(folder / name)})}
        for name in ("control", "hold")
    )
    (folder / "rules").write_text(json.dumps(rules))
    spec: dict[str, Any] = {
        "engine": "simulated",
        "prefill": 1,
        "decode": 1,
        "aggregated": 1,
        "edge": True,
        "worker_flags": flags,
        "role_flags": {"decode": decode, "aggregated": aggregated, "frontend": {"model-aliases": "nickname=a0"}},
    }
    async with running(folder, **spec) as cluster:
        yield Fleet(cluster, root)


async def get(fleet: Fleet, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    assert fleet.cluster.edge is not None
    data = None if body is None else json.dumps(body).encode()
    url = f"http://{fleet.cluster.edge.address}{path}"
    request = urllib.request.Request(url, data, {"content-type": "application/json"})

    def call() -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as problem:
            return problem.code, json.loads(problem.read())

    return await asyncio.to_thread(call)


async def test_adapters_loaded_at_run_time_are_served_mixed_with_their_own_tokens(fleet: Fleet) -> None:
    loaded = {f"a{number}": await fleet.load(f"a{number}") for number in range(7)}
    adapters = {name: adapter_from_proto(response.adapter) for name, response in loaded.items()}
    assert all(len(response.workers) == 3 for response in loaded.values())
    asked = [*adapters, FIRST, "tandem-demo"] * 4
    streams = await asyncio.gather(*(fleet.ask(name) for name in asked))
    first = (await fleet.models())[FIRST]
    adapters[FIRST] = Adapter(FIRST, first.adapter_digest)
    for name, stream in zip(asked, streams, strict=True):
        assert (name, stream.token_ids) == (name, expected(adapters.get(name)))
        assert stream.accepted.model == name
    assert len({tuple(expected(adapter)) for adapter in [*adapters.values(), None]}) == 9
    # The index knows the blocks of the adapter by the engines' own events; no other one has that prompt.
    found = await assert_eventually(
        lambda: fleet.ask("a3", prompt=f"Another one: {PROMPT}"),
        lambda stream: stream.finish.route.expected_cached_tokens > 0,
        within_s=20,
    )
    assert found.finish.usage.cached_tokens == found.finish.route.expected_cached_tokens
    for name in loaded:
        await fleet.unload(name)
    assert set(map(frozenset, (await fleet.adapters()).values())) == {frozenset({FIRST})}


async def test_an_adapter_is_listed_with_its_model_and_served_over_http(fleet: Fleet) -> None:
    await fleet.load("a0")
    try:
        model = (await fleet.models())["a0"]
        assert (model.parent, model.state, [*model.aliases]) == ("tandem-demo", pb.MODEL_STATE_SERVING, ["nickname"])
        _, listed = await get(fleet, "/v1/models")
        entries = {entry["id"]: entry for entry in listed["data"]}
        assert entries["a0"]["parent"] == entries[FIRST]["parent"] == "tandem-demo"
        assert (entries["nickname"]["root"], "parent" in entries["tandem-demo"]) == ("a0", False)
        body = {"model": "nickname", "prompt": PROMPT, "max_tokens": 4}
        status, answer = await get(fleet, "/v1/completions", body)
        assert (status, answer["model"]) == (200, "a0")
    finally:
        await fleet.unload("a0")
    status, answer = await get(fleet, "/v1/completions", body | {"model": "a0"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    with pytest.raises(ModelNotFound, match="'a0' not found; this frontend serves 'always', 'tandem-demo'"):
        await fleet.ask("a0")


async def test_a_load_that_one_worker_refuses_leaves_all_as_they_were_and_names_each_state(fleet: Fleet) -> None:
    before = await fleet.adapters()
    folder = fleet.root.parent
    (folder / "control").write_text((folder / "rules").read_text())

    async def refused() -> AdapterRefused | None:
        # The engine reads its control file a moment later.
        try:
            await load_adapter(fleet.registry, "a1", "a1")
        except AdapterRefused as problem:
            return problem
        await unload_adapter(fleet.registry, "a1")
        return None

    problem = await assert_eventually(refused, within_s=20, what="a refusal")
    (folder / "control").write_text("[]")
    assert problem is not None
    assert problem.metadata["workers"] == "aggregated-0=ROLLED_BACK,decode-0=REFUSED,prefill-0=ROLLED_BACK"
    assert (problem.metadata["adapter"], problem.metadata["worker"]) == ("a1", "decode-0")
    assert await fleet.adapters() == before
    assert "a1" not in await fleet.models()


@pytest.mark.parametrize(
    ("name", "path", "error", "text"),
    [
        ("a b", "a1", InvalidRequest, "name: must be 1 to 64 characters"),
        ("tandem-demo", "a1", InvalidRequest, "name: tandem-demo is the name of a model"),
        ("up", "../up", InvalidRequest, "path: must be below the worker's adapter_root"),
        ("none", "none", AdapterRefused, "it has no adapter_config.json"),
        ("wrong", "wrong", AdapterRefused, r"r, the rank, must be 1 to 16 \(adapter_rank_max\), not 64"),
        (FIRST, "a2", AdapterRefused, "it serves another adapter of that name"),
    ],
)
async def test_a_bad_load_is_refused_by_its_field(
    fleet: Fleet, name: str, path: str, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        await load_adapter(fleet.registry, name, path)
    assert set(map(frozenset, (await fleet.adapters()).values())) == {frozenset({FIRST})}


async def test_an_unload_lets_open_requests_end_and_refuses_new_ones(fleet: Fleet) -> None:
    adapter = adapter_from_proto((await fleet.load("a4")).adapter)
    epochs = {one.worker.epoch for one in await calls.list_workers(fleet.registry)}
    # The engines stop at their next step, so that the request is open for as long as the test wants.
    for name in ("control", "hold"):
        (fleet.root.parent / name).write_text(json.dumps([{"point": "decode_step", "kind": "hang"}]))
    running = asyncio.create_task(fleet.ask("a4", 300))

    async def legs() -> int:
        return sum([(await calls.worker_load(one.address)).open_legs for one in fleet.cluster.workers])

    await assert_eventually(legs, lambda count: count > 0, within_s=20, what="an open leg")
    unloading = asyncio.create_task(unload_adapter(fleet.registry, "a4"))
    await assert_eventually(fleet.models, lambda models: "a4" not in models, within_s=20)
    # Other changes do not wait for those requests.
    await fleet.load("a5")
    assert not running.done()
    assert not unloading.done()
    for name in ("control", "hold"):
        (fleet.root.parent / name).write_text("[]")
    await unloading
    await fleet.unload("a5")
    assert (await running).token_ids == expected(adapter, 300)
    assert {one.worker.epoch for one in await calls.list_workers(fleet.registry)} == epochs, "no new epoch"


async def test_an_adapter_on_one_side_of_a_pair_is_refused_before_dispatch(fleet: Fleet) -> None:
    workers = {one.worker.worker_id: worker_from_proto(one.worker) for one in await calls.list_workers(fleet.registry)}
    channels = Channels(None)
    direct = AdapterCalls(channels)
    try:
        await direct.load(workers["prefill-0"], "half", "a5")
        await direct.serve(workers["prefill-0"], "half", serve=True)
        listed = await assert_eventually(fleet.models, lambda models: "half" in models, within_s=20)
        assert listed["half"].state == pb.MODEL_STATE_REFUSED
        assert "adapter half is served by prefill-0, but by no decode worker" in listed["half"].problem
        with pytest.raises(IncompatibleWorkers, match="adapter half is served by prefill-0") as refused:
            await fleet.ask("half")
        assert refused.value.metadata["field"] == "adapter"
        assert (await fleet.ask("tandem-demo")).token_ids == expected(None)
        # Other weights under the same name pair no more than none.
        await direct.load(workers["decode-0"], "half", "a6")
        await direct.serve(workers["decode-0"], "half", serve=True)

        def differs(models: dict[str, pb.Model]) -> bool:
            return "half" in models and "other weights on prefill-0 than on decode-0" in models["half"].problem

        await assert_eventually(fleet.models, differs, within_s=20)
        with pytest.raises(IncompatibleWorkers, match="other weights"):
            await fleet.ask("half")
    finally:
        await unload_adapter(fleet.registry, "half")
        await channels.close()


async def test_the_command_loads_lists_and_unloads_and_prints_each_worker(
    fleet: Fleet, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registries = [fleet.registry]
    assert await adapter_command.load("a6", "a6", "tandem-demo", registries, None) == 0
    *workers, last = capsys.readouterr().out.splitlines()
    assert last == "a6: served as a model, on 3 workers of tandem-demo"
    assert [line.partition(",")[0] for line in workers] == [
        "aggregated-0: loaded", "decode-0: loaded", "prefill-0: loaded",
    ]  # fmt: skip
    status, out, _ = await run(*TANDEM, "adapter", "list", "--address", fleet.registry, state=state)
    assert (status, [line.split()[:2] for line in out.splitlines()[1:]]) == (
        0, [["a6", "tandem-demo"], [FIRST, "tandem-demo"]],
    )  # fmt: skip
    with pytest.raises(AdapterRefused, match="adapter always is not loaded on any further worker"):
        await adapter_command.load(FIRST, "a2", None, registries, None)
    assert capsys.readouterr().out.splitlines()[0] == "aggregated-0: refused"
    assert await adapter_command.unload("a6", registries, None) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "a6: unloaded from 3 workers"
    with pytest.raises(ModelNotFound, match="no worker serves adapter 'a6'"):
        await adapter_command.unload("a6", registries, None)
