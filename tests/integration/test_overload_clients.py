"""The overload benchmark's clients, on a small cluster with more requests than it can serve."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.overload_load import Plan, ask_all
from benchmarks.overload_measurements import is_good
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.testing.fake_model import write_fake_model


async def test_benchmark_clients_separate_good_requests_from_refused_ones(tmp_path: Path) -> None:
    model = tmp_path / "fake-model"
    write_fake_model(model)
    flags = {"engine-extra": json.dumps({"decode_step_s": 0.05}), "running-requests-max": "1"}
    spec = ClusterSpec(
        model=model,
        log_directory=tmp_path / "logs",
        engine="simulated",
        worker_flags=flags,
        role_flags={"frontend": {"open-requests-max": "3", "tenant-share": "1"}},
    )
    async with LocalCluster(spec) as cluster:
        addresses = [frontend.address for frontend in cluster.frontends]
        plan = Plan(frontends=addresses, rate_per_s=40, seconds=1.5, seed=1, file="", prompt_words=(2, 4))
        asked = await ask_all(plan)
    outcomes = {one.outcome for one in asked}
    assert outcomes == {"finished", "OVERLOADED"}
    assert all(one.retry_delay_s for one in asked if one.outcome == "OVERLOADED")
    assert all(is_good(one) and 8 <= one.tokens <= 24 for one in asked if one.outcome == "finished")
