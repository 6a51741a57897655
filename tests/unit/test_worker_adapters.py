"""A worker's loads and unloads of adapters against each other, and against callers that leave."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any, cast

import pytest

from tandem.clock import ManualClock
from tandem.discovery import LeaseTime
from tandem.domain.adapter import Adapter
from tandem.domain.worker import Worker
from tandem.engine.settings import AdapterPlaces, AdapterSettings
from tandem.errors import AdapterRefused
from tandem.testing.adapters import MODULES, write_adapter
from tandem.worker.adapters import Adapters, check_files
from tandem.worker.identity import Identity
from tests.unit.support.registry_workers import make_worker


class Engine:
    """An engine that loads when the test lets it."""

    def __init__(self) -> None:
        self.adapters: list[Adapter] = []
        self.loading = asyncio.Event()
        self.may_load = asyncio.Event()
        self.may_load.set()

    async def load_adapter(self, adapter: Adapter, path: Path) -> None:
        self.loading.set()
        await self.may_load.wait()
        assert adapter not in self.adapters
        self.adapters.append(adapter)

    async def unload_adapter(self, adapter: Adapter) -> None:
        self.adapters.remove(adapter)


class Lease:
    """A registration that confirms everything, unless the test says otherwise."""

    ttl_s = 5.0
    lease_time: LeaseTime | None = None

    def __init__(self) -> None:
        self.confirms = True
        self.asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    def renew(self, epoch: int) -> None:
        raise AssertionError("no pause")

    def replace(self, member: Worker) -> None:
        pass

    async def set_adapters(self, adapters: tuple[Adapter, ...], timeout_s: float) -> bool:
        if not self.may_answer.is_set():
            self.asked.set()
            await self.may_answer.wait()
        return self.confirms


class OpenLegs:
    """Legs that are open until the test ends them."""

    def __init__(self) -> None:
        self.waited = asyncio.Event()
        self.ended = asyncio.Event()
        self.ended.set()

    async def wait_none_of(self, adapter: Adapter) -> None:
        self.waited.set()
        await self.ended.wait()


class Scene:
    """The adapters of a worker, and two directories `one` and `two`, with a weight each."""

    def __init__(self, root: Path) -> None:
        self.engine, self.legs = Engine(), OpenLegs()
        self.lease = Lease()
        self.identity = Identity(make_worker(), self.lease, clock=ManualClock(1.0))
        model = root / "model"
        model.mkdir()
        for seed, name in enumerate(("one", "two")):
            write_adapter(root / name, model, seed)
        self.root = root
        self.places = AdapterPlaces(model, AdapterSettings(rank_max=8, per_batch_max=2, modules=MODULES), root)
        self.adapters = Adapters(cast("Any", self.engine), self.identity, cast("Any", self.legs), self.places)


@pytest.fixture
async def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


async def test_adapters_a_load_whose_caller_has_left_goes_on_and_is_known(scene: Scene) -> None:
    scene.engine.may_load.clear()
    loading = asyncio.create_task(scene.adapters.load("story", "one"))
    await scene.engine.loading.wait()
    loading.cancel()
    await asyncio.wait({loading})
    assert loading.cancelled()
    scene.engine.may_load.set()
    adapter, was_loaded = await scene.adapters.load("story", "one")
    assert was_loaded
    assert scene.engine.adapters == [adapter]
    other, was_loaded = await scene.adapters.load("story", "two")
    assert not was_loaded
    assert scene.engine.adapters == [other], "what was loaded and never served is replaced"


async def test_adapters_a_load_under_a_name_that_is_being_unloaded_is_refused(scene: Scene) -> None:
    first, _ = await scene.adapters.load("story", "one")
    await scene.adapters.serve("story", serve=True)
    scene.legs.ended.clear()
    unloading = asyncio.create_task(scene.adapters.unload("story"))
    await scene.legs.waited.wait()
    with pytest.raises(AdapterRefused, match="the former one of that name is still being unloaded"):
        await scene.adapters.load("story", "two")
    assert scene.engine.adapters == [first], "its legs are open"
    await scene.adapters.load("other", "two")
    scene.legs.ended.set()
    assert await unloading
    second, was_loaded = await scene.adapters.load("story", "two")
    assert not was_loaded
    assert scene.engine.adapters[1:] == [second]


async def test_check_files_that_are_gone_or_have_other_weights_are_refused(scene: Scene) -> None:
    path = scene.root / "one"
    adapter, _ = await scene.adapters.load("story", "one")
    await check_files(scene.places, adapter, path)
    write_adapter(path, scene.places.model, 7)
    with pytest.raises(AdapterRefused, match="adapter story cannot be loaded again: its files are not those any more"):
        await check_files(scene.places, adapter, path)
    shutil.rmtree(path)
    with pytest.raises(AdapterRefused, match="adapter story cannot be loaded again: it has no adapter_config"):
        await check_files(scene.places, adapter, path)


async def test_adapters_that_a_role_change_dropped_are_not_served_again_by_a_step_that_failed(scene: Scene) -> None:
    lost, _ = await scene.adapters.load("lost", "one")
    kept, _ = await scene.adapters.load("kept", "two")
    for name in ("lost", "kept"):
        await scene.adapters.serve(name, serve=True)
    await scene.adapters.load("late", "two")
    scene.lease.confirms = False
    scene.lease.may_answer.clear()
    serving = asyncio.create_task(scene.adapters.serve("late", serve=True))
    await scene.lease.asked.wait()
    scene.adapters.forget_all_but({kept})
    assert scene.identity.become(make_worker(), {kept}).adapters == (kept,)
    scene.lease.may_answer.set()
    with pytest.raises(AdapterRefused, match="no registry of this release has confirmed it"):
        await serving
    assert scene.identity.current().adapters == (kept,)
    with pytest.raises(AdapterRefused, match="it is not loaded"):
        await scene.adapters.serve("lost", serve=True)
    assert not await scene.adapters.unload("lost")
    assert not scene.adapters.serves(lost)


async def test_adapters_an_unload_during_which_a_role_change_drops_the_adapter_ends_well(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    await scene.adapters.load("story", "one")

    async def dropped(adapter: Adapter) -> None:
        scene.adapters.forget_all_but(())

    monkeypatch.setattr(scene.engine, "unload_adapter", dropped)
    assert await scene.adapters.unload("story")
