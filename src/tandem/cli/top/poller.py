"""Follows the fleet: members from the registries, load and health from each process.

Owns one task for the registries and one per process. A process that fails is shown as unreachable and reconnected
to; no failure ends the watch. Members are found as in `tandem status`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.api.admin.v1 import admin_service_pb2 as admin_pb
from tandem.api.admin.v1.admin_service_pb2_grpc import FrontendAdminServiceStub
from tandem.api.worker.v1 import worker_service_pb2 as worker_pb
from tandem.api.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from tandem.cli.membership import ask_all
from tandem.clock import Clock, monotonic
from tandem.errors import StartError, TandemError
from tandem.observability.fleet_sample import (
    GONE,
    UNREACHABLE,
    FrontendSample,
    Sample,
    WorkerSample,
    failures_by_worker,
    role_name,
    state_name,
)
from tandem.rpc.backoff import Backoff
from tandem.rpc.channels import Channels
from tandem.tls.paths import Tls

GONE_SHOWN_S = 60.0
"""How long a process is still shown after it was deregistered."""
SILENT_INTERVALS = 3
"""A process without a report for so many intervals is shown as unreachable."""
SILENT_S_MIN = 2.0


@dataclass(slots=True)
class _Member:
    """A process of the fleet and its last two reports."""

    role: str
    name: str
    epoch: int
    address: str
    state: str
    task: asyncio.Task[None] | None = None
    health: str = "-"
    report: Any = None
    previous_report: Any = None
    reported_s: float | None = None
    gone_s: float | None = None


class FleetWatch:
    """The fleet, followed while the context is open."""

    def __init__(
        self, registries: Sequence[str], interval_s: float, tls: Tls | None = None, clock: Clock = monotonic
    ) -> None:
        self._registries = registries
        self._interval_s = interval_s
        self._tls = tls
        self._clock = clock
        self._channels = Channels(tls)
        self._members: dict[tuple[str, str], _Member] = {}
        """By role "frontend" or "worker", and name."""
        self._problem: str | None = "no registry has responded yet"

    @asynccontextmanager
    async def following(self) -> AsyncIterator[FleetWatch]:
        """Follow the fleet while the context is open.

        Raises:
            StartError: an address is not that of a registry.
            TandemError: no registry responds at the start; later failures are reported in `Sample.registry_problem`.
        """
        await self._ask()
        self._problem = None
        asking = asyncio.create_task(self._ask_again(), name="membership")
        try:
            yield self
        finally:
            tasks = [asking, *(member.task for member in self._members.values() if member.task is not None)]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await self._channels.close()

    def sample(self) -> Sample:
        """The current state of the fleet."""
        members = sorted(self._members.values(), key=lambda member: (member.role, member.name))
        frontends = tuple(self._frontend(member) for member in members if member.role == "frontend")
        failures = failures_by_worker(frontends)
        return Sample(
            time_s=time.time(),
            workers=tuple(self._worker(m, failures.get(m.name, 0)) for m in members if m.role != "frontend"),
            frontends=frontends,
            registry_problem=self._problem,
            missing=tuple(m.name for m in members if m.previous_report is None and m.gone_s is None),
        )

    # --- Members

    async def _ask_again(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self._ask()
                self._problem = None
            except (StartError, TandemError) as problem:
                self._problem = str(problem)

    async def _ask(self) -> None:
        fleet = await ask_all(self._registries, self._tls)
        now_s = self._clock()
        listed: dict[tuple[str, str], _Member] = {}
        for worker in (entry.worker for entry in fleet.workers):
            member = _Member(
                role_name(worker.role), worker.worker_id, worker.epoch, worker.address, state_name(worker.state)
            )
            listed["worker", member.name] = member
        for frontend in (entry.frontend for entry in fleet.frontends):
            state = state_name(frontend.state)
            listed["frontend", frontend.frontend_id] = _Member(
                "frontend", frontend.frontend_id, frontend.epoch, frontend.address, state
            )
        for key, member in self._members.items():
            if key not in listed and member.gone_s is None:
                member.gone_s = now_s
        for key, member in listed.items():
            self._note(key, member)
        for key in [k for k, m in self._members.items() if m.gone_s is not None and now_s - m.gone_s > GONE_SHOWN_S]:
            self._forget(key)

    def _note(self, key: tuple[str, str], listed: _Member) -> None:
        known = self._members.get(key)
        if known is not None and (known.epoch, known.address) == (listed.epoch, listed.address):
            known.state, known.gone_s = listed.state, None
            return
        if known is not None:
            self._forget(key)
        self._members[key] = listed
        follow = self._follow_frontend if listed.role == "frontend" else self._follow_worker
        listed.task = asyncio.create_task(self._follow(listed, follow), name=f"top-{listed.name}")

    def _forget(self, key: tuple[str, str]) -> None:
        task = self._members.pop(key).task
        if task is not None:
            task.cancel()

    # --- Load and health

    async def _follow(self, member: _Member, follow: Callable[[_Member], Awaitable[None]]) -> None:
        backoff = Backoff(first_s=0.2, most_s=max(1.0, self._interval_s))
        health = asyncio.create_task(self._follow_health(member))
        try:
            while True:
                reported_s = member.reported_s
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await follow(member)
                if member.reported_s != reported_s:
                    backoff.reset()
                await asyncio.sleep(backoff.next_s())
        finally:
            health.cancel()

    async def _follow_worker(self, member: _Member) -> None:
        stub: Any = WorkerServiceStub(self._channels.get(member.address))
        call = stub.WatchLoad(worker_pb.WatchLoadRequest(interval_ms=self._interval_ms(10)))
        await self._read(call, member, lambda report: bool(report.epoch == member.epoch))

    async def _follow_frontend(self, member: _Member) -> None:
        stub: Any = FrontendAdminServiceStub(self._channels.get(member.address))
        call = stub.WatchFigures(admin_pb.WatchFiguresRequest(interval_ms=self._interval_ms(100)))
        await self._read(call, member, lambda report: True)

    async def _read(self, call: Any, member: _Member, is_current: Callable[[Any], bool]) -> None:
        try:
            while (report := await call.read()) is not grpc.aio.EOF:
                # Another start of the worker may listen at the address by now.
                if is_current(report):
                    member.previous_report, member.report = member.report, report
                    member.reported_s = self._clock()
        finally:
            call.cancel()

    async def _follow_health(self, member: _Member) -> None:
        while True:
            stub: Any = health_pb2_grpc.HealthStub(self._channels.get(member.address))
            call = stub.Watch(health_pb2.HealthCheckRequest())
            try:
                while (response := await call.read()) is not grpc.aio.EOF:
                    is_ok = response.status == health_pb2.HealthCheckResponse.SERVING
                    member.health = "ok" if is_ok else "not serving"
            except grpc.aio.AioRpcError:
                member.health = "-"
            finally:
                call.cancel()
            await asyncio.sleep(max(0.5, self._interval_s))

    def _interval_ms(self, least: int) -> int:
        return max(least, int(self._interval_s * 1_000))

    # --- Rows

    def _worker(self, member: _Member, failures: int) -> WorkerSample:
        state = self._state(member)
        is_reachable = state not in (GONE, UNREACHABLE)
        return WorkerSample(
            name=member.name,
            role=member.role,
            epoch=member.epoch,
            address=member.address,
            state=state,
            health=member.health,
            load=member.report if is_reachable else None,
            before=member.previous_report if is_reachable else None,
            failures=failures,
        )

    def _frontend(self, member: _Member) -> FrontendSample:
        state = self._state(member)
        return FrontendSample(
            name=member.name,
            epoch=member.epoch,
            address=member.address,
            state=state,
            health=member.health,
            stats=member.report if state not in (GONE, UNREACHABLE) else None,
        )

    def _state(self, member: _Member) -> str:
        if member.gone_s is not None:
            return GONE
        silent_s = max(SILENT_S_MIN, SILENT_INTERVALS * self._interval_s)
        if member.reported_s is None or self._clock() - member.reported_s > silent_s:
            return UNREACHABLE
        return member.state
