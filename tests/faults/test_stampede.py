"""A whole fleet loses its registry, or Consul its memory: every worker is back soon, and not all at the same moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.discovery_fleet import Workers
from tandem.discovery import WorkerWatch
from tandem.domain.worker import Worker
from tests.faults.support.fault_cluster import Plan, fault_cluster
from tests.faults.support.history import now_s
from tests.faults.support.process_faults import kill
from tests.integration.support.consul_host import ConsulHost, consul_servers

pytestmark = [pytest.mark.timeout(90)]

WORKERS = 60
LEASE_S = 5.0
BACK_WITHIN_S = 3 * LEASE_S
MOMENT_S = 0.1
"""What falls into so short a time comes at the same moment."""
MOMENT_SHARE_MAX = 0.5
NOTHING_RUNS: dict[str, Any] = {"prefill": 0, "decode": 0, "frontends": 0}


@asynccontextmanager
async def fleet(registries: str) -> AsyncIterator[Workers]:
    """Registered workers without engines, each at a port that answers health checks."""
    workers = Workers(registries, 0, WORKERS)
    await workers.start()
    try:
        await workers.register()
        yield workers
    finally:
        await workers.close()


def crowding(times_s: list[float]) -> float:
    """Share of those that came in the fullest moment."""
    fullest = max(sum(begin_s <= time_s < begin_s + MOMENT_S for time_s in times_s) for begin_s in times_s)
    return fullest / len(times_s)


def test_crowding_is_that_of_the_fullest_moment() -> None:
    assert crowding([1.0, 1.05, 1.09, 2.0]) == 0.75
    assert crowding([1.0, 2.0, 3.0, 4.0]) == 0.25


async def test_a_fleet_comes_back_to_its_registry_over_a_while(tmp_path: Path) -> None:
    plan = Plan(registries=1, lease_s=LEASE_S, **NOTHING_RUNS)
    async with fault_cluster(tmp_path, plan) as cluster, fleet(cluster.registries[0].address):
        registry = cluster.registries[0]
        await kill(registry)
        await asyncio.sleep(LEASE_S / 2)
        await cluster.restart(registry.name)
        came_s = await arrivals(registry.address)
    assert crowding(came_s) < MOMENT_SHARE_MAX, sorted(round(time_s - min(came_s), 2) for time_s in came_s)


async def arrivals(registry: str) -> list[float]:
    """When each worker is first listed by a registry that has just been started."""
    came_s: dict[str, float] = {}

    def note(workers: tuple[Worker, ...]) -> None:
        for worker in workers:
            came_s.setdefault(worker.worker_id, now_s())

    watch = WorkerWatch([registry], on_change=note)
    await watch.start()
    try:
        await watch.wait_for(lambda workers: len(workers) == WORKERS, BACK_WITHIN_S)
    finally:
        await watch.close()
    return list(came_s.values())


async def test_registries_spread_the_entries_for_an_emptied_consul_over_time(
    consul_binary: Path, tmp_path: Path
) -> None:
    async with (
        consul_servers(consul_binary, tmp_path, 1) as consul,
        fault_cluster(tmp_path, Plan(consul=consul.address, lease_s=LEASE_S, **NOTHING_RUNS)) as cluster,
        fleet(",".join(registry.address for registry in cluster.registries)),
    ):
        await consul.restart_empty()
        came_s = await entries(consul)
    assert crowding(came_s) < MOMENT_SHARE_MAX, sorted(round(time_s - min(came_s), 2) for time_s in came_s)


async def entries(consul: ConsulHost) -> list[float]:
    """When each worker is first seen in Consul."""
    came_s: dict[str, float] = {}
    async with asyncio.timeout(BACK_WITHIN_S):
        while len(came_s) < WORKERS:
            for entry in (await consul.access.get("/v1/agent/services")).values():
                if {"prefill", "decode"} & set(entry["Tags"]):
                    came_s.setdefault(entry["ID"], now_s())
            await asyncio.sleep(MOMENT_S / 5)
    return list(came_s.values())
