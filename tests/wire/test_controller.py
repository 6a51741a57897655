"""A controller over gRPC: a registry, workers and a frontend that follow a script; what it asks for, and what not."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import pytest_asyncio
from tandem_registry.app import RegistryApp

from tandem.api.admin.v1 import admin_service_pb2 as admin_pb
from tandem.api.admin.v1 import admin_service_pb2_grpc as admin_grpc
from tandem.api.registry.v1 import registry_service_pb2 as registry_pb
from tandem.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from tandem.api.types.v1 import role_change_pb2, worker_pb2
from tandem.api.worker.v1 import worker_service_pb2 as pb
from tandem.api.worker.v1 import worker_service_pb2_grpc as pb_grpc
from tandem.controller.app import ControllerApp, election_of
from tandem.controller.settings import ControllerConfig
from tandem.domain.frontend import Frontend
from tandem.domain.worker import Worker, WorkerRole
from tandem.errors import RoleChangeRefused
from tandem.rpc.channels import open_channel
from tandem.rpc.convert import ROLE_BY_NUMBER, frontend_to_proto, worker_to_proto
from tandem.rpc.server import RpcServer
from tandem.testing.eventually import assert_eventually
from tests.integration.support.scraped import samples, scrape
from tests.wire.support.registry_host import make_worker, serve_registry

PREFILL, DECODE = WorkerRole.PREFILL, WorkerRole.DECODE
WORKERS, ADMIN = "tandem.api.worker.v1.WorkerService", "tandem.api.admin.v1.FrontendAdminService"
WITHIN_S = 30.0


def in_role(worker: Worker, role: WorkerRole) -> Worker:
    """A worker with what its role needs."""
    is_prefill = role is PREFILL
    host, port = ("127.0.0.1", 9) if is_prefill else (None, None)
    return replace(worker, role=role, bootstrap_host=host, bootstrap_port=port)


class ScriptedFleet:
    """Two prefill workers and a decode worker, whose decode has more requests than it has room for."""

    def __init__(self, registry: RegistryApp) -> None:
        self.registry = registry
        self.workers: dict[str, Worker] = {}
        self.asked: list[tuple[str, WorkerRole]] = []
        self.refusing: set[str] = set()
        self.figures_are_sent = True

    async def register(self, worker: Worker) -> None:
        self.workers[worker.worker_id] = worker
        async with open_channel(self.registry.address) as channel:
            stub: Any = RegistryServiceStub(channel)
            await stub.Register(registry_pb.RegisterRequest(worker=worker_to_proto(worker)))


class ScriptedWorker(pb_grpc.WorkerServiceServicer):
    """One of them."""

    def __init__(self, fleet: ScriptedFleet, worker_id: str) -> None:
        self._fleet = fleet
        self._worker_id = worker_id

    async def GetCapabilities(self, request: Any, context: Any) -> pb.GetCapabilitiesResponse:  # noqa: N802
        roles = [worker_pb2.WORKER_ROLE_PREFILL, worker_pb2.WORKER_ROLE_DECODE]
        return pb.GetCapabilitiesResponse(roles=roles)

    async def WatchLoad(self, request: Any, context: Any) -> AsyncIterator[pb.WatchLoadResponse]:  # noqa: N802
        for sequence in range(1, 10_000):
            worker = self._fleet.workers[self._worker_id]
            streams = 0 if worker.role is PREFILL else 8
            yield pb.WatchLoadResponse(
                sequence=sequence, epoch=worker.epoch, running_requests=streams, waiting_requests=0, waiting_tokens=0,
                kv_used_tokens=0, kv_capacity_tokens=4096, transferring_requests=0,
                completion_tokens=sequence * streams,
            )  # fmt: skip
            await asyncio.sleep(0.1)

    async def ChangeRole(  # noqa: N802
        self, request: pb.ChangeRoleRequest, context: Any
    ) -> AsyncIterator[pb.ChangeRoleResponse]:
        worker = self._fleet.workers[self._worker_id]
        self._fleet.asked.append((self._worker_id, ROLE_BY_NUMBER[request.role]))
        if self._worker_id in self._fleet.refusing:
            raise RoleChangeRefused("its script refuses", worker=self._worker_id)
        yield pb.ChangeRoleResponse(change=role_change_pb2.RoleChange(stage=role_change_pb2.ROLE_CHANGE_STAGE_DRAINING))
        await self._fleet.register(in_role(replace(worker, epoch=worker.epoch + 1), ROLE_BY_NUMBER[request.role]))
        yield pb.ChangeRoleResponse(change=role_change_pb2.RoleChange(stage=role_change_pb2.ROLE_CHANGE_STAGE_DONE))


class ScriptedFrontend(admin_grpc.FrontendAdminServiceServicer):
    """A frontend with a queue."""

    def __init__(self, fleet: ScriptedFleet) -> None:
        self._fleet = fleet

    async def WatchFigures(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        for sequence in range(1, 10_000):
            if self._fleet.figures_are_sent:
                yield admin_pb.WatchFiguresResponse(
                    sequence=sequence, open_requests=12, waiting_requests=4, finished_requests=sequence
                )
            await asyncio.sleep(0.1)


@pytest_asyncio.fixture
async def fleet() -> AsyncIterator[ScriptedFleet]:
    async with AsyncExitStack() as stack:
        made = ScriptedFleet(await stack.enter_async_context(serve_registry(ttl_s=20)))

        async def serve(name: str, add: Any) -> str:
            server = RpcServer([(name, add)])
            await server.start("127.0.0.1", 0)
            stack.push_async_callback(server.stop, 0)
            return f"127.0.0.1:{server.port}"

        for worker_id, role in (("decode-0", DECODE), ("prefill-0", PREFILL), ("prefill-1", PREFILL)):
            played = ScriptedWorker(made, worker_id)  # type: ignore[abstract]  # what it lacks is UNIMPLEMENTED
            address = await serve(WORKERS, partial(pb_grpc.add_WorkerServiceServicer_to_server, played))
            await made.register(in_role(make_worker(worker_id, 1, address), role))
        frontend = ScriptedFrontend(made)  # type: ignore[abstract]  # what it lacks is UNIMPLEMENTED
        address = await serve(ADMIN, partial(admin_grpc.add_FrontendAdminServiceServicer_to_server, frontend))
        async with open_channel(made.registry.address) as channel:
            stub: Any = RegistryServiceStub(channel)
            member = Frontend(frontend_id="frontend-0", epoch=1, address=address, model="tiny")
            await stub.RegisterFrontend(registry_pb.RegisterFrontendRequest(frontend=frontend_to_proto(member)))
        yield made


def controller(fleet: ScriptedFleet, **more: Any) -> Any:
    quick = {"interval_s": 0.1, "window_s": 1.0, "confirm_s": 0.2, "settle_s": 0.2, "metrics_port": 0}
    goals = {"ttft_s": 2.0, "itl_s": 0.5}
    return ControllerApp.open(ControllerConfig(registry=(fleet.registry.address,), **{**quick, **goals, **more}))


async def counted(app: ControllerApp, name: str, **labels: str) -> float:
    text = await scrape(f"127.0.0.1:{app.metrics_port}")
    return sum(value for own, found, value in samples(text) if own == name and labels.items() <= found.items())


async def wait_for(app: ControllerApp, reason: str, times: int = 1) -> None:
    """Until the controller has decided so."""

    async def decided() -> float:
        return await counted(app, "tandem_controller_decisions_total", tandem_reason=reason)

    await assert_eventually(decided, lambda count: count >= times, within_s=WITHIN_S, what=f"decisions {reason}")


async def test_decode_gets_one_worker_and_the_last_prefill_worker_stays(fleet: ScriptedFleet) -> None:
    async with controller(fleet) as app:
        await wait_for(app, "last_worker")
        assert fleet.asked == [("prefill-0", DECODE)]
        assert await counted(app, "tandem_controller_changes_total", tandem_outcome="done", tandem_role="decode") == 1

        async def need() -> float:
            return await counted(app, "tandem_controller_need", tandem_role="decode")

        await assert_eventually(need, lambda value: value > 1, within_s=WITHIN_S, what="the need for decode workers")
        assert await counted(app, "tandem_controller_leader") == 1


async def test_a_dry_run_asks_for_nothing(fleet: ScriptedFleet) -> None:
    async with controller(fleet, dry_run=True) as app:
        await wait_for(app, "dry_run")
    assert not fleet.asked


async def test_a_worker_that_refuses_is_passed_over(fleet: ScriptedFleet) -> None:
    fleet.refusing = {"prefill-0"}
    async with controller(fleet) as app:
        await wait_for(app, "last_worker")
        assert fleet.asked == [("prefill-0", DECODE), ("prefill-1", DECODE)]
        assert await counted(app, "tandem_controller_changes_total", tandem_outcome="refused") == 1


async def test_a_frontend_without_figures_keeps_the_roles(fleet: ScriptedFleet) -> None:
    fleet.figures_are_sent = False
    async with controller(fleet) as app:
        # The first ones are because the window is too short.
        await wait_for(app, "no_figures", 25)
        assert await counted(app, "tandem_controller_decisions_total", tandem_reason="change") == 0
    assert not fleet.asked


def test_election_names_of_different_models_differ_and_are_valid() -> None:
    models = ["org/m", "org-m", "org m", "n" * 200, "n" * 199 + "o", ""]
    names = {election_of(model) for model in models}
    assert len(names) == len(models)
    assert all(re.fullmatch("[A-Za-z0-9._-]{1,128}", name) for name in names)


async def test_one_of_two_acts_and_the_other_one_follows_at_once(fleet: ScriptedFleet) -> None:
    async with controller(fleet) as first, controller(fleet, model="tiny", dry_run=True) as second:
        apps = [first, second]

        async def leaders() -> list[float]:
            return [await counted(app, "tandem_controller_leader") for app in apps]

        before = await assert_eventually(leaders, lambda found: sum(found) == 1, within_s=WITHIN_S, what="a leader")
        leader, other = (apps[before.index(value)] for value in (1.0, 0.0))
        assert await leader.drain()

        async def leads() -> float:
            return await counted(other, "tandem_controller_leader")

        await assert_eventually(leads, lambda value: value == 1, within_s=WITHIN_S, what="the other one leads")
        present = await fleet.registry._backend.leader(election_of("tiny"))
        assert present is not None
        assert present.leader_id == other._leadership.candidate_id
