"""Events in a cluster, each caused on purpose: what metrics must move for.

Each is a context: inside it, the event has happened, or goes on. Owns the cause and the repair; which metric is to move
for which event is the test's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import psutil
import pytest

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.registry.v1 import registry_service_pb2 as registry_pb
from tandem.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from tandem.api.types.v1 import sampling_pb2
from tandem.client import calls
from tandem.client.adapter_calls import load_adapter, unload_adapter
from tandem.errors import QuotaExceeded, TandemError
from tandem.local_cluster.child_process import ClusterProcess
from tandem.local_cluster.cluster import LocalCluster
from tandem.rpc.channels import open_channel
from tandem.service import run_directory
from tandem.testing.eventually import assert_eventually
from tests.faults.support.leg_cluster import inject
from tests.integration.support.batch_calls import chat_rows, created, ended, sdk
from tests.integration.support.bootstrap import bootstrap_url
from tests.integration.support.calls import generate, refusal, request_of
from tests.integration.support.role_changes import AGGREGATED, DECODE, PREFILL, change
from tests.integration.support.tenant_calls import generate_as

LONG = [20 + number % 1_000 for number in range(256)]
"""A prompt of whole pages."""
SLOW = {"point": "decode_step", "kind": "delay", "delay_s": 0.05}
QUEUED = 14
"""More than two decode workers take that run two at a time."""
PAUSE_S = 1.0
ADAPTER = "an-adapter"
"""Its directory, below the workers' adapter_root."""
LIVE = registry_pb.VIEW_SOURCE_LIVE


class World:
    """A cluster whose engines follow control files in its log directory."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.more: list[ClusterProcess] = []
        """Processes that are none of the cluster's own."""
        self.fresh = itertools.count(1_200)
        """Tokens that no prompt began with."""

    @property
    def processes(self) -> list[ClusterProcess]:
        return [*self.cluster.processes, *self.more]

    @property
    def decodes(self) -> list[ClusterProcess]:
        return [process for process in self.cluster.workers if process.role == "decode"]

    def inject(self, name: str, *rules: dict[str, Any]) -> None:
        inject(self.cluster.log_directory / f"{name}.rules", *rules)

    @asynccontextmanager
    async def faults(self, *names: str, rule: dict[str, Any]) -> AsyncIterator[None]:
        """Engines of these workers have this fault in the block."""
        for name in names:
            self.inject(name, rule)
        try:
            yield
        finally:
            for name in names:
                self.inject(name)

    async def ask_as(self, client: str) -> None:
        """A short answer to a client with this header of the edge's."""
        await generate_as(client, self.cluster.frontend.address, request_of(token_ids=LONG, max_tokens=8))

    async def ask_often_as(self, client: str) -> None:
        """More than once, because another process may admit one more before it knows of the first."""
        for _ in range(20):
            await self.ask_as(client)

    @asynccontextmanager
    async def open_streams(self, count: int = 1) -> AsyncIterator[list[asyncio.Task[None]]]:
        """So many clients read long answers of slow engines in the block; they leave at its end."""
        async with self.faults(*(decode.name for decode in self.decodes), rule=SLOW):
            clients_ = [asyncio.create_task(self.read_long()) for _ in range(count)]
            try:
                yield clients_
            finally:
                for client in clients_:
                    client.cancel()
                await asyncio.wait(clients_)

    async def read_long(self, on_event: Any = None) -> None:
        """Read an answer of 400 tokens."""
        request = request_of(token_ids=LONG, max_tokens=400, ignore_eos=True)
        async with contextlib.aclosing(calls.generate(self.cluster.frontend.address, request, 30)) as events:
            async for event in events:
                if on_event is not None:
                    on_event(event)

    async def back(self, process: ClusterProcess) -> None:
        """Start a process again that has ended, and wait until all are members."""
        await process.wait_ended()
        await self.cluster.restart(process.name)
        await self.all_serve()

    async def view_source(self) -> int:
        """Where the registry's view comes from."""
        return (await calls.list_members(self.cluster.registry.address)).source

    async def all_serve(self) -> None:
        """Return when every worker serves, as the registry and a frontend's own eyes see it."""

        async def serving() -> int:
            listed = await calls.list_workers(self.cluster.registry.address)
            return sum([await calls.is_serving(one.worker.address) for one in listed])

        wanted = len(self.cluster.workers)
        await assert_eventually(serving, lambda count: count == wanted, within_s=15, what="workers that serve")


