"""A frontend and its registry: its own entry there, and the view that it takes from it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tandem_frontend.admission.capacity import Capacity
from tandem_frontend.app import FrontendApp
from tandem_frontend.config import FrontendConfig
from tandem_frontend.servicer import SERVICE_NAME as INFERENCE_SERVICE_NAME

from tandem.client import calls
from tandem.domain.worker import EngineLoad
from tandem.errors import InvalidRequest, ServiceError, StartError
from tandem.rpc.process_servicer import SERVICE_NAME as PROCESS_SERVICE_NAME
from tandem.testing.eventually import assert_eventually
from tests.wire.support.registry_host import make_worker
from tests.wire.support.scripted_registry import ScriptedRegistry, play_registry

MODEL = Path(__file__).parents[2] / "models" / "tandem-demo"


def settings(registry: ScriptedRegistry, **more: float) -> FrontendConfig:
    return FrontendConfig.model_validate({"registry": (registry.address,), "model": MODEL, **more})


async def test_one_without_a_name_is_called_after_its_address() -> None:
    registry = ScriptedRegistry()
    async with play_registry(registry), FrontendApp.open(settings(registry)) as app:
        await assert_eventually(lambda: registry.registered)
        assert registry.registered[0][1] == f"frontend-{app.address.replace(':', '-')}"


async def test_a_view_is_taken_by_whatever_is_asked_for_each_request() -> None:
    """When it comes, not when the next request does."""
    registry = ScriptedRegistry()
    registry.workers = (make_worker(model="tandem-demo"),)
    async with play_registry(registry), FrontendApp.open(settings(registry)) as app:
        (worker,) = view = app.fleet.watch.workers()
        (followed,) = app.fleet.models
        assert followed.routes._view == view
        most = worker.capabilities.context_tokens_max
        capacity, *_ = followed._followers
        assert isinstance(capacity, Capacity)
        assert capacity.counted(10 * most, 0) == most
        full = EngineLoad(running_requests=100, kv_used_tokens=0)
        assert capacity.fits(6, 0, 1)
        app.fleet.note_load(worker.start, full)
        assert not capacity.fits(6, 0, 1)


async def test_it_serves_before_and_without_being_registered() -> None:
    registry = ScriptedRegistry()
    registry.workers = (make_worker(model="tandem-demo"),)
    errors = iter([ServiceError("not now"), InvalidRequest("frontend.address", "is no address")])
    registry.register_error = lambda member_id, epoch: next(errors, ServiceError("not now"))
    async with play_registry(registry), contextlib.AsyncExitStack() as stack:
        async with asyncio.timeout(10):
            app = await stack.enter_async_context(FrontendApp.open(settings(registry, drain_settle_s=0)))
        assert await calls.is_serving(app.address)
        await assert_eventually(lambda: len(registry.registered) >= 2)
        assert await calls.is_serving(app.address)
        async with asyncio.timeout(1):
            assert await app.drain()


async def test_it_is_ready_while_it_knows_a_worker_of_its_model() -> None:
    registry = ScriptedRegistry()
    async with play_registry(registry), FrontendApp.open(settings(registry, drain_settle_s=0)) as app:
        ready, works = health_of(app), health_of(app, PROCESS_SERVICE_NAME)
        edge_asks = health_of(app, INFERENCE_SERVICE_NAME)
        assert (await ready(), await edge_asks(), await works()) == (False, False, True)
        assert registry.registered, "edges and tools find it all the same"

        registry.step(0, 1, [make_worker(model="tandem-demo")])
        await assert_eventually(ready, bool)
        assert await edge_asks()
        # The registry is gone, and with it nothing that the frontend knows.
        await registry.stop()
        await assert_eventually(lambda: not app.fleet.watch.state.is_live)
        assert (await ready(), await works()) == (True, True)

        assert await app.drain()
        assert (await ready(), await works()) == (False, False)


async def test_it_is_not_ready_once_a_registry_says_that_no_worker_is_left() -> None:
    """A fleet that has scaled to zero: the process stays, and is ready again with the first worker."""
    registry = ScriptedRegistry()
    worker = make_worker(model="tandem-demo")
    registry.workers = (worker,)
    async with play_registry(registry), FrontendApp.open(settings(registry)) as app:
        ready, works = health_of(app), health_of(app, PROCESS_SERVICE_NAME)
        assert await ready()
        registry.step(0, 1, removed=[worker])
        await assert_eventually(ready, lambda serving: not serving)
        assert await works()
        registry.step(1, 2, [replace(worker, epoch=worker.epoch + 1)])
        await assert_eventually(ready, bool)


def health_of(app: FrontendApp, service: str = "") -> Callable[[], Awaitable[bool]]:
    return lambda: calls.is_serving(app.address, service)


async def test_a_start_that_fails_in_the_middle_frees_the_port() -> None:
    registry = ScriptedRegistry()
    registry.workers = (make_worker(model="tandem-demo"),)
    async with play_registry(registry):
        async with FrontendApp.open(settings(registry)) as app:
            port = int(app.address.rpartition(":")[2])
        # The port of the metrics is in use, which shows after the frontend's own port was bound.
        with pytest.raises(StartError, match=registry.address.rpartition(":")[2]):
            async with FrontendApp.open(
                settings(registry, port=port, metrics_port=int(registry.address.rpartition(":")[2]))
            ):
                pass
        async with FrontendApp.open(settings(registry, port=port)) as app:
            assert await calls.is_serving(app.address)
