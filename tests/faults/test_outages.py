"""Registry and Consul go away under a steady load, each in its own way, and no request fails.

Every outage is proved before anything is judged, lasts for longer than a lease, and has a worker killed in its midst,
which the frontends can only learn then from the worker's own silence. Afterwards all are registered again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio

from tandem.testing.eventually import assert_eventually
from tests.faults.support.consul_proofs import generation, kill_first, lose_leader
from tests.faults.support.cut_proxy import Cut
from tests.faults.support.demo_answers import demo_answers
from tests.faults.support.fault_cluster import Plan, fault_cluster
from tests.faults.support.outage import Place, RequestTrace, Step, answering, last_known, live, silent, through_outage
from tests.faults.support.process_faults import kill
from tests.faults.support.steady_load import Shape
from tests.integration.support.consul_host import consul_servers

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(180)]

LEASE_S = 2.0
TRACE = RequestTrace(shape=Shape(rate_per_s=20), oracle=demo_answers, floor=20, victim="decode-0")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def place(consul_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Place]:
    """Two registries over one agent that keeps its data."""
    async with place_with(consul_binary, tmp_path_factory.mktemp("outages"), servers=1) as place:
        yield place


@asynccontextmanager
async def place_with(binary: Path, logs: Path, servers: int) -> AsyncIterator[Place]:
    async with (
        consul_servers(binary, logs, servers) as consul,
        fault_cluster(logs, Plan(consul=consul.address, lease_s=LEASE_S)) as cluster,
    ):
        yield Place(cluster, consul)


async def test_one_of_two_registries_is_killed(place: Place) -> None:
    async def begin(place: Place) -> None:
        await kill(place.cluster.registries[0])

    async def end(place: Place) -> None:
        await place.cluster.restart("registry-0")

    await through_outage(place, TRACE, begin, end, live)


async def test_both_registries_are_killed(place: Place) -> None:
    async def begin(place: Place) -> None:
        for registry in place.cluster.registries:
            await kill(registry)

    async def end(place: Place) -> None:
        await place.cluster.restart("registry-0", "registry-1")

    await through_outage(place, TRACE, begin, end, silent)


async def test_consul_is_killed(place: Place) -> None:
    before = await generation(place.consul)

    async def end(place: Place) -> None:
        await place.consul.restart(place.consul.first)

    await through_outage(place, TRACE, lambda place: kill_first(place.consul), end, last_known)
    assert await generation(place.consul) == before, "it came back without its memory"


async def test_consul_comes_back_with_nothing(place: Place) -> None:
    before = await generation(place.consul)

    async def end(place: Place) -> None:
        await place.consul.restart(place.consul.first, empty=True)

    await through_outage(place, TRACE, lambda place: kill_first(place.consul), end, last_known)
    assert await generation(place.consul) != before, "it has kept its memory"


def matrix(*cuts: Cut) -> list[object]:
    return [pytest.param(cut, marks=pytest.mark.fault_matrix, id=cut.value) for cut in cuts]


@pytest.mark.parametrize("cut", [Cut.SILENT, Cut.RESET, *matrix(Cut.CLOSED, Cut.HALF)])
async def test_the_links_to_consul_are_cut(place: Place, cut: Cut) -> None:
    await through_outage(place, TRACE, cutting(cut), heal_all, last_known)


@pytest.mark.parametrize("cut", matrix(Cut.LATE, Cut.TRICKLE))
async def test_the_links_to_consul_are_slow(place: Place, cut: Cut) -> None:
    # Late, the view is still the present one; over a trickle it may be or not, and nothing fails for it.
    await through_outage(place, TRACE, cutting(cut), heal_all, live if cut is Cut.LATE else answering)


def cutting(cut: Cut) -> Step:
    """Cuts all links to Consul, and proves it."""

    async def begin(place: Place) -> None:
        for link in place.cluster.consul_links:
            await link.sever(cut)
        for link in place.cluster.consul_links:
            await assert_eventually(
                partial(getattr, link, "held_count"), within_s=10, what="something that met the cut"
            )

    return begin


async def heal_all(place: Place) -> None:
    for link in place.cluster.consul_links:
        await link.heal()


async def test_three_servers_lose_two_and_with_them_their_leader(consul_binary: Path, tmp_path: Path) -> None:
    async def end(place: Place) -> None:
        await place.consul.restart(*place.consul.agents[1:])

    async with place_with(consul_binary, tmp_path, servers=3) as place:
        await through_outage(place, TRACE, lambda place: lose_leader(place.consul), end, last_known)