@asynccontextmanager
async def an_answer(world: World) -> AsyncIterator[None]:
    await generate(world.cluster, request_of(token_ids=LONG, max_tokens=20, ignore_eos=True))
    yield


@asynccontextmanager
async def a_prompt_that_is_known(world: World) -> AsyncIterator[None]:
    for _ in range(3):
        await generate(world.cluster, request_of(token_ids=LONG, max_tokens=4))
    yield


@asynccontextmanager
async def a_new_prompt_twice(world: World) -> AsyncIterator[None]:
    """Half of all its tokens are known."""
    begin = next(world.fresh)
    for _ in range(2):
        await generate(world.cluster, request_of(token_ids=[begin, *LONG, *LONG], max_tokens=4))
    yield


@asynccontextmanager
async def a_request_over_http(world: World) -> AsyncIterator[None]:
    assert world.cluster.edge is not None
    async with httpx.AsyncClient(base_url=f"http://{world.cluster.edge.address}") as client:
        body = {"model": world.cluster.frontend.flags["model-name"], "prompt": "Once upon a time", "max_tokens": 4}
        (await client.post("/v1/completions", json=body)).raise_for_status()
    yield


@asynccontextmanager
async def a_tenants_answer(world: World) -> AsyncIterator[None]:
    await world.ask_as("alice")
    yield


@asynccontextmanager
async def a_used_quota(world: World) -> AsyncIterator[None]:
    with pytest.raises(QuotaExceeded):
        await world.ask_often_as("bob;requests_per_minute=1")
    yield


@asynccontextmanager
async def a_batch(world: World) -> AsyncIterator[None]:
    """One that runs until the block ends."""
    assert world.cluster.edge is not None
    async with sdk(world.cluster.edge.address) as client:
        batch = await created(client, chat_rows(1_000, max_tokens=50))
        yield
        await client.batches.cancel(batch.id)
        await ended(client, batch)


@asynccontextmanager
async def a_refusal(world: World) -> AsyncIterator[None]:
    request = pb.GenerateRequest(prompt="x", sampling=sampling_pb2.Sampling(temperature=-1.0))
    assert (await refusal(world.cluster, request)).reason == "INVALID_REQUEST"
    yield


@asynccontextmanager
async def an_open_stream(world: World) -> AsyncIterator[None]:
    async with world.open_streams():
        yield


@asynccontextmanager
async def a_full_house(world: World) -> AsyncIterator[None]:
    async with world.open_streams(QUEUED):
        yield


@asynccontextmanager
async def a_held_prefill(world: World) -> AsyncIterator[None]:
    """One prompt is held in the engine, and others wait behind it."""
    async with world.faults("prefill-0", rule={"point": "prefill_chunk", "kind": "hang"}), world.open_streams(3):
        yield


@asynccontextmanager
async def a_leg_that_breaks(world: World) -> AsyncIterator[None]:
    async with world.faults("prefill-0", rule={"point": "prefill_chunk", "kind": "fail"}):
        with pytest.raises(TandemError):
            await generate(world.cluster, request_of(token_ids=LONG[:32]))
    yield


