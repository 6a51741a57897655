"""ChangeRole of a worker over a socket: its progress, what is refused, and what a failed change leaves behind."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from tandem.api.prefill.v2 import prefill_service_pb2
from tandem.api.prefill.v2.prefill_service_pb2_grpc import PrefillServiceStub
from tandem.api.types.v1 import leg_pb2, role_change_pb2, sampling_pb2, worker_pb2
from tandem.api.types.v2 import leg_pb2 as leg2_pb2
from tandem.api.worker.v1 import worker_service_pb2 as pb
from tandem.api.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from tandem.client import calls
from tandem.client.step_calls import StepCall
from tandem.domain.adapter import Adapter
from tandem.domain.worker import Worker, WorkerRole
from tandem.engine.simulated.engine import SimulatedEngine
from tandem.errors import (
    AdapterRefused,
    Draining,
    EngineFailed,
    InvalidRequest,
    NotSupported,
    RoleChangeRefused,
    ServiceError,
    StaleEpoch,
    StartError,
    WrongRole,
)
from tandem.rpc.channels import open_channel
from tandem.rpc.convert import ROLES
from tandem.rpc.status import from_rpc_error, from_status
from tandem.testing.adapters import write_adapter
from tandem.testing.direct_legs import direct_legs
from tandem.testing.eventually import assert_eventually
from tandem.worker.app import WorkerHost
from tests.wire.support.scripted_registry import ScriptedRegistry, play_registry
from tests.wire.test_worker_readiness import MODEL, settings

PREFILL, DECODE, AGGREGATED = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.AGGREGATED


class Scene:
    """A worker at a registry, and calls to it."""

    def __init__(self, host: WorkerHost, registry: ScriptedRegistry, channel: grpc.aio.Channel) -> None:
        self.host = host
        self.registry = registry
        self.stub: Any = WorkerServiceStub(channel)
        self.channel = channel

    async def worker(self) -> Worker:
        return await calls.worker_at(self.host.address)

    async def change(
        self, role: WorkerRole | None, epoch: int | None = None, drain_timeout_s: int | None = None
    ) -> list[role_change_pb2.RoleChange]:
        """All steps of a change."""
        request = pb.ChangeRoleRequest(worker_epoch=epoch or (await self.worker()).epoch)
        if role is not None:
            request.role = ROLES[role]
        if drain_timeout_s is not None:
            request.drain_timeout.seconds = drain_timeout_s
        try:
            return [response.change async for response in self.stub.ChangeRole(request)]
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None

    async def roles(self) -> list[worker_pb2.WorkerRole.ValueType]:
        response = await self.stub.GetCapabilities(pb.GetCapabilitiesRequest())
        return list(response.roles)


@asynccontextmanager
async def serving(role: WorkerRole, **more: object) -> AsyncIterator[Scene]:
    registry = ScriptedRegistry()
    async with play_registry(registry):
        config = settings(registry, 0, **more)
        async with WorkerHost.open(config, role) as host, open_channel(host.address) as channel:
            yield Scene(host, registry, channel)


def leg_of(worker: Worker, **bootstrap: Any) -> leg_pb2.LegRequest:
    request = leg_pb2.LegRequest(
        request_id="r", model=MODEL.name, token_ids=[10, 11, 12], attempt=1, worker_epoch=worker.epoch,
        sampling=sampling_pb2.Sampling(temperature=0.0),
        stopping=sampling_pb2.Stopping(max_tokens=1_000, ignore_eos=True),
    )  # fmt: skip
    if bootstrap:
        request.bootstrap.CopyFrom(leg_pb2.Bootstrap(**bootstrap))
    return request


async def test_a_change_reports_its_stages_and_registers_the_worker_anew() -> None:
    async with serving(DECODE) as scene:
        before = await scene.worker()
        assert await scene.roles() == list(ROLES.values())
        steps = await scene.change(PREFILL)
        assert [step.stage for step in steps] == sorted(role_change_pb2.RoleChangeStage.values())[1:]
        done = steps[-1]
        worker = await scene.worker()
        assert (worker.role, worker.worker_id, worker.address) == (PREFILL, before.worker_id, before.address)
        assert worker.epoch == done.worker.epoch > before.epoch
        assert worker.bootstrap_port == scene.host._engine.bootstrap_address().port  # type: ignore[union-attr]
        assert done.in_place
        assert [epoch for _, _, epoch in scene.registry.registered] == [before.epoch, worker.epoch]
        assert await calls.is_serving(scene.host.address)


async def test_legs_are_those_of_the_present_role_and_streams_those_of_the_epoch() -> None:
    async with serving(AGGREGATED) as scene:
        stub: Any = PrefillServiceStub(scene.channel)
        worker = await scene.worker()
        stream = StepCall(scene.channel, worker, "frontend-0")
        stream_id = (await stream.read()).stream_id
        start = leg2_pb2.LegStart(leg=9, request=leg_of(worker, host="h", port=1, room=7))
        response = await stub.StartLegs(prefill_service_pb2.StartLegsRequest(stream_id=stream_id, legs=[start]))
        refused = from_status(response.results[0].refused)
        assert isinstance(refused, WrongRole)
        assert refused.metadata == {"worker": worker.worker_id, "role": "aggregated"}
        await scene.change(PREFILL)
        with pytest.raises(ServiceError, match="was closed by the worker"):
            await stream.read()


async def test_legs_that_do_not_end_in_time_are_cut() -> None:
    slow = {"engine_extra": {"decode_step_s": 0.05}}
    async with serving(AGGREGATED, **slow) as scene, direct_legs(scene.host.address) as legs:
        leg = await legs.start(leg_of(legs.worker))
        await assert_eventually(lambda: leg.token_ids)
        steps = await scene.change(DECODE, drain_timeout_s=0)
        assert steps[0].open_legs == 1
        assert steps[-1].worker.role == worker_pb2.WORKER_ROLE_DECODE
        assert (await calls.worker_load(scene.host.address)).open_legs == 0


@pytest.mark.parametrize(
    ("role", "more", "error", "sentence"),
    [
        (DECODE, {}, RoleChangeRefused, "cannot change from role decode to decode: it has that role"),
        (AGGREGATED, {"roles": "prefill"}, RoleChangeRefused, "its setting roles allows only prefill, decode"),
        (None, {}, InvalidRequest, "role: must be PREFILL, DECODE or AGGREGATED"),
    ],
    ids=["same", "not-allowed", "absent"],
)
async def test_a_role_that_the_worker_cannot_take_is_refused_by_name_and_nothing_changes(
    role: WorkerRole | None, more: dict[str, object], error: type[Exception], sentence: str
) -> None:
    async with serving(DECODE, **more) as scene:
        before = await scene.worker()
        with pytest.raises(error, match=sentence):
            await scene.change(role)
        assert await scene.worker() == before
        assert len(scene.registry.registered) == 1
        assert await calls.is_serving(scene.host.address)


async def test_a_worker_that_may_take_no_other_role_says_so() -> None:
    async with serving(DECODE, roles="decode") as scene:
        assert await scene.roles() == [worker_pb2.WORKER_ROLE_DECODE]


async def test_a_call_to_a_former_epoch_changes_nothing() -> None:
    async with serving(DECODE) as scene:
        before = await scene.worker()
        with pytest.raises(StaleEpoch):
            await scene.change(PREFILL, before.epoch - 1)
        assert await scene.worker() == before


async def test_a_worker_without_a_lease_changes_no_role() -> None:
    async with serving(DECODE) as scene:
        scene.registry.register_error = lambda member_id, epoch: ServiceError("gone")
        scene.registry.leases.clear()
        await scene.registry.stop()
        await assert_eventually(lambda: not scene.host._registration.registered, within_s=10)
        before = await scene.worker()
        with pytest.raises(RoleChangeRefused, match="no registry has confirmed its lease"):
            await scene.change(PREFILL)
        assert await scene.worker() == before


async def test_a_drain_ends_a_change_and_no_other_one_begins() -> None:
    slow = {"engine_extra": {"decode_step_s": 0.05}, "drain_timeout_s": 0.2}
    async with serving(AGGREGATED, **slow) as scene, direct_legs(scene.host.address) as legs:
        leg = await legs.start(leg_of(legs.worker))
        await assert_eventually(lambda: leg.token_ids)
        request = pb.ChangeRoleRequest(worker_epoch=legs.worker.epoch, role=worker_pb2.WORKER_ROLE_DECODE)
        request.drain_timeout.seconds = 60
        steps = aiter(scene.stub.ChangeRole(request))
        assert (await anext(steps)).change.stage == role_change_pb2.ROLE_CHANGE_STAGE_DRAINING
        draining = asyncio.create_task(scene.host.drain())
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            _ = [step async for step in steps]
        assert isinstance(from_rpc_error(ended.value), Draining)
        with pytest.raises(Draining, match="is leaving and changes no role"):
            await scene.change(DECODE, legs.worker.epoch)
        assert await draining


async def test_a_worker_whose_new_role_does_not_start_takes_its_former_one_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = occupied.getsockname()[1]
        async with serving(AGGREGATED, bootstrap_port=port) as scene:
            before = await scene.worker()
            with pytest.raises(EngineFailed, match=f"has its role aggregated again.*cannot listen on 127.0.0.1:{port}"):
                await scene.change(PREFILL)
            worker = await scene.worker()
            assert worker.role is AGGREGATED
            assert worker.epoch > before.epoch
            assert await calls.is_serving(scene.host.address)
            async with direct_legs(scene.host.address) as legs:
                leg = await legs.start(leg_of(legs.worker))
                await assert_eventually(lambda: leg.token_ids)


async def not_in_place(engine: SimulatedEngine, role: WorkerRole) -> None:
    raise NotSupported("not in place")


async def test_a_worker_whose_adapter_files_changed_keeps_engine_role_and_adapter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write_adapter(tmp_path / "story", MODEL, 1)
    monkeypatch.setattr(SimulatedEngine, "switch_role", not_in_place)
    async with serving(AGGREGATED, adapters={"story": path}) as scene:
        before, engine = await scene.worker(), scene.host._engine._engine
        write_adapter(path, MODEL, 2)
        with pytest.raises(EngineFailed, match=r"has its role aggregated again.*its files are not those any more"):
            await scene.change(PREFILL)
        worker = await scene.worker()
        assert (worker.role, worker.adapters) == (AGGREGATED, before.adapters)
        assert worker.epoch > before.epoch
        assert scene.host._engine._engine is engine, "it has the weights of the digest that is served"
        assert await calls.is_serving(scene.host.address)
        write_adapter(path, MODEL, 1)
        assert not (await scene.change(PREFILL))[-1].in_place
        assert (await scene.worker()).adapters == before.adapters


async def test_a_worker_goes_on_in_its_former_role_without_an_adapter_that_does_not_load_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    paths = {name: write_adapter(tmp_path / name, MODEL, seed) for seed, name in enumerate(("kept", "lost"))}
    monkeypatch.setattr(SimulatedEngine, "switch_role", not_in_place)
    async with serving(AGGREGATED, adapters=paths, adapter_root=tmp_path) as scene:
        load = SimulatedEngine.load_adapter

        async def refuse(engine: SimulatedEngine, adapter: Adapter, path: Path) -> None:
            if adapter.name == "lost":
                raise AdapterRefused("no memory for adapter lost", adapter="lost")
            await load(engine, adapter, path)

        monkeypatch.setattr(SimulatedEngine, "load_adapter", refuse)
        with pytest.raises(EngineFailed, match=r"has its role aggregated again.*no memory for adapter lost"):
            await scene.change(PREFILL)
        worker = await scene.worker()
        assert (worker.role, [adapter.name for adapter in worker.adapters]) == (AGGREGATED, ["kept"])
        assert await calls.is_serving(scene.host.address)
        monkeypatch.setattr(SimulatedEngine, "load_adapter", load)
        _, was_loaded = await scene.host._adapters.load("lost", "lost")
        assert not was_loaded, "the worker knows that its engine has lost it"


async def test_a_worker_with_an_engine_in_neither_role_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(AGGREGATED) as scene:
        finished = asyncio.create_task(scene.host.wait_finished())

        async def fail(engine: SimulatedEngine) -> None:
            raise StartError("no memory is left")

        monkeypatch.setattr(SimulatedEngine, "start", fail)
        with pytest.raises(EngineFailed, match="the worker exits: no memory is left"):
            await scene.change(PREFILL)
        reason = await asyncio.wait_for(finished, 5)
        assert reason is not None
        assert "no engine starts in the former role aggregated: no memory is left" in reason
        assert not await calls.is_serving(scene.host.address)
