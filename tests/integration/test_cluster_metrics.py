"""Every metric of the table moves when its thing happens, as a real scrape of a real process shows it.

A row without an entry here is red. Engines are simulated but for the last test, which asks SGLang and NIXL.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from tandem.api.types.v1 import generation_pb2
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.local_cluster.consul import ClusterConsul
from tandem.observability.metric_catalog import BY_NAME, TABLE, Emitter, Kind
from tandem.observability.metric_types import prometheus_name
from tandem.observability.otel_metrics import READ_EVERY_S
from tandem.testing.adapters import write_adapter
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import DEMO_MODEL
from tests.integration.support import cluster_events as on
from tests.integration.support.calls import generate, request_of
from tests.integration.support.cluster_events import World
from tests.integration.support.scraped import EMITTERS, Wanted, samples, scrape, values

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]

WITHIN_S = 20.0
OF_PROCESSES = ("tandem.processes", "tandem.process.restarts")
OF_CONTROLLER = {metric.name for metric in TABLE if metric.emitters == (Emitter.CONTROLLER,)}
"""See test_controller.py: a cluster starts no controller."""
OF_SGLANG = ("tandem.engine.messages.dropped",)
"""The simulated engine has no port that drops."""
OF_CONSUL = ("tandem.view.live", "tandem.consul.answer.age", "tandem.consul.index_lag")


@dataclass(frozen=True)
class Case:
    """What is to happen, and what is to be seen of it."""

    event: Callable[[World], AbstractAsyncContextManager[None]]
    labels: tuple[tuple[str, str], ...] = ()
    suffix: str = ""
    by: float = 1e-9
    """At least so much more; less than 0: at least so much less."""
    of: Callable[[list[float]], float] = sum
    is_either: bool = False
    """Whether less by so much will do as well."""

    def has_moved(self, difference: float) -> bool:
        if self.is_either:
            difference = abs(difference)
        return difference >= self.by if self.by > 0 else difference <= self.by


def greatest(found: list[float]) -> float:
    return max(found, default=0.0)


PREFILL, DECODE = (("tandem.leg", "prefill"),), (("tandem.leg", "decode"),)
CASES: dict[str, Case] = {
    "gen_ai.server.request.duration": Case(on.an_answer, (("gen_ai.operation.name", "generate"),), by=1),
    "gen_ai.server.time_to_first_token": Case(on.an_answer, by=1),
    "gen_ai.server.time_per_output_token": Case(on.an_answer, by=1),
    "gen_ai.client.token.usage": Case(on.an_answer, (("gen_ai.token.type", "output"),), "_sum", by=20),
    "tandem.connections.open": Case(on.an_open_stream, by=1),
    "tandem.requests.open": Case(on.an_open_stream, by=1),
    "tandem.requests.admitted": Case(on.an_answer, by=1),
    "tandem.requests.refused": Case(on.a_refusal, (("tandem.reason", "INVALID_REQUEST"),), by=1),
    "tandem.queue.depth": Case(on.a_full_house, by=2),
    "tandem.models": Case(on.a_second_model, (("tandem.state", "served"),), by=1),
    "tandem.queue.wait": Case(on.an_answer, by=1),
    "tandem.pairs.chosen": Case(on.an_answer, (("tandem.policy", "prefix"), ("tandem.route", "pair")), by=1),
    "tandem.route.choices": Case(on.an_answer, (("tandem.policy", "prefix"), ("tandem.role", "decode")), by=1),
    "tandem.route.cached_tokens": Case(on.a_prompt_that_is_known, (("tandem.policy", "prefix"),), by=100),
    "tandem.route.expected_cached_tokens": Case(on.a_prompt_that_is_known, (("tandem.policy", "prefix"),), by=100),
    "tandem.route.duration": Case(on.an_answer, by=1),
    "tandem.placements": Case(on.a_choice_of_kinds, by=1),
    "tandem.leg.failures": Case(on.a_leg_that_breaks, PREFILL, by=1),
    "tandem.continuations": Case(on.a_continuation, (("tandem.outcome", "finished"),), by=1),
    "tandem.prefix.blocks": Case(on.a_new_prompt_twice, by=1),
    "tandem.prefix.workers": Case(on.a_stopped_prefill, (("tandem.state", "trusted"),), by=-1),
    "tandem.prefix.snapshots": Case(on.a_restarted_prefill, by=1),
    "tandem.prefix.suspicions": Case(on.a_dead_prefill, (("tandem.reason", "broken"),), by=1),
    "tandem.tenant.requests": Case(
        on.a_tenants_answer, (("tandem.tenant", "alice"), ("tandem.outcome", "finished")), by=1
    ),
    "tandem.tenant.tokens": Case(
        on.a_tenants_answer, (("tandem.tenant", "alice"), ("tandem.tokens", "completion")), by=8
    ),
    "tandem.tenant.refused": Case(
        on.a_used_quota, (("tandem.tenant", "bob"), ("tandem.quota", "requests_per_minute")), by=1
    ),
    "tandem.batch.open": Case(on.a_batch, by=1),
    "tandem.batch.rows.running": Case(on.a_batch, by=1),
    "tandem.batch.rows": Case(on.a_batch, (("tandem.batch.outcome", "completed"),), by=1),
    "tandem.cancel.latency": Case(on.a_client_that_leaves, by=1),
    "tandem.legs.open": Case(on.an_open_stream, by=1),
    "tandem.leg.duration": Case(on.an_answer, (*DECODE, ("tandem.outcome", "finished")), by=1),
    "tandem.leg.abort.duration": Case(on.a_client_that_leaves, DECODE, by=1),
    "tandem.engine.queue.wait": Case(on.an_answer, PREFILL, by=1),
    "tandem.prefill.duration": Case(on.an_answer, PREFILL, by=1),
    "tandem.kv.transfer.bytes": Case(on.an_answer, DECODE, by=1_000),
    "tandem.kv.handovers": Case(on.an_answer, (("tandem.kv.check", "matched"),), by=1),
    "tandem.kv.transfer.duration": Case(on.an_answer, DECODE, by=1),
    "tandem.kv.transfer.bandwidth": Case(on.an_answer, PREFILL, "_sum", by=1_000),
    "tandem.prompt.tokens": Case(on.an_answer, PREFILL, by=len(on.LONG)),
    "tandem.prompt.cached_tokens": Case(on.a_prompt_that_is_known, PREFILL, by=100),
    "tandem.cache.hit_ratio": Case(on.a_new_prompt_twice, by=0.001, is_either=True),
    "tandem.engine.requests": Case(on.an_open_stream, (("tandem.state", "running"),), by=1),
    "tandem.engine.waiting_tokens": Case(on.a_held_prefill, by=len(on.LONG)),
    "tandem.kv.pages": Case(on.an_open_stream, (("tandem.state", "used"),), by=10),
    "tandem.kv.pages.capacity": Case(on.a_smaller_worker, by=-100),
    "tandem.engine.healthy": Case(on.a_failing_canary, by=-1),
    "tandem.role.change.duration": Case(
        on.a_role_change, (("tandem.role", "prefill"), ("tandem.outcome", "in_place")), "_count", by=1
    ),
    "tandem.adapters": Case(on.a_loaded_adapter, by=1),
    "tandem.engine.messages.dropped": Case(on.a_foreign_registration, (("tandem.reason", "refused"),), by=1),
    "tandem.members": Case(on.a_drain, (("tandem.role", "decode"), ("tandem.state", "draining")), by=1),
    "tandem.watchers": Case(on.a_watcher, by=1),
    "tandem.lease.age": Case(on.a_silent_worker, by=1, of=greatest),
    "tandem.lease.ttl": Case(on.another_registry, by=3),
    "tandem.view.live": Case(on.a_consul_that_is_away, by=-1),
    "tandem.consul.answer.age": Case(on.a_consul_that_is_away, by=3),
    "tandem.consul.index_lag": Case(on.a_consul_that_forgets, by=1),
    "tandem.processes": Case(on.a_frozen_process, (("tandem.state", "silent"),), by=1),
    "tandem.process.restarts": Case(on.a_dead_process, by=1),
    "tandem.drains": Case(on.a_drain, by=1),
    "tandem.event_loop.lag": Case(on.a_pause, suffix="_sum", by=on.PAUSE_S / 2),
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    logs = tmp_path_factory.mktemp("metrics")
    names = ("prefill-0", "decode-0", "decode-1")
    engine = {"decode_step_s": 0.004}
    common = {"running-requests-max": "2", "canary-period-s": "0.5", "adapter-root": str(logs)}
    write_adapter(logs / on.ADAPTER, DEMO_MODEL, 1)
    spec = ClusterSpec(
        model=DEMO_MODEL,
        log_directory=logs,
        engine="simulated",
        decode=2,
        edge=True,
        metrics=True,
        worker_flags=common,
        role_flags={"frontend": {"batch-directory": str(logs / "batches")}},
    )
    cluster = LocalCluster(spec)
    for name in names:
        extra = {**engine, "control_file": str(logs / f"{name}.rules")}
        cluster.process(name).flags["engine-extra"] = json.dumps(extra)
    cluster.process("prefill-0").flags["running-requests-max"] = "16"
    async with cluster:
        yield World(cluster)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world_of_consul(consul_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    spec = ClusterSpec(
        model=DEMO_MODEL,
        log_directory=tmp_path_factory.mktemp("consul"),
        engine="simulated",
        consul=ClusterConsul(binary=consul_binary),
        metrics=True,
    )
    async with LocalCluster(spec) as cluster:
        yield World(cluster)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world_of_processes(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    spec = ClusterSpec(
        model=DEMO_MODEL,
        log_directory=tmp_path_factory.mktemp("processes"),
        engine="simulated",
        frontend_processes=2,
        metrics=True,
    )
    async with LocalCluster(spec) as cluster:
        yield World(cluster)


async def test_every_row_has_its_case() -> None:
    assert set(CASES) == set(BY_NAME) - OF_CONTROLLER


APART = {*OF_CONSUL, *OF_PROCESSES, *OF_SGLANG, *OF_CONTROLLER}


@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in APART])
async def test_it_moves_when_its_thing_happens(name: str, world: World) -> None:
    await assert_moves(name, world)


@pytest.mark.parametrize("name", OF_CONSUL)
async def test_it_moves_when_its_thing_happens_to_consul(name: str, world_of_consul: World) -> None:
    await assert_moves(name, world_of_consul)


@pytest.mark.parametrize("name", OF_PROCESSES)
async def test_it_moves_when_its_thing_happens_to_a_process(name: str, world_of_processes: World) -> None:
    await assert_moves(name, world_of_processes)


async def assert_moves(name: str, world: World) -> None:
    case = CASES[name]
    wanted = Wanted(name, dict(case.labels), case.suffix)

    async def value() -> float:
        return case.of(await values(world.processes, wanted))

    if BY_NAME[name].kind is Kind.GAUGE:
        # What was read for the case before this one may still be reported.
        await asyncio.sleep(READ_EVERY_S)
    before = await value()
    async with case.event(world):
        await assert_eventually(
            value,
            lambda now: case.has_moved(now - before),
            within_s=WITHIN_S,
            every_s=0.1,
            what=f"{wanted.sample} from {before:g} by {case.by:g}",
        )


async def test_each_process_has_its_rows_and_no_others(world: World) -> None:
    """Whatever has been shown by now is a row of the table that this process emits, within the table's values."""
    await generate(world.cluster, request_of("Once upon a time"))
    known = {prometheus_name(metric): metric for metric in TABLE}
    for process in world.cluster.processes:
        assert process.metrics_address is not None
        shown = set()
        for name, labels, _ in samples(await scrape(process.metrics_address)):
            metric = next((known[own] for own in known if name in (own, *(f"{own}{end}" for end in ENDINGS))), None)
            if metric is None:
                assert name == "target_info" or name.startswith("process_"), name
                continue
            shown.add(metric.name)
            assert EMITTERS[process.role] & set(metric.emitters), (process.name, name)
            allowed = {attribute.name.replace(".", "_"): attribute.values for attribute in metric.attributes}
            for label, value in labels.items():
                assert label == "le" or value in (*allowed[label], "other", "") or not allowed[label], (name, labels)
        assert {"tandem.drains", "tandem.event_loop.lag"} <= shown, process.name