@asynccontextmanager
async def a_continuation(world: World) -> AsyncIterator[None]:
    """The decode worker dies in the middle of an answer."""
    decode_worker: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def note(event: pb.GenerateResponse) -> None:
        if event.HasField("accepted"):
            world.streaming = event.accepted.route.decode_worker_id  # type: ignore[attr-defined]
        if event.HasField("chunk") and event.chunk.index > 2 and not decode_worker.done():
            decode_worker.set_result(world.streaming)  # type: ignore[attr-defined]

    async with world.faults(*(decode.name for decode in world.decodes), rule={**SLOW, "delay_s": 0.01}):
        client = asyncio.create_task(world.read_long(note))
        victim = world.cluster.process(await decode_worker)
        victim.kill()
        await client
    await world.back(victim)
    yield


@asynccontextmanager
async def a_client_that_leaves(world: World) -> AsyncIterator[None]:
    begun = asyncio.Event()
    async with world.faults(*(decode.name for decode in world.decodes), rule=SLOW):
        # A leg that is given up before its worker has begun it has nothing to abort.
        def begin(event: Any) -> None:
            if event.HasField("chunk"):
                begun.set()

        client = asyncio.create_task(world.read_long(begin))
        await begun.wait()
        client.cancel()
        await asyncio.wait({client})
    yield


@asynccontextmanager
async def a_failing_canary(world: World) -> AsyncIterator[None]:
    async with world.faults("decode-0", rule={"point": "canary", "kind": "fail"}):
        yield
    await world.all_serve()


@asynccontextmanager
async def a_drain(world: World) -> AsyncIterator[None]:
    """A worker that drains and cannot end yet, because it has a leg."""
    async with world.open_streams(4):

        async def busy() -> list[ClusterProcess]:
            return [decode for decode in world.decodes if (await calls.worker_load(decode.address)).open_legs]

        # Chance has sent them to one worker, or to both.
        victim = (await assert_eventually(busy, what="a leg at a worker that may drain"))[0]
        victim.signal(signal.SIGTERM)
        yield
    await world.back(victim)


@asynccontextmanager
async def a_role_change(world: World) -> AsyncIterator[None]:
    """A decode worker becomes a prefill worker, and is one no longer afterwards."""
    await change(world.cluster, "decode-1", PREFILL)
    yield
    await change(world.cluster, "decode-1", DECODE)


@asynccontextmanager
async def a_loaded_adapter(world: World) -> AsyncIterator[None]:
    """All workers load an adapter, and release it afterwards."""
    await load_adapter(world.cluster.registry.address, "other", ADAPTER)
    yield
    await unload_adapter(world.cluster.registry.address, "other")


@asynccontextmanager
async def a_choice_of_kinds(world: World) -> AsyncIterator[None]:
    """A decode worker becomes an aggregated one, so that a request may go to either kind."""
    await change(world.cluster, "decode-1", AGGREGATED)

    async def placement() -> int:
        stream = await generate(world.cluster, request_of(token_ids=LONG[:20], max_tokens=1))
        return stream.finish.route.placement

    await assert_eventually(placement, what="the frontend's view of both kinds")
    yield
    await change(world.cluster, "decode-1", DECODE, force=True)


@asynccontextmanager
async def a_death(world: World) -> AsyncIterator[None]:
    victim = world.decodes[1]
    victim.kill()
    yield
    await world.back(victim)


@asynccontextmanager
async def a_stopped_prefill(world: World) -> AsyncIterator[None]:
    worker = world.cluster.process("prefill-0")
    await worker.stop()
    yield
    await world.back(worker)


@asynccontextmanager
async def a_dead_prefill(world: World) -> AsyncIterator[None]:
    worker = world.cluster.process("prefill-0")
    worker.kill()
    yield
    await world.back(worker)


@asynccontextmanager
async def a_restarted_prefill(world: World) -> AsyncIterator[None]:
    worker = world.cluster.process("prefill-0")
    await worker.stop()
    await world.back(worker)
    yield


@asynccontextmanager
async def a_smaller_worker(world: World) -> AsyncIterator[None]:
    worker = world.decodes[1]
    await worker.stop()
    worker.flags["kv-capacity-tokens"] = "8192"
    await world.back(worker)
    yield
    del worker.flags["kv-capacity-tokens"]


