"""Registries over a real Consul agent: what Consul shows, one view on all replicas, leases, health and adoption."""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from operator import eq
from pathlib import Path
from typing import Any

import dns.asyncquery
import dns.message
import dns.rdatatype
import grpc
import psutil
import pytest
import pytest_asyncio
from tandem_registry.backends.consul import backend

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from tandem.domain.adapter import Adapter
from tandem.domain.worker import Worker, WorkerState
from tandem.errors import DuplicateWorker, Overloaded, ServiceError, TandemError
from tandem.rpc.channels import open_channel
from tandem.rpc.convert import worker_from_proto, worker_to_proto
from tandem.rpc.status import from_rpc_error
from tandem.testing.eventually import assert_eventually
from tests.integration.support.consul_host import ConsulHost, consul_agent, consul_servers
from tests.integration.support.consul_registries import TTL_S, Site, listed, scripted_worker, watched, worker_ids
from tests.unit.support.registry_workers import make_worker

CHECK_S = 3.5
"""Two checks of a second each, and their time-outs."""


@pytest_asyncio.fixture
async def consul(consul_binary: Path, tmp_path: Path) -> AsyncIterator[ConsulHost]:
    async with consul_agent(consul_binary, tmp_path) as host:
        yield host


@pytest.fixture
def site(consul: ConsulHost) -> Site:
    return Site(consul)


async def srv(site: Site, tag: str) -> list[int]:
    """Ports that Consul's DNS answers for a tag."""
    host, _, port = site.consul.dns.rpartition(":")
    query = dns.message.make_query(f"{tag}.{site.service}.service.consul", dns.rdatatype.SRV)
    answer = await dns.asyncquery.tcp(query, host, timeout=3, port=int(port))
    return [record.port for rrset in answer.answer for record in rrset]


async def test_consul_shows_the_fleet_without_any_code_of_ours(site: Site) -> None:
    async with site.registry() as registry, scripted_worker("decode-0", registry) as worker:
        (entry,) = await site.consul.access.get(f"/v1/catalog/service/{site.service}?tag=decode")
        assert f"{entry['ServiceAddress']}:{entry['ServicePort']}" == worker.member.address
        meta = entry["ServiceMeta"]
        shown = {key: meta[key] for key in ("kind", "id", "role", "model", "epoch", "state", "release", "lease_id")}
        assert shown == {
            "kind": "worker", "id": "decode-0", "role": "decode", "model": "tiny", "state": "serving",
            "epoch": str(worker.member.epoch), "release": "0.0.1", "lease_id": worker.lease_id,
        }  # fmt: skip
        assert isinstance(worker.member, Worker)
        assert meta["capabilities_digest"] == worker.member.capabilities_digest
        assert await srv(site, "decode") == [int(worker.member.address.rpartition(":")[2])]
        assert await srv(site, "registry") == [int(registry.address.rpartition(":")[2])]
        checks = [check for entry in await site.consul.services(site.service) for check in entry["Checks"]]
        assert {check["Type"] for check in checks if check["ServiceID"]} == {"grpc"}
        assert len((await listed(registry)).workers) == 1
    assert await site.consul.services(site.service) == [], "an end in order leaves nothing behind"


async def test_adapters_of_a_worker_reach_every_replica_within_its_epoch(site: Site) -> None:
    adapters = tuple(Adapter(f"a{number:02}", f"{number:064x}") for number in range(9))

    async def seen(registry: Any) -> list[tuple[int, int]]:
        workers = [worker_from_proto(entry.worker) for entry in (await listed(registry)).workers]
        return [(worker.epoch, len(worker.adapters)) for worker in workers]

    async with AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(site.registry()) for _ in range(2)]
        worker = await stack.enter_async_context(scripted_worker("decode-0", first, second))
        for now in (adapters, adapters[:1], adapters):
            assert await worker.registration.set_adapters(now, 10)
            wanted = [(worker.member.epoch, len(now))]
            for registry in (first, second):
                await assert_eventually(partial(seen, registry), partial(eq, wanted), within_s=10)