ENDINGS = ("_bucket", "_count", "_sum", "_created")


async def test_envoys_own_figures_are_on_the_edges_endpoint(world: World) -> None:
    assert world.cluster.edge is not None
    assert world.cluster.edge.metrics_address is not None
    found = {name for name, _, _ in samples(await scrape(world.cluster.edge.metrics_address, "/envoy"))}
    assert "envoy_cluster_membership_change" in found or "envoy_cluster_membership_change_total" in found


@pytest.mark.engine_sglang
@pytest.mark.timeout(300)
async def test_kv_that_the_real_engine_moves_is_counted(tmp_path: Path) -> None:
    """Bytes and times are NIXL's and SGLang's own: a request of so many tokens moves just so many bytes."""
    spec = ClusterSpec(model=DEMO_MODEL, log_directory=tmp_path, metrics=True, worker_flags={"dtype": "float32"})
    async with LocalCluster(spec) as cluster:
        world = World(cluster)
        for _ in range(2):
            stream = await generate(cluster, request_of(token_ids=on.LONG, max_tokens=8, ignore_eos=True))
            assert stream.finish.reason == generation_pb2.FINISH_REASON_LENGTH

        async def seen(name: str, leg: str, suffix: str = "") -> float:
            return sum(await values(world.processes, Wanted(name, {"tandem.leg": leg}, suffix)))

        moved = stream.finish.timings.kv_transfer_bytes
        assert moved > 0
        for leg in ("prefill", "decode"):
            assert await seen("tandem.kv.transfer.bytes", leg) == 2 * moved
            assert await seen("tandem.prompt.tokens", leg) == 2 * len(on.LONG)
        # SGLang's decode does not know when the first byte moved.
        for leg, count in (("prefill", 2), ("decode", 0)):
            assert await seen("tandem.kv.transfer.duration", leg) == count
            assert await seen("tandem.kv.transfer.bandwidth", leg) == count
        assert 0 < await seen("tandem.kv.transfer.duration", "prefill", "_sum") < 10
        assert await seen("tandem.prompt.cached_tokens", "prefill") == stream.finish.usage.cached_tokens > 0
        assert await seen("tandem.prefill.duration", "prefill") == 2
        free = sum(await values(world.processes, Wanted("tandem.kv.pages", {"tandem.state": "free"})))
        capacity = sum(await values(world.processes, Wanted("tandem.kv.pages.capacity")))
        assert 0 < free <= capacity
        for name in OF_SGLANG:
            await assert_moves(name, world)
