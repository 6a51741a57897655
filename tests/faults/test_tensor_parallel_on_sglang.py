"""Pairs of TP 2 on the real engine, with the driver that measures on GPUs: tokens, KV bytes, a dead rank, a refusal."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DEMO_MODEL = Path(__file__).parents[2] / "models" / "tandem-demo"
DEADLINE_S = 900

pytestmark = [
    pytest.mark.engine_sglang,
    pytest.mark.fault_matrix,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs requirements/cpu-engine.txt"),
    pytest.mark.timeout(DEADLINE_S + 60),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("tp2")
    subprocess.run(
        [
            *(sys.executable, "-m", "tools.gpu", "run", "--device", "cpu", "--dtype", "float32", "--gpus", "4"),
            *("--steps", "tp2_refused,tp2", "--model", str(DEMO_MODEL), "--out", str(out)),
            *("--kv-tokens", "16384", "--frontends", "1", "--callers", "1", "--deadline-s", str(DEADLINE_S)),
        ],
        check=True,
    )
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    for step in ("tp2", "tp2_refused"):
        assert found[f"step_{step}"]["state"] == "complete", found[f"step_{step}"]
    return found


def test_a_pair_of_tp_2_has_the_tokens_of_tp_1_and_reports_the_bytes_of_both_ranks(results: dict[str, Any]) -> None:
    streams, single = results["tp2_streams"], results["tp2_one_by_one"]
    for kind in ("alone", "together"):
        assert streams[kind]["streams_equal"] == streams[kind]["streams"] > 0
    assert streams["kv_bytes_exact"] == streams["alone"]["streams"]
    assert (streams["failures"], streams["recomputed_tokens"]) == ([], 0)
    assert single["equal"] == single["tokens"] > 0


def test_a_worker_ends_with_any_of_its_ranks_and_names_it(results: dict[str, Any]) -> None:
    killed = results["tp2_killed_rank"]
    assert (killed["ranks"], killed["exit_status"]) == (2, 1)
    assert "scheduler of rank 1 was killed by SIGKILL" in killed["said"]
    assert killed["after_restart"]["failure"] is None


def test_a_pair_of_unequal_parallelism_is_refused_before_dispatch(results: dict[str, Any]) -> None:
    refused = results["tp2_refused"]
    assert "tensor_parallel_size is 2 on prefill-0 and 1 on decode-0" in refused["refused"]
    assert set(refused["traces_of_legs"].values()) == {0}