async def test_replicas_over_one_agent_publish_the_same_view_at_the_same_revision(site: Site) -> None:
    async with AsyncExitStack() as stack:
        registries = [await stack.enter_async_context(site.registry()) for _ in range(3)]
        await same_views(registries, stack)


async def test_replicas_over_several_servers_publish_the_same_view_at_the_same_revision(
    consul_binary: Path, tmp_path: Path
) -> None:
    async with consul_servers(consul_binary, tmp_path) as consul, AsyncExitStack() as stack:
        site = Site(consul)
        registries = [await stack.enter_async_context(site.registry(agent)) for agent in range(3)]
        await same_views(registries, stack)


async def same_views(registries: list[Any], stack: AsyncExitStack) -> None:
    """Workers come and go at all replicas at once; the replicas never contradict each other, and agree in the end."""
    watches = [await stack.enter_async_context(watched(registry)) for registry in registries]
    order = random.Random(1)
    # While no worker is listed, replicas look twice and skip some of the steps.
    steady = await stack.enter_async_context(AsyncExitStack())
    await steady.enter_async_context(scripted_worker("steady", registries[0]))
    for number in range(12):
        names = [order.choice(registries) for _ in range(2)]
        async with AsyncExitStack() as some:
            for part, registry in enumerate(names):
                await some.enter_async_context(scripted_worker(f"w-{number}-{part}", registry))
    lease_keeper = order.choice(registries)
    await steady.aclose()
    last = await stack.enter_async_context(scripted_worker("last", lease_keeper))
    views = [await eventually_alone(registry, "last") for registry in registries]
    assert {view.registry_id for view in views} == {watches[0].steps[0][0]}
    assert {view.workers[0].lease_keeper for view in views} == {(await listed(lease_keeper)).replica_id}
    assert {view.workers[0].worker.epoch for view in views} == {last.member.epoch}
    seen: dict[int, set[tuple[str, ...]]] = {}
    for _, revision, workers in itertools.chain(*(watch.steps for watch in watches)):
        seen.setdefault(revision, set()).add(workers)
    assert len(seen) > 12
    contradictions = {revision: views for revision, views in seen.items() if len(views) > 1}
    assert not contradictions


async def eventually_alone(registry: Any, worker_id: str) -> pb.ListResponse:
    async def look() -> pb.ListResponse:
        return await listed(registry)

    return await assert_eventually(look, lambda view: [e.worker.worker_id for e in view.workers] == [worker_id])


async def test_a_silent_worker_leaves_every_view_when_its_lease_ends(site: Site) -> None:
    loop = asyncio.get_running_loop()
    async with site.registry() as one, site.registry() as two, scripted_worker("w", one) as worker:
        await assert_eventually(lambda: worker_ids(two), lambda ids: ids == ["w"])
        await worker.fall_silent()
        silent_s = loop.time()
        await assert_eventually(lambda: worker_ids(two), lambda ids: ids == [], within_s=TTL_S + 4)
        assert loop.time() - silent_s < TTL_S + 3, "a lease, a sweep, and what a loaded machine takes"
        assert await worker_ids(one) == []


async def test_health_takes_a_worker_out_while_its_lease_lives_and_back(site: Site) -> None:
    async with site.registry() as registry, scripted_worker("w", registry) as worker:
        await worker.server.set_serving(False)
        await assert_eventually(lambda: worker_ids(registry), lambda ids: ids == [], within_s=CHECK_S)
        assert worker.registration.registered, "its stream lives"
        lease_id = worker.lease_id
        await worker.server.set_serving(True)
        await assert_eventually(lambda: worker_ids(registry), lambda ids: ids == ["w"], within_s=CHECK_S)
        assert worker.lease_id == lease_id, "the same lease all the time"


