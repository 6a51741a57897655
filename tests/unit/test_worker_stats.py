"""Readings of a worker's metrics: the engine's, and those that remain when the engine has failed."""

from __future__ import annotations

from pathlib import Path

from tandem.domain.adapter import Adapter
from tandem.domain.worker import Worker
from tandem.observability.leg_metrics import LegMetrics
from tandem.observability.metrics import Metrics
from tandem.testing.fake_model import write_fake_model
from tandem.worker.engine_health import EngineHealth, Periods
from tandem.worker.identity import Identity
from tandem.worker.legs import Legs
from tandem.worker.stats import WorkerStats
from tests.unit.support.registry_workers import make_worker
from tests.unit.support.simulated_engines import AGGREGATED, running


class Place:
    """No lease: these tests do not need one."""

    ttl_s = 1.0
    lease_time = None

    def renew(self, epoch: int) -> None:
        pass

    def replace(self, member: Worker) -> None:
        pass

    async def set_adapters(self, adapters: tuple[Adapter, ...], timeout_s: float) -> bool:
        return True


async def _ignore(trouble: str | None) -> None:
    pass


async def test_an_engine_that_is_gone_takes_only_its_own_gauges_along(tmp_path: Path) -> None:
    async with running(write_fake_model(tmp_path), AGGREGATED) as engine:
        health = EngineHealth(engine, lambda: 0, Periods(60, 60), _ignore)
        stats = WorkerStats(engine, Legs(engine, Identity(make_worker(), Place())), health, LegMetrics(Metrics()))
        names = {"tandem.kv.pages", "tandem.engine.waiting_tokens", "tandem.legs.open"}
        assert names <= {reading.name for reading in await stats.read()}
    left = {reading.name for reading in await stats.read()}
    assert left == {"tandem.legs.open", "tandem.adapters", "tandem.engine.healthy"}