@asynccontextmanager
async def a_watcher(world: World) -> AsyncIterator[None]:
    async with open_channel(world.cluster.registry.address) as channel:
        stub: Any = RegistryServiceStub(channel)
        watch = stub.Watch(registry_pb.WatchRequest())
        await watch.read()
        yield
        watch.cancel()


@asynccontextmanager
async def a_silent_worker(world: World) -> AsyncIterator[None]:
    world.decodes[0].signal(signal.SIGSTOP)
    try:
        yield
    finally:
        world.decodes[0].signal(signal.SIGCONT)
    await world.all_serve()


@asynccontextmanager
async def a_second_model(world: World) -> AsyncIterator[None]:
    flags = {"registry": world.cluster.registry.address, "engine": "simulated", "role": "aggregated"}
    flags |= {"model": world.decodes[0].flags["model"], "model-name": "second-model"}
    worker = ClusterProcess("second-model", "aggregated", flags, world.cluster.log_directory)
    run = run_directory.make()
    await worker.start(run)
    await worker.wait_ready()
    try:
        yield
    finally:
        await worker.stop()
        run.rmdir()


@asynccontextmanager
async def another_registry(world: World) -> AsyncIterator[None]:
    flags = {"port": "0", "metrics-port": "0", "lease-ttl-s": "3"}
    registry = ClusterProcess("registry-more", "registry", flags, world.cluster.log_directory)
    run = run_directory.make()
    await registry.start(run)
    await registry.wait_ready()
    world.more.append(registry)
    try:
        yield
    finally:
        world.more.remove(registry)
        await registry.stop()
        run.rmdir()


@asynccontextmanager
async def a_pause(world: World) -> AsyncIterator[None]:
    frontend = world.cluster.frontend
    frontend.signal(signal.SIGSTOP)
    await asyncio.sleep(PAUSE_S)
    frontend.signal(signal.SIGCONT)
    yield


@asynccontextmanager
async def a_frozen_process(world: World) -> AsyncIterator[None]:
    """One of the processes of the frontend."""
    frozen = psutil.Process(world.cluster.frontend.pid).children()[0]
    frozen.suspend()
    try:
        yield
    finally:
        frozen.resume()


@asynccontextmanager
async def a_dead_process(world: World) -> AsyncIterator[None]:
    """The same."""
    psutil.Process(world.cluster.frontend.pid).children()[0].kill()
    yield


@asynccontextmanager
async def a_consul_that_is_away(world: World) -> AsyncIterator[None]:
    consul = world.cluster.consul
    assert consul is not None
    consul.kill()
    await consul.wait_ended()
    try:
        yield
    finally:
        await world.cluster.restart(consul.name)
        await assert_eventually(world.view_source, lambda source: source == LIVE, within_s=20, what="a live view")


@asynccontextmanager
async def a_consul_that_forgets(world: World) -> AsyncIterator[None]:
    """Entries of members vanish from Consul again and again: the view is held back meanwhile."""
    consul = world.cluster.consul
    assert consul is not None
    access = consul.access

    async def forget() -> None:
        while True:
            services = await access.get("/v1/agent/services")
            for service_id, service in services.items():
                if "registry" not in service["Tags"]:
                    await access.put(f"/v1/agent/service/deregister/{service_id}")
            await asyncio.sleep(0.05)

    forgetting = asyncio.create_task(forget())
    try:
        yield
    finally:
        forgetting.cancel()
        await asyncio.wait({forgetting})


@asynccontextmanager
async def a_foreign_registration(world: World) -> AsyncIterator[None]:
    """At the bootstrap server of a real engine."""
    url = await bootstrap_url(world.cluster.registry.address)
    async with httpx.AsyncClient() as client:
        answer = await client.put(f"{url}/route", json={"rank_ip": "127.0.0.9"})
    assert answer.status_code == 403
    yield
