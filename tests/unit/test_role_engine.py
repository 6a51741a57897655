"""Which engine a worker has after each way a role change can go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from tandem.domain.adapter import Adapter
from tandem.domain.worker import WorkerRole
from tandem.engine.port import Engine
from tandem.engine.role_engine import RoleEngine
from tandem.errors import AdapterRefused, ConfigError, EngineFailed, NotSupported, RoleChangeRefused, StartError

PREFILL, DECODE, AGGREGATED = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.AGGREGATED


class ScriptedEngine:
    """An engine whose switch and start each test sets."""

    def __init__(self, made_for: WorkerRole) -> None:
        self.made_for = made_for
        self.role = made_for
        self.is_running = False
        self.start_error: StartError | None = None
        self.switch_error: Exception | None = None
        self.died = asyncio.Event()
        self.on_stop: Callable[[], None] = lambda: None
        self.adapters: dict[Adapter, Path] = {}
        self.refused: set[Adapter] = set()
        self.loading = asyncio.Event()
        self.may_load = asyncio.Event()
        self.may_load.set()

    async def load_adapter(self, adapter: Adapter, path: Path) -> None:
        assert self.is_running
        self.loading.set()
        await self.may_load.wait()
        if adapter in self.refused:
            raise AdapterRefused(f"no room for {adapter.name}", adapter=adapter.name)
        self.adapters[adapter] = path

    async def unload_adapter(self, adapter: Adapter) -> None:
        del self.adapters[adapter]

    async def start(self) -> None:
        if self.start_error is not None:
            raise self.start_error
        self.is_running = True

    async def stop(self) -> None:
        self.is_running = False
        self.died.set()
        self.on_stop()

    async def switch_role(self, role: WorkerRole) -> None:
        if self.switch_error is not None:
            raise self.switch_error
        self.role = role

    async def wait_failed(self) -> str:
        await self.died.wait()
        return f"the {self.made_for.value} engine died"


class Scene:
    """A running engine in the prefill role, and all that were made."""

    def __init__(self) -> None:
        self.made: list[ScriptedEngine] = []
        self.start_errors: dict[WorkerRole, StartError] = {}
        self.holding: set[WorkerRole] = set()
        """Roles whose engines wait in each load until the test lets them go on."""
        self.refused: set[Adapter] = set()
        self.bad_files: set[Adapter] = set()
        self.engine = RoleEngine(self._make, PREFILL, self._check_files)

    async def _check_files(self, adapter: Adapter, path: Path) -> None:
        if adapter in self.bad_files:
            raise AdapterRefused(f"adapter {adapter.name} cannot be loaded again", adapter=adapter.name)

    def _make(self, role: WorkerRole) -> Engine:
        engine = ScriptedEngine(role)
        engine.start_error = self.start_errors.get(role)
        engine.refused = self.refused
        if role in self.holding:
            engine.may_load.clear()
        self.made.append(engine)
        return cast("Engine", engine)

    @property
    def running(self) -> list[ScriptedEngine]:
        return [engine for engine in self.made if engine.is_running]


@pytest.fixture
async def scene() -> Scene:
    scene = Scene()
    await scene.engine.start()
    return scene


async def test_an_engine_that_can_switch_stays(scene: Scene) -> None:
    assert await scene.engine.change_role(DECODE)
    assert scene.running == scene.made
    assert scene.made[0].role is DECODE


@pytest.mark.parametrize("error", [NotSupported("not in place"), EngineFailed("half way")])
async def test_an_engine_that_cannot_switch_is_replaced(scene: Scene, error: Exception) -> None:
    scene.made[0].switch_error = error
    assert not await scene.engine.change_role(AGGREGATED)
    assert [engine.made_for for engine in scene.running] == [AGGREGATED]


async def test_another_engine_has_the_adapters_of_the_former_one(scene: Scene) -> None:
    kept, gone = Adapter("kept", "1" * 64), Adapter("gone", "2" * 64)
    for adapter in (kept, gone):
        await scene.engine.load_adapter(adapter, Path(adapter.name))
    await scene.engine.unload_adapter(gone)
    assert not await scene.engine.change_role(DECODE, may_switch=False)
    assert [engine.adapters for engine in scene.running] == [{kept: Path("kept")}]


async def test_adapters_that_change_during_a_role_change_are_in_the_new_engine_as_wanted(scene: Scene) -> None:
    gone, kept, late = (Adapter(name, digit * 64) for name, digit in (("gone", "1"), ("kept", "2"), ("late", "3")))
    for adapter in (gone, kept):
        await scene.engine.load_adapter(adapter, Path(adapter.name))
    scene.holding.add(DECODE)
    changing = asyncio.create_task(scene.engine.change_role(DECODE, may_switch=False))
    await asyncio.sleep(0)
    decode = scene.made[1]
    await decode.loading.wait()
    others = [
        asyncio.create_task(scene.engine.unload_adapter(gone)),
        asyncio.create_task(scene.engine.load_adapter(late, Path("late"))),
    ]
    for _ in range(5):
        await asyncio.sleep(0)
    decode.may_load.set()
    assert not await changing
    await asyncio.gather(*others)
    assert decode.adapters == {kept: Path("kept"), late: Path("late")}
    assert not await scene.engine.change_role(PREFILL, may_switch=False)
    assert scene.running[0].adapters == decode.adapters


async def test_without_an_engine_adapters_are_not_loaded_and_can_be_unloaded(scene: Scene) -> None:
    adapter = Adapter("story", "1" * 64)
    await scene.engine.load_adapter(adapter, Path("story"))
    scene.start_errors[DECODE] = StartError("no memory")
    with pytest.raises(StartError, match="no memory"):
        await scene.engine.change_role(DECODE, may_switch=False)
    with pytest.raises(EngineFailed, match="adapter other is not loaded: a role change has left no engine"):
        await scene.engine.load_adapter(Adapter("other", "2" * 64), Path("other"))
    await scene.engine.unload_adapter(adapter)
    assert not await scene.engine.change_role(PREFILL)
    assert scene.running[0].adapters == {}


async def test_an_adapter_whose_files_changed_refuses_the_change_before_the_engine_stops(scene: Scene) -> None:
    adapter = Adapter("story", "1" * 64)
    await scene.engine.load_adapter(adapter, Path("story"))
    scene.bad_files.add(adapter)
    scene.made[0].switch_error = NotSupported("not in place")
    with pytest.raises(RoleChangeRefused, match="adapter story cannot be loaded again"):
        await scene.engine.change_role(DECODE)
    assert scene.running == scene.made[:1]
    assert scene.made[0].adapters == {adapter: Path("story")}
    scene.made[0].switch_error = None
    assert await scene.engine.change_role(DECODE), "a change in place reads no files"


async def test_files_that_change_while_the_new_engine_starts_are_not_loaded(scene: Scene) -> None:
    adapter = Adapter("story", "1" * 64)
    await scene.engine.load_adapter(adapter, Path("story"))
    scene.made[0].switch_error = NotSupported("not in place")
    scene.made[0].on_stop = lambda: scene.bad_files.add(adapter)
    with pytest.raises(AdapterRefused, match="adapter story cannot be loaded again"):
        await scene.engine.change_role(DECODE)
    assert scene.made[-1].adapters == {}


async def test_in_the_former_role_an_adapter_that_does_not_load_is_dropped_and_the_others_stay(scene: Scene) -> None:
    kept, changed, refused = (Adapter(name, "1" * 64) for name in ("kept", "changed", "refused"))
    for adapter in (kept, changed, refused):
        await scene.engine.load_adapter(adapter, Path(adapter.name))
    scene.made[0].switch_error = NotSupported("not in place")
    scene.refused.add(refused)
    with pytest.raises(AdapterRefused, match="no room for refused"):
        await scene.engine.change_role(DECODE)
    scene.bad_files.add(changed)
    assert not await scene.engine.change_role(PREFILL, may_switch=False)
    assert [engine.adapters for engine in scene.running] == [{kept: Path("kept")}]
    assert scene.engine.adapters() == {kept}


async def test_an_engine_that_must_not_stay_is_replaced(scene: Scene) -> None:
    assert not await scene.engine.change_role(DECODE, may_switch=False)
    assert [(engine.made_for, engine.role) for engine in scene.running] == [(DECODE, DECODE)]


async def test_after_a_start_that_failed_another_engine_is_started_without_asking_the_dead_one(scene: Scene) -> None:
    scene.made[0].switch_error = NotSupported("not in place")
    scene.start_errors[AGGREGATED] = StartError("no memory")
    with pytest.raises(StartError, match="no memory"):
        await scene.engine.change_role(AGGREGATED)
    assert not scene.running
    failing = asyncio.create_task(scene.engine.wait_failed())
    await asyncio.sleep(0)
    assert not failing.done(), "there is no engine that could fail"
    assert not await scene.engine.change_role(PREFILL)
    assert [engine.made_for for engine in scene.running] == [PREFILL]
    scene.running[0].died.set()
    assert await asyncio.wait_for(failing, 5) == "the prefill engine died"


async def test_the_end_of_a_replaced_engine_is_no_failure_and_the_death_of_the_new_one_is(scene: Scene) -> None:
    failing = asyncio.create_task(scene.engine.wait_failed())
    scene.made[0].switch_error = NotSupported("not in place")
    await scene.engine.change_role(DECODE)
    assert scene.made[0].died.is_set()
    await asyncio.sleep(0)
    assert not failing.done()
    scene.made[1].died.set()
    assert await asyncio.wait_for(failing, 5) == "the decode engine died"


async def test_settings_that_exclude_a_role_are_a_sentence() -> None:
    def make(role: WorkerRole) -> Engine:
        if role is AGGREGATED:
            raise ConfigError("transfer_backend", "must not be fake")
        return cast("Engine", ScriptedEngine(role))

    engine = RoleEngine(make, PREFILL)
    assert engine.problem_of(AGGREGATED) == "transfer_backend: must not be fake"
    assert engine.problem_of(DECODE) is None