async def test_a_member_that_works_and_is_not_ready_keeps_its_entry(site: Site) -> None:
    """A worker that a registry is about to confirm, or a frontend without workers."""
    async with (
        site.registry() as registry,
        scripted_worker("waits", registry) as waiting,
        scripted_worker("x", registry) as broken,
    ):
        await waiting.server.set_serving(False, works=True)
        await broken.server.set_serving(False)
        # Consul has checked both by then: the checks of all entries have one interval.
        await assert_eventually(lambda: worker_ids(registry), lambda ids: "x" not in ids, within_s=CHECK_S)
        await asyncio.sleep(CHECK_S)
        assert await worker_ids(registry) == ["waits"]
        [entry] = (await listed(registry)).workers
        assert entry.health == pb.LISTED_HEALTH_PASSING


async def test_a_draining_worker_stays_in_the_view_and_leaves_the_dns(site: Site) -> None:
    async with site.registry() as registry, scripted_worker("w", registry) as worker:
        assert await worker.registration.set_state(WorkerState.DRAINING)
        await worker.server.set_serving(False)
        await assert_eventually(lambda: srv(site, "decode"), lambda ports: ports == [])
        await asyncio.sleep(CHECK_S)
        (entry,) = (await listed(registry)).workers
        assert entry.worker.state == worker_to_proto(make_worker(state=WorkerState.DRAINING)).state
        assert entry.health == pb.LISTED_HEALTH_CRITICAL
        await worker.die()
        await assert_eventually(lambda: worker_ids(registry), lambda ids: ids == [], within_s=TTL_S + 2)


async def test_leases_of_a_killed_replica_live_on_at_another_one(site: Site, tmp_path: Path) -> None:
    async with (
        site.process(tmp_path) as first,
        site.registry() as second,
        scripted_worker("w", first, second) as worker,
        watched(second) as watch,
    ):
        before = (await listed(second)).workers[0]
        lease_id = worker.lease_id
        await first.kill()

        async def kept_here() -> bool:
            view = await listed(second)
            return [entry.lease_keeper for entry in view.workers] == [view.replica_id]

        await assert_eventually(kept_here, within_s=TTL_S + 1)
        await asyncio.sleep(2 * TTL_S)
        after = (await listed(second)).workers[0]
        assert worker.lease_id == lease_id, "the worker never had to register again"
        assert (after.worker, before.lease_keeper != after.lease_keeper) == (before.worker, True)
        assert after.lease_age.ToNanoseconds() / 1e9 < TTL_S
        assert {workers for _, _, workers in watch.steps} == {("w",)}, "no watcher saw it missing"


async def test_a_worker_that_dies_with_its_replica_leaves_all_the_same(site: Site, tmp_path: Path) -> None:
    async with site.process(tmp_path) as first, site.registry() as second, scripted_worker("w", first) as worker:
        await assert_eventually(lambda: worker_ids(second), lambda ids: ids == ["w"])
        await asyncio.gather(first.kill(), worker.die())
        await assert_eventually(lambda: worker_ids(second), lambda ids: ids == [], within_s=CHECK_S + 2)


