"""A worker's health and its place in the registry: SERVING once it is registered, and until it leaves."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from tandem.api.types.v1 import leg_pb2, sampling_pb2
from tandem.client import calls
from tandem.domain.worker import WorkerRole
from tandem.errors import ServiceError
from tandem.rpc.process_servicer import SERVICE_NAME as PROCESS_SERVICE_NAME
from tandem.testing.direct_legs import direct_legs
from tandem.testing.eventually import assert_eventually
from tandem.worker.app import WorkerHost
from tandem.worker.config import WorkerConfig
from tests.faults.support.process_faults import free_port
from tests.wire.support.scripted_registry import ScriptedRegistry, play_registry

MODEL = Path(__file__).parents[2] / "models" / "tandem-demo"


def settings(registry: ScriptedRegistry, port: int, **more: object) -> WorkerConfig:
    fixed = {"registry": (registry.address,), "model": MODEL, "engine": "simulated", "port": port}
    return WorkerConfig.model_validate({**fixed, "drain_settle_s": 0, **more})


async def test_a_worker_is_serving_once_a_registry_has_taken_it() -> None:
    registry, port = ScriptedRegistry(), free_port()
    registry.may_answer.clear()
    address = f"127.0.0.1:{port}"
    async with play_registry(registry), AsyncExitStack() as stack:
        config = settings(registry, port)
        opening = WorkerHost.open(config, WorkerRole.DECODE)
        starting = asyncio.create_task(stack.enter_async_context(opening))
        await assert_eventually(lambda: registry.registered, within_s=20)
        # The engine has generated, and no registry lists it: a restart of one worker after another must wait.
        assert not await calls.is_serving(address)
        assert await calls.is_serving(address, PROCESS_SERVICE_NAME)
        registry.may_answer.set()
        worker = await starting
        assert await calls.is_serving(address)

        # Frontends keep it in their last view, so a registry that goes changes nothing.
        registry.register_error = lambda member_id, epoch: ServiceError("gone")
        registry.leases.clear()
        await registry.stop()
        await assert_eventually(lambda: not worker._registration.registered, within_s=10)
        assert await calls.is_serving(address)

        assert await worker.drain()
        assert not await calls.is_serving(address)
        assert not await calls.is_serving(address, PROCESS_SERVICE_NAME)


async def test_a_drain_that_cuts_legs_is_clean_because_their_streams_continue_elsewhere() -> None:
    registry = ScriptedRegistry()
    slow = {"engine_extra": {"decode_step_s": 0.05}, "drain_timeout_s": 0.2}
    async with play_registry(registry):
        config = settings(registry, 0, **slow)
        async with AsyncExitStack() as stack:
            worker = await stack.enter_async_context(WorkerHost.open(config, WorkerRole.AGGREGATED))
            legs = await stack.enter_async_context(direct_legs(worker.address))
            leg = await legs.start(
                leg_pb2.LegRequest(
                    request_id="r", model=MODEL.name, token_ids=[10, 11, 12], attempt=1,
                    worker_epoch=legs.worker.epoch, sampling=sampling_pb2.Sampling(temperature=0.0),
                    stopping=sampling_pb2.Stopping(max_tokens=1_000, ignore_eos=True),
                )
            )  # fmt: skip
            await assert_eventually(lambda: leg.token_ids)
            assert await worker.drain()
            assert not leg.is_over, "it was cut by nothing but the drain's end"
            assert not registry.leases, "it has left the registry"
