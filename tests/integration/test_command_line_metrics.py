"""`tandem up` gives every process a port for Prometheus and lists them in one file, removed when it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tandem.testing.eventually import assert_eventually
from tests.integration.support.command_line import SIMULATED, started
from tests.integration.support.scraped import scrape

pytestmark = pytest.mark.timeout(60)


async def test_the_targets_are_there_as_long_as_the_cluster(state: Path) -> None:
    file = state.parent / "targets.json"

    def targets() -> list[dict[str, Any]]:
        return list(json.loads(file.read_text())) if file.exists() and state.exists() else []

    async with started(state, "up", *SIMULATED):
        found = await assert_eventually(targets, lambda listed: len(listed) == 6, within_s=40, what="all targets")
        assert {one["labels"]["process"] for one in found} == {"registry", "prefill-0", "decode-0", "frontend", "edge"}
        for one in found:
            path = one["labels"].get("__metrics_path__", "/metrics")
            assert await scrape(one["targets"][0], path)
    assert not file.exists()


async def test_without_metrics_no_targets_are_listed(state: Path) -> None:
    async with started(state, "up", "--no-metrics", "--no-edge", *SIMULATED) as process:
        assert process.stdout is not None
        lines = []
        while not (line := (await process.stdout.readline()).decode()).startswith("logs"):
            lines.append(line)
        assert not [line for line in lines if line.startswith("metrics")]
        assert not (state.parent / "targets.json").exists()
