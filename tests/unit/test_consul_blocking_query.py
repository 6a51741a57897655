"""Blocking queries to Consul: generations, indexes that go backwards, suddenly empty responses, outages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tandem_registry.backends.consul import blocking_query
from tandem_registry.backends.consul.blocking_query import BlockingQuery
from tandem_registry.backends.consul.client import Generation, HealthResponse
from tandem_registry.backends.consul.snapshot import ConsulSnapshot, Entry

from tandem.clock import monotonic
from tandem.errors import ServiceError
from tandem.testing.eventually import assert_eventually
from tandem.testing.virtual_time import run_virtually
from tests.unit.support.consul_entries import answer_of, make_entry, registry_entry
from tests.unit.support.registry_workers import make_worker


class ScriptedConsul:
    """Consul's side of `ConsulClient`: data at an index, a key, and a switch that cuts the link."""

    def __init__(self) -> None:
        self.index = 10
        self.key: Generation | None = None
        self.entries: list[Entry] = [registry_entry("one"), make_entry(make_worker("a"))]
        self.is_cut = False
        self.consistent_reads = 0
        self.names = iter("ghijklmn")
        """Of generations."""
        self._changed = asyncio.Event()

    def change(self, index: int, *entries: Entry) -> None:
        self.index, self.entries = index, list(entries)
        self._wake()

    def cut(self, *, is_cut: bool = True) -> None:
        self.is_cut = is_cut
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def health(
        self, after: HealthResponse | None = None, wait_s: float = 0.0, *, is_consistent: bool = False
    ) -> HealthResponse:
        self.consistent_reads += is_consistent
        if after is not None and wait_s and after.index == self.index and not self.is_cut:
            await self._changed.wait()
        if self.is_cut:
            raise ServiceError("cut")
        known = None if after is None else after.index
        return HealthResponse(self.index, None if self.index == known else answer_of(self.entries))

    async def generation(self) -> Generation | None:
        if self.is_cut:
            raise ServiceError("cut")
        return self.key

    async def begin_generation(self, registry_id: str, instead_of: Generation | None) -> bool:
        if self.key != instead_of:
            return False
        self.key = Generation(registry_id, (instead_of.modify_index if instead_of else 0) + 1)
        return True


class Reports:
    """What the query reported."""

    def __init__(self) -> None:
        self.views: list[tuple[str, int, int]] = []
        """Registry id, index, number of workers."""
        self.losses = 0

    def observed(self, registry_id: str, observed: ConsulSnapshot) -> None:
        self.views.append((registry_id, observed.index, len(observed.members)))

    def lost(self, problem: ServiceError) -> None:
        self.losses += 1


@asynccontextmanager
async def following(consul: Any, *, explains: bool = False) -> AsyncIterator[Reports]:
    reports = Reports()
    subject = BlockingQuery(
        consul,
        new_id=lambda: next(consul.names),
        on_observed=reports.observed,
        on_lost=reports.lost,
        explains=lambda observed: explains,
        clock=monotonic,
    )
    task = asyncio.create_task(subject.run())
    try:
        await assert_eventually(lambda: reports.views)
        yield reports
    finally:
        task.cancel()
        await asyncio.wait({task})


@pytest.fixture(autouse=True)
def short_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocking_query, "SUSPECT_PAUSE_S", 0.05)


async def test_the_first_one_names_the_generation_and_the_second_one_takes_the_name() -> None:
    consul = ScriptedConsul()
    async with following(consul) as one, following(consul) as two:
        assert one.views == two.views == [("g", 10, 1)]
        consul.change(12, registry_entry("one"), make_entry(make_worker("a")), make_entry(make_worker("b")))
        await assert_eventually(lambda: one.views[-1] == two.views[-1] == ("g", 12, 2))


async def test_an_index_that_goes_backwards_begins_a_generation() -> None:
    consul = ScriptedConsul()
    async with following(consul) as one, following(consul) as two:
        consul.change(4, registry_entry("one"), make_entry(make_worker("a")))
        await assert_eventually(lambda: one.views[-1][1] == two.views[-1][1] == 4)
        began = one.views[0][0]
        await assert_eventually(lambda: one.views[-1] == two.views[-1], what="one name on both")
        assert one.views[-1][0] != began
        assert consul.key is not None
        assert consul.key.registry_id == one.views[-1][0]


async def test_an_index_that_went_backwards_only_at_a_deposed_leader_means_nothing() -> None:
    consul = ScriptedConsul()
    async with following(consul) as reports:
        honest = consul.health

        async def deposed(*args: Any, is_consistent: bool = False, **more: Any) -> HealthResponse:
            answer = await honest(*args, is_consistent=is_consistent, **more)
            return answer if is_consistent else HealthResponse(3, b"[]")

        consul.health = deposed  # type: ignore[method-assign]
        consul.change(11, *consul.entries)
        await assert_eventually(lambda: reports.views[-1][1] == 11)
        assert {(registry_id, workers) for registry_id, _, workers in reports.views} == {("g", 1)}


def test_an_answer_that_is_suddenly_empty_is_asked_for_again() -> None:
    """On virtual time: the members come back within the pause before the second question."""
    run_virtually(check_a_sudden_emptiness())


async def check_a_sudden_emptiness() -> None:
    consul = ScriptedConsul()
    async with following(consul) as reports:
        full, reads = consul.entries, consul.consistent_reads
        consul.change(11, registry_entry("one"))
        await asyncio.sleep(0.01)
        consul.change(12, *full)
        await assert_eventually(lambda: reports.views[-1] == ("g", 12, 1))
        assert all(workers == 1 for _, _, workers in reports.views), "the empty answer reached no watcher"
        assert consul.consistent_reads > reads
        consul.change(13, registry_entry("one"))
        await assert_eventually(lambda: reports.views[-1] == ("g", 13, 0), what="a doubt that was cleared")


async def test_an_empty_answer_that_is_ones_own_doing_needs_no_second_one() -> None:
    consul = ScriptedConsul()
    async with following(consul, explains=True) as reports:
        reads = consul.consistent_reads
        consul.change(11, registry_entry("one"))
        await assert_eventually(lambda: reports.views[-1] == ("g", 11, 0))
        assert consul.consistent_reads == reads


async def test_an_outage_is_reported_and_then_the_next_view() -> None:
    consul = ScriptedConsul()
    async with following(consul) as reports:
        consul.cut()
        await assert_eventually(lambda: reports.losses)
        consul.key = None
        consul.index = 20
        consul.cut(is_cut=False)
        await assert_eventually(lambda: reports.views[-1] == ("h", 20, 1))


async def test_an_answer_that_cannot_be_read_is_an_outage() -> None:
    consul = ScriptedConsul()
    async with following(consul) as reports:
        honest = consul.health

        async def garbled(*args: Any, is_consistent: bool = False, **more: Any) -> HealthResponse:
            answer = await honest(*args, is_consistent=is_consistent, **more)
            return answer if is_consistent else HealthResponse(answer.index, b"<html>")

        consul.health = garbled  # type: ignore[method-assign]
        consul.change(11, *consul.entries)
        await assert_eventually(lambda: reports.losses)
        await assert_eventually(lambda: reports.views[-1] == ("g", 11, 1), what="the answer to the next question")
