"""Benchmarks, evaluation and load tools: each command of the guide runs to its end, and none of its requests failed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tandem.local_cluster.cluster import LocalCluster
from tests.other_tools.conftest import addressed, guide_command, run

pytestmark = [pytest.mark.other_tools, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(1200)]

OFFLINE = {"HF_HUB_OFFLINE": "1"}


async def test_guidellm_completes_every_request(tools: Path, cluster: LocalCluster, folder: Path) -> None:
    await run(addressed(guide_command("guidellm"), cluster), folder, tools, **OFFLINE)
    [benchmark] = json.loads((folder / "guidellm.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals == {"successful": 20, "errored": 0, "incomplete": 0, "total": 20}


async def test_aiperf_completes_every_request(tools: Path, cluster: LocalCluster, folder: Path) -> None:
    # As many processes as a small machine has room for.
    command = addressed(guide_command("aiperf"), cluster).rstrip() + " --workers-max 1 --record-processors 1"
    printed = await run(command, folder, tools)
    reports = [*folder.glob("artifacts/*/profile_export_aiperf.json")]
    assert len(reports) == 1, printed
    found = json.loads(reports[0].read_text())
    assert found["request_count"]["avg"] == 20
    assert not found.get("error_summary")
    assert found["time_to_first_token"]["avg"] > 0


async def test_bench_serving_completes_every_request(tools: Path, cluster: LocalCluster, folder: Path) -> None:
    path = f"{folder}/src/tandem/engine/sglang/standins"
    command = addressed(guide_command("python -m sglang.bench_serving"), cluster)
    printed = await run(command, folder, tools, PYTHONPATH=path, **OFFLINE)
    assert re.search(r"Successful requests: +20\b", printed), printed


async def test_lm_eval_gets_texts_and_log_probabilities(tools: Path, cluster: LocalCluster, folder: Path) -> None:
    printed = await run(addressed(guide_command("lm_eval"), cluster), folder, tools, **OFFLINE)
    rows = re.findall(
        r"^\| *(where_\w+) *\|.*\| *(acc|exact_match) *\|.*\| *([01](?:\.\d+)?) *\|", printed, re.MULTILINE
    )
    assert [row[:2] for row in rows] == [
        ("where_choice", "acc"),
        ("where_generate", "exact_match"),
        ("where_generate", "exact_match"),
    ], printed


async def test_locust_streams_without_a_failure(tools: Path, cluster: LocalCluster, folder: Path) -> None:
    command = addressed(guide_command("locust"), cluster)
    printed = await run(command, folder, tools, PYTHONPATH=f"{folder}/src")
    rows = re.findall(r"^ +Aggregated +(\d+) +(\d+)\(", printed, re.MULTILINE)
    assert rows, printed
    assert int(rows[-1][0]) > 0
    assert int(rows[-1][1]) == 0


async def test_grpcurl_lists_and_calls_by_reflection(tools: Path, cluster: LocalCluster, folder: Path) -> None:
    printed = await run(addressed(guide_command("grpcurl"), cluster), folder, tools)
    assert "tandem.api.frontend.v1.InferenceService\n" in printed
    assert '"reason": "FINISH_REASON_LENGTH"' in printed
