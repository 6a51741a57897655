"""A frontend and its registry: its own entry there, and the view that it takes from it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tandem_frontend.app import FrontendApp
from tandem_frontend.config import FrontendConfig

from tandem.client import calls
from tandem.domain.worker import EngineLoad
from tandem.errors import InvalidRequest, ServiceError
from tandem.testing.eventually import assert_eventually
from tests.wire.support.registry_host import make_worker
from tests.wire.support.scripted_registry import ScriptedRegistry, play_registry

MODEL = Path(__file__).parents[2] / "models" / "tandem-demo"


async def test_one_without_a_name_is_called_after_its_address() -> None:
    registry = ScriptedRegistry()
    async with play_registry(registry):
        app = FrontendApp(FrontendConfig(registry=(registry.address,), model=MODEL))
        try:
            await app.start()
            await assert_eventually(lambda: registry.registered)
            assert registry.registered[0][1] == f"frontend-{app.address.replace(':', '-')}"
        finally:
            await app.stop()


async def test_a_view_is_taken_by_whatever_is_asked_for_each_request() -> None:
    """When it comes, not when the next request does."""
    registry = ScriptedRegistry()
    registry.workers = (make_worker(model="tandem-demo"),)
    async with play_registry(registry):
        app = FrontendApp(FrontendConfig(registry=(registry.address,), model=MODEL))
        try:
            await app.start()
            assert app._watch is not None
            assert app._routes is not None
            (worker,) = view = app._watch.workers()
            assert app._routes._view is view
            most = worker.capabilities.context_tokens_max
            assert app._capacity.counted(10 * most, 0) == most
            full = EngineLoad(running_requests=100, kv_used_tokens=0)
            assert app._capacity.fits(6, 0, 1)
            app._note_load(worker.start, full)
            assert not app._capacity.fits(6, 0, 1)
        finally:
            await app.stop()


async def test_it_serves_before_and_without_being_registered() -> None:
    registry = ScriptedRegistry()
    errors = iter([ServiceError("not now"), InvalidRequest("frontend.address", "is no address")])
    registry.register_error = lambda member_id, epoch: next(errors, ServiceError("not now"))
    async with play_registry(registry):
        app = FrontendApp(FrontendConfig(registry=(registry.address,), model=MODEL, drain_settle_s=0))
        try:
            async with asyncio.timeout(10):
                await app.start()
            assert await calls.is_serving(app.address)
            await assert_eventually(lambda: len(registry.registered) >= 2)
            assert await calls.is_serving(app.address)
            async with asyncio.timeout(1):
                assert await app.drain()
        finally:
            await app.stop()
