"""Consul killed, emptied, leaderless, paused, reset: no watcher hears that the fleet is gone, and all comes back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from tandem_registry.backends.consul.reconciler import SETTLE_S

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from tandem.errors import ServiceError, TandemError
from tandem.rpc.channels import open_channel
from tandem.rpc.convert import worker_to_proto
from tandem.rpc.status import from_rpc_error
from tandem.testing.eventually import assert_eventually
from tests.integration.support.consul_host import ConsulHost, consul_servers
from tests.integration.support.consul_registries import (
    TTL_S,
    Site,
    Watched,
    listed,
    scripted_worker,
    watched,
    worker_ids,
)
from tests.unit.support.registry_workers import make_worker

pytestmark = pytest.mark.timeout(120)
WORKERS = ("a", "b", "c")


class Scene:
    """Three workers at two registries over one Consul, each registry watched by one who has no patience."""

    def __init__(self, site: Site, registries: list[Any], workers: list[Any], watches: list[Watched]) -> None:
        self.site = site
        self.consul = site.consul
        self.registries = registries
        self.workers = workers
        self.watches = watches
        self.lease_ids = [worker.lease_id for worker in workers]
        self.generation = watches[0].steps[-1][0]

    def check_nothing_was_seen(self) -> None:
        """No watcher heard that any worker is missing, and no worker had to register again."""
        assert {workers for watch in self.watches for _, _, workers in watch.steps} == {WORKERS}
        assert [worker.lease_id for worker in self.workers] == self.lease_ids
        assert all(worker.registration.registered for worker in self.workers)

    async def each(self, accept: Callable[[pb.ListResponse], object], within_s: float = 10) -> None:
        for registry in self.registries:

            async def look(registry: Any = registry) -> pb.ListResponse:
                return await listed(registry)

            await assert_eventually(look, accept, within_s=within_s)

    async def all_live(self) -> None:
        await self.each(lambda view: view.source == pb.VIEW_SOURCE_LIVE, within_s=20)

    async def none_live(self) -> None:
        await self.each(lambda view: view.source == pb.VIEW_SOURCE_LAST_KNOWN, within_s=20)


@pytest_asyncio.fixture
async def consul(consul_binary: Path, tmp_path: Path) -> AsyncIterator[ConsulHost]:
    async with consul_servers(consul_binary, tmp_path, count=1) as host:
        yield host


@pytest_asyncio.fixture
async def scene(consul: ConsulHost) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        yield await make_scene(consul, stack)


async def make_scene(consul: ConsulHost, stack: AsyncExitStack) -> Scene:
    site = Site(consul)
    last = len(consul.agents) - 1
    registries = [await stack.enter_async_context(site.registry(agent)) for agent in (0, last)]
    first, second = registries
    places = ((first, second), (second, first), (first, second))
    workers = [
        await stack.enter_async_context(scripted_worker(name, *place))
        for name, place in zip(WORKERS, places, strict=True)
    ]
    for registry in registries:
        await assert_eventually(partial(worker_ids, registry), lambda ids: tuple(ids) == WORKERS)
    watches = [await stack.enter_async_context(watched(registry)) for registry in registries]
    return Scene(site, registries, workers, watches)


async def refusal(registry: Any) -> TandemError:
    """What a new worker hears."""
    async with open_channel(registry.address) as channel:
        stub: Any = RegistryServiceStub(channel)
        try:
            await stub.Register(
                pb.RegisterRequest(worker=worker_to_proto(make_worker("new", 1, "127.0.0.1:9"))), timeout=3
            )
        except grpc.aio.AioRpcError as failure:
            return from_rpc_error(failure)
    raise AssertionError("a new worker was entered")


async def check_outage(scene: Scene) -> None:
    """The last view is served, and says so; leases are renewed; new workers must wait."""
    await scene.none_live()
    await asyncio.sleep(2 * TTL_S)
    scene.check_nothing_was_seen()
    for registry in scene.registries:
        view = await listed(registry)
        assert [entry.worker.worker_id for entry in view.workers] == list(WORKERS)
        error = await refusal(registry)
        assert type(error) is ServiceError
        assert error.code == "UNAVAILABLE"


async def test_consul_is_killed_and_comes_back(scene: Scene) -> None:
    await scene.consul.kill(scene.consul.first)
    await check_outage(scene)
    await scene.consul.restart(scene.consul.first)
    await scene.all_live()
    await asyncio.sleep(2 * TTL_S)
    scene.check_nothing_was_seen()
    assert {watch.steps[-1][0] for watch in scene.watches} == {scene.generation}, "it still has its data"


async def test_consul_comes_back_empty(scene: Scene) -> None:
    await scene.consul.kill(scene.consul.first)
    await check_outage(scene)
    await scene.consul.restart(scene.consul.first, empty=True)
    await scene.all_live()
    await scene.each(lambda view: len(view.workers) == len(WORKERS))
    await asyncio.sleep(2 * TTL_S)
    scene.check_nothing_was_seen()
    (generation,) = {watch.steps[-1][0] for watch in scene.watches}
    assert generation != scene.generation, "revisions are counted anew"
    shown = {entry["Service"]["Meta"]["id"] for entry in await scene.consul.services(scene.site.service)}
    assert shown > set(WORKERS), "the lease keepers have entered all again"


async def test_consul_is_paused(scene: Scene) -> None:
    await scene.consul.pause(scene.consul.first)
    await check_outage(scene)
    scene.consul.resume(scene.consul.first)
    await scene.all_live()
    await asyncio.sleep(2 * TTL_S)
    scene.check_nothing_was_seen()


async def test_consul_loses_its_leader(consul_binary: Path, tmp_path: Path) -> None:
    async with consul_servers(consul_binary, tmp_path) as consul, AsyncExitStack() as stack:
        scene = await make_scene(consul, stack)
        # The registries' agents are the first and the last: the one between them and one of theirs are killed.
        killed = consul.agents[:2]
        await consul.kill(*killed)
        await consul.wait_leaderless()
        await check_outage(scene)
        await consul.restart(*killed)
        await scene.all_live()
        await asyncio.sleep(2 * TTL_S)
        scene.check_nothing_was_seen()


async def test_a_worker_that_dies_while_consul_is_gone_leaves_when_it_is_back(scene: Scene) -> None:
    await scene.consul.kill(scene.consul.first)
    await scene.none_live()
    await scene.workers[2].die()
    await asyncio.sleep(2 * TTL_S)
    assert {workers for watch in scene.watches for _, _, workers in watch.steps} == {WORKERS}
    await scene.consul.restart(scene.consul.first)
    await scene.all_live()
    await scene.each(lambda view: [entry.worker.worker_id for entry in view.workers] == ["a", "b"])
    assert {workers for watch in scene.watches for _, _, workers in watch.steps} == {WORKERS, ("a", "b")}


async def test_a_generation_that_was_removed_is_begun_anew(scene: Scene) -> None:
    """As when an operator restores Consul from a snapshot without it."""
    await scene.consul.access.send("DELETE", f"/v1/kv/{scene.site.service}/generation")
    await scene.each(lambda view: view.registry_id != scene.generation, within_s=12)
    scene.check_nothing_was_seen()
    assert len({watch.steps[-1][0] for watch in scene.watches}) == 1


async def test_entries_that_an_agent_loses_are_written_again(consul: ConsulHost) -> None:
    """An operator clears the agent: those who watch at the lease keeper learn nothing of it."""
    async with AsyncExitStack() as stack:
        site = Site(consul)
        registry = await stack.enter_async_context(site.registry())
        workers = [await stack.enter_async_context(scripted_worker(name, registry)) for name in WORKERS]
        watch = await stack.enter_async_context(watched(registry))
        scene = Scene(site, [registry], workers, [watch])
        await asyncio.sleep(SETTLE_S)
        for entry in await consul.services(site.service):
            await consul.access.put(f"/v1/agent/service/deregister/{entry['Service']['ID']}")

        async def ids() -> set[str]:
            return {entry["Service"]["Meta"]["id"] for entry in await consul.services(site.service)}

        await assert_eventually(ids, lambda found: found >= set(WORKERS), within_s=5)
        await scene.all_live()
        scene.check_nothing_was_seen()


async def test_a_foreign_or_changed_entry_is_ignored_with_one_line(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    (own,) = [e for e in await scene.consul.services(scene.site.service) if e["Service"]["Meta"]["id"] == "a"]
    changed = {**own["Service"]["Meta"], "id": "forged", "vocabulary_size": "9"}
    for name, meta in (("foreign", {}), ("forged", changed)):
        body = {"Name": scene.site.service, "ID": name, "Address": "127.0.0.1", "Port": 9, "Meta": meta}
        await scene.consul.access.put("/v1/agent/service/register", body)
    await register_and_wait(scene)
    for name in ("foreign", "forged"):
        lines = [
            record for record in caplog.records if record.getMessage().startswith(f"ignored Consul entry {name} at")
        ]
        assert len(lines) == len(scene.registries), "one line on each replica, however many answers hold it"
    scene.check_nothing_was_seen()


async def register_and_wait(scene: Scene) -> None:
    """Several more answers of Consul."""
    key = f"/v1/kv/{scene.site.service}/anything"
    await scene.consul.access.put(key, json.dumps("x").encode())
    body = {"Name": scene.site.service, "ID": "another", "Address": "127.0.0.1", "Port": 8, "Meta": {"a": "b"}}
    for port in range(8, 12):
        await scene.consul.access.put("/v1/agent/service/register", {**body, "Port": port})
        await asyncio.sleep(0.2)
