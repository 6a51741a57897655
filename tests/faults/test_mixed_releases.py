"""A rolling upgrade from the former release to this one, and back, process by process under a load: no request fails.

The former release is the recorded one (tools/record_former_release.py), with the libraries of this one. What this does
not show: a change of the engine's version (such workers are never paired), of a library, or of the leg contract.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.support import verdicts
from tests.faults.support.demo_answers import demo_answers
from tests.faults.support.former_release import MixedCluster, imported_from, mixed_cluster, path_of, unpacked
from tests.faults.support.http_load import HttpLoad
from tests.faults.support.steady_load import Shape
from tests.faults.support.views import Views

pytestmark = pytest.mark.timeout(240)

SHAPE = Shape(rate_per_s=12, long_tokens=100)
FLOOR = 12
"""Answers after each step; fewer prove nothing."""


@pytest.fixture(scope="module")
def former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout of the former release."""
    checkout = unpacked(tmp_path_factory.mktemp("former"))
    assert imported_from(path_of(checkout)).is_relative_to(checkout)
    return checkout


@pytest.mark.parametrize(
    "roles",
    [
        ("registry", "prefill", "decode", "frontend"),
        pytest.param(("frontend", "decode", "prefill", "registry"), marks=pytest.mark.fault_matrix),
        pytest.param(("decode", "registry", "frontend", "prefill"), marks=pytest.mark.fault_matrix),
    ],
    ids="-".join,
)
async def test_a_rolling_upgrade_and_the_way_back_lose_nothing(
    former: Path, tmp_path: Path, roles: tuple[str, ...]
) -> None:
    async with mixed_cluster(tmp_path, former) as cluster, cluster.views() as views:
        await cluster.whole(views)
        assert all(cluster.is_former(process) for process in cluster.processes.values())
        load = HttpLoad([cluster.edge.address], SHAPE)
        await load.start()
        try:
            await load.wait_ended(FLOOR)
            for process in cluster.in_order(roles):
                ready_s = await cluster.replace(process)
                await _goes_on(cluster, views, load)
                if process in cluster.workers:
                    verdicts.went_to(load.history, process.name, ready_s)
            # The last one that was upgraded is the first that goes back.
            await cluster.replace(cluster.in_order(roles)[-1], with_former=True)
            await _goes_on(cluster, views, load)
        finally:
            await load.stop()
    verdicts.none_failed(load.history)
    verdicts.tokens_are_exact(load.history, demo_answers)


async def _goes_on(cluster: MixedCluster, views: Views, load: HttpLoad) -> None:
    await cluster.whole(views)
    await load.wait_ended(FLOOR)
