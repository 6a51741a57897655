"""Registries over Consul for a test, in this process or one of their own, and members that serve and hold leases.

A member here is real to Consul and to the registry: it answers health checks at its address and holds its lease over
the client that workers use. What it lacks is an engine.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import psutil
from tandem_registry.app import RegistryApp
from tandem_registry.config import RegistryConfig

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from tandem.discovery import Registration
from tandem.domain.frontend import Member
from tandem.domain.worker import capabilities_digest
from tandem.rpc.channels import open_channel
from tandem.rpc.server import RpcServer
from tandem.testing.eventually import assert_eventually
from tests.integration.support.consul_host import ConsulHost
from tests.unit.support.registry_workers import make_worker

TTL_S = 1.0


@dataclass
class Site:
    """One cluster's place in Consul."""

    consul: ConsulHost
    service: str = field(default_factory=lambda: f"t-{uuid.uuid4().hex[:12]}")
    more: dict[str, Any] = field(default_factory=dict)

    def settings(self, agent: int = 0, **more: Any) -> dict[str, Any]:
        address = self.consul.agents[agent].access.address
        own = {"backend": "consul", "consul_address": address, "consul_service": self.service}
        return {"lease_ttl_s": TTL_S, "drain_settle_s": 0.1, **own, **self.more, **more}

    @asynccontextmanager
    async def registry(self, agent: int = 0, **more: Any) -> AsyncIterator[RegistryApp]:
        """A replica in this process."""
        async with RegistryApp.open(RegistryConfig(**self.settings(agent, **more))) as app:
            yield app

    @asynccontextmanager
    async def process(self, directory: Path, agent: int = 0, **more: Any) -> AsyncIterator[RegistryProcess]:
        """A replica that can be killed."""
        announce = directory / f"registry-{uuid.uuid4().hex[:8]}.json"
        settings = self.settings(agent, announce_file=announce, **more)
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
        log = announce.with_suffix(".log")
        with log.open("wb") as sink:
            child = subprocess.Popen(  # noqa: ASYNC220 -- it returns at once
                [sys.executable, "-m", "tandem_registry", *flags], stdout=sink, stderr=sink, env=dict(os.environ)
            )
        process = RegistryProcess(child)
        try:
            await assert_eventually(announce.exists, within_s=20, what="the registry's announcement")
            process.address = json.loads(announce.read_text())["address"]
            yield process
        finally:
            child.send_signal(signal.SIGCONT)
            child.kill()
            await asyncio.to_thread(child.wait)


@dataclass
class RegistryProcess:
    child: subprocess.Popen[bytes]
    address: str = ""

    async def kill(self) -> None:
        """SIGKILL; returns when the process has ended."""
        self.child.kill()
        await asyncio.to_thread(self.child.wait)
        assert self.child.returncode == -signal.SIGKILL

    async def pause(self) -> None:
        """SIGSTOP; returns when the kernel shows it."""
        self.child.send_signal(signal.SIGSTOP)
        process = psutil.Process(self.child.pid)
        await assert_eventually(lambda: process.status() == psutil.STATUS_STOPPED, what="a stopped registry")

    def resume(self) -> None:
        """SIGCONT."""
        self.child.send_signal(signal.SIGCONT)


class ScriptedMember:
    """A worker without an engine."""

    def __init__(self, server: RpcServer, registration: Registration, member: Member) -> None:
        self.server = server
        self.registration = registration
        self.member = member

    @property
    def lease_id(self) -> str:
        lease = self.registration._lease
        assert lease is not None
        return lease.lease_id

    async def fall_silent(self) -> None:
        """No more signs of life and no word of it, as when its process dies; its server stays."""
        task = self.registration._task
        assert task is not None
        task.cancel()
        await asyncio.wait({task})
        self.registration._lease = None
        await self.registration._channels.close()

    async def die(self) -> None:
        """Its process is gone: nothing listens at its address."""
        await self.fall_silent()
        await self.server.stop(0)


@asynccontextmanager
async def scripted_worker(worker_id: str, *registries: Any, epoch: int | None = None) -> AsyncIterator[ScriptedMember]:
    """A worker that is registered at one of the registries, and that all of them list."""
    server = RpcServer()
    await server.start("127.0.0.1", 0)
    await server.set_serving(True)
    worker = make_worker(worker_id, epoch or int(time.time() * 1_000), f"127.0.0.1:{server.port}")
    worker = replace(worker, capabilities_digest=capabilities_digest(worker.capabilities), release="0.0.1")
    registration = Registration([registry.address for registry in registries], worker)

    async def listed_by_all() -> bool:
        return all([worker_id in await worker_ids(registry) for registry in registries])

    await registration.start()
    try:
        async with asyncio.timeout(10):
            await registration.wait_registered()
            await assert_eventually(listed_by_all)
        yield ScriptedMember(server, registration, worker)
    finally:
        await registration.close()
        await server.stop(0)


@dataclass
class Watched:
    """Everything that one stream of a registry has reported."""

    steps: list[tuple[str, int, tuple[str, ...]]] = field(default_factory=list)
    """Registry id, revision, and the ids of the workers after each step."""
    workers: dict[str, Any] = field(default_factory=dict)

    def apply(self, step: pb.WatchResponse) -> None:
        if step.WhichOneof("event") == "snapshot":
            self.workers = {worker.worker_id: worker for worker in step.snapshot.workers}
        else:
            assert step.previous_revision == self.steps[-1][1]
            for gone in step.delta.removed:
                if self.workers[gone.worker_id].epoch <= gone.epoch:
                    del self.workers[gone.worker_id]
            self.workers.update({worker.worker_id: worker for worker in step.delta.upserted})
        self.steps.append((step.registry_id, step.revision, tuple(sorted(self.workers))))


@asynccontextmanager
async def watched(registry: Any) -> AsyncIterator[Watched]:
    """Follow one registry over the wire, without the patience that a frontend has."""
    found = Watched()
    async with open_channel(registry.address) as channel:
        stub: Any = RegistryServiceStub(channel)
        call = stub.Watch(pb.WatchRequest())
        found.apply(await call.read())

        async def follow() -> None:
            while (step := await call.read()) is not grpc.aio.EOF:
                found.apply(step)

        task = asyncio.create_task(follow())
        try:
            yield found
            if task.done():
                task.result()
        finally:
            task.cancel()
            await asyncio.wait({task})
            call.cancel()


async def listed(registry: Any) -> pb.ListResponse:
    """The view of one replica."""
    async with open_channel(registry.address) as channel:
        stub: Any = RegistryServiceStub(channel)
        view: pb.ListResponse = await stub.List(pb.ListRequest(), timeout=3)
        return view


async def worker_ids(registry: Any) -> list[str]:
    """The workers in the view of one replica."""
    return [entry.worker.worker_id for entry in (await listed(registry)).workers]