async def test_a_lone_replica_that_was_killed_takes_up_the_leases_it_had(site: Site, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(site.process(tmp_path, port=(port := free_port())))
        worker = await stack.enter_async_context(scripted_worker("w", first))
        lease_id = worker.lease_id
        registry_id = (await listed(first)).registry_id
        await first.kill()
        second = await stack.enter_async_context(site.process(tmp_path, port=port))
        view = await listed(second)
        assert [entry.worker.worker_id for entry in view.workers] == ["w"], "known from the first moment on"
        assert view.registry_id == registry_id
        await asyncio.sleep(2 * TTL_S)
        assert await worker_ids(second) == ["w"]
        assert worker.lease_id == lease_id


async def test_a_paused_replica_does_not_end_leases_that_went_elsewhere(site: Site, tmp_path: Path) -> None:
    async with (
        site.process(tmp_path) as first,
        site.registry() as second,
        scripted_worker("w", first, second) as worker,
        watched(second) as watch,
    ):
        await first.pause()

        async def kept_here() -> bool:
            view = await listed(second)
            return [entry.lease_keeper for entry in view.workers] == [view.replica_id]

        await assert_eventually(kept_here, within_s=10)
        first.resume()
        await asyncio.sleep(2 * TTL_S)
        assert await worker_ids(second) == await worker_ids(first) == ["w"]
        assert worker.registration.registered
        assert {workers for _, _, workers in watch.steps} == {("w",)}


async def test_a_worker_of_another_replica_can_be_drained_and_taken_out(site: Site) -> None:
    async with site.registry() as one, site.registry() as two, scripted_worker("w", one) as worker:
        await assert_eventually(lambda: worker_ids(two), lambda ids: ids == ["w"])
        async with open_channel(two.address) as channel:
            stub: Any = RegistryServiceStub(channel)
            drained = await stub.Drain(pb.DrainRequest(worker_id="w", epoch=worker.member.epoch))
            assert drained.revision > 0
            await asyncio.sleep(2 * TTL_S)
            states = {entry.worker.state for r in (one, two) for entry in (await listed(r)).workers}
            assert len(states) == 1, "signs of life at the other replica do not undo it"
            lease_id = worker.lease_id
            await worker.die()
            await stub.Deregister(pb.DeregisterRequest(lease_id=lease_id))
        await assert_eventually(lambda: worker_ids(one), lambda ids: ids == [], within_s=0.5)


async def test_of_two_starts_at_two_replicas_the_newer_one_counts(site: Site) -> None:
    """Both replicas are asked at the same moment; whichever grants first, the view and the leases agree in the end."""
    async with site.registry(lease_ttl_s=30) as one, site.registry(lease_ttl_s=30) as two:
        for epoch in range(1, 6):
            answers = await asyncio.gather(
                register(one, epoch=10 * epoch), register(two, epoch=10 * epoch + 1), return_exceptions=True
            )
            assert not isinstance(answers[1], BaseException), "the newer start is never refused"
            assert answers[0] is None or isinstance(answers[0], DuplicateWorker)
            for registry in (one, two):
                await assert_eventually(partial(epochs, registry), partial(eq, [10 * epoch + 1]))


async def register(registry: Any, epoch: int) -> None:
    async with open_channel(registry.address) as channel:
        stub: Any = RegistryServiceStub(channel)
        worker = make_worker("w", epoch, "127.0.0.1:9")
        try:
            await stub.Register(pb.RegisterRequest(worker=worker_to_proto(worker)))
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None


async def epochs(registry: Any) -> list[int]:
    return [entry.worker.epoch for entry in (await listed(registry)).workers]


async def test_a_storm_of_registrations_keeps_to_few_connections(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "REGISTRATIONS_MAX", 16)
    port = site.consul.first.ports.http
    most = 0

    def connections() -> int:
        found = psutil.Process().net_connections("tcp")
        return sum(1 for c in found if c.raddr and c.raddr.port == port and c.status == psutil.CONN_ESTABLISHED)

    async def enter(stub: Any, number: int) -> None:
        worker = make_worker(f"w-{number}", 1, f"127.0.0.1:{number + 1}")
        while True:
            try:
                await stub.Register(pb.RegisterRequest(worker=worker_to_proto(worker)), timeout=10)
            except grpc.aio.AioRpcError as failure:
                refusal = from_rpc_error(failure)
                assert isinstance(refusal, Overloaded | ServiceError), refusal
                refused.append(refusal)
                await asyncio.sleep(0.5)
            else:
                return

    refused: list[TandemError] = []
    async with (
        site.registry(consul_checks=False, lease_ttl_s=30) as registry,
        open_channel(registry.address) as channel,
    ):
        stub: Any = RegistryServiceStub(channel)
        calls = [asyncio.ensure_future(enter(stub, number)) for number in range(120)]
        while not all(call.done() for call in calls):
            most = max(most, connections())
            await asyncio.sleep(0.05)
        await asyncio.gather(*calls)
        assert len((await listed(registry)).workers) == 120
    assert any(isinstance(refusal, Overloaded) for refusal in refused), "more at once than are let through"
    assert 1 < most <= 8


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
