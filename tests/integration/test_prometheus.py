"""What is under deploy/observability, loaded into a real Prometheus that scrapes a real cluster.

Rules are also run by promtool against series that were made up for each alert. No Grafana runs here: its dashboards are
read by Grafana's own schema, and each of their queries must give a series.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.observability.merged_scrape import LABEL
from tandem.observability.metric_catalog import TABLE, Kind
from tandem.observability.metric_types import prometheus_name
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import DEMO_MODEL
from tests.integration.support import cluster_events as on
from tests.integration.support.calls import generate, refusal, request_of
from tests.integration.support.cluster_events import World
from tests.integration.support.prometheus_host import DEPLOY, PrometheusHost, prometheus

pytestmark = pytest.mark.timeout(180)

DASHBOARDS = sorted((DEPLOY.parent / "grafana" / "dashboards").glob("*.json"))
ALERTS = [
    rule["alert"] for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"] for rule in group["rules"]
]
METRIC = re.compile(r"\b(?:tandem|gen_ai)_[a-z_]+(?=[\[{ )]|$)")


def run_promtool(promtool: Path, *arguments: str) -> str:
    done = subprocess.run([promtool, *arguments], cwd=DEPLOY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def panels() -> Iterator[tuple[str, str, str]]:
    """Dashboard, title and query of each target."""
    for file in DASHBOARDS:
        for panel in json.loads(file.read_text())["panels"]:
            yield from ((file.stem, panel["title"], target["expr"]) for target in panel["targets"])


def known_series() -> set[str]:
    ends = {Kind.HISTOGRAM: ("_bucket", "_sum", "_count")}
    return {prometheus_name(metric) + end for metric in TABLE for end in ends.get(metric.kind, ("",))}


def test_the_configuration_and_the_rules_are_sound(promtool: Path) -> None:
    run_promtool(promtool, "check", "config", "prometheus.yml")
    assert f"{len(ALERTS)} rules found" in run_promtool(promtool, "check", "rules", "alerts.yml")


@pytest.mark.parametrize("file", ["kubernetes.yml", "consul.yml"])
def test_the_configuration_of_a_deployment_is_sound(promtool: Path, tmp_path: Path, file: str) -> None:
    """All but its discovery, which Debian's promtool lacks."""
    config = yaml.safe_load((DEPLOY / file).read_text())
    for job in config["scrape_configs"]:
        [discovery] = [key for key in job if key.endswith("_sd_configs")]
        del job[discovery]
    config["rule_files"] = [str(DEPLOY / name) for name in config["rule_files"]]
    (tmp_path / file).write_text(yaml.safe_dump(config))
    run_promtool(promtool, "check", "config", str(tmp_path / file))


def test_each_alert_fires_for_what_it_is_for_and_for_nothing_else(promtool: Path) -> None:
    run_promtool(promtool, "test", "rules", "alerts_test.yml")
    tests = yaml.safe_load((DEPLOY / "alerts_test.yml").read_text())["tests"]
    wanted = [one for test in tests for one in test["alert_rule_test"]]
    assert {one["alertname"] for one in wanted if one.get("exp_alerts")} == set(ALERTS)
    assert {one["alertname"] for one in wanted if not one.get("exp_alerts")} == set(ALERTS)


def test_rules_and_dashboards_name_series_of_the_table() -> None:
    texts = [(DEPLOY / "alerts.yml").read_text(), *(query for _, _, query in panels())]
    exprs = [rule for text in texts for rule in METRIC.findall(text)]
    attributes = {attribute.name.replace(".", "_") for metric in TABLE for attribute in metric.attributes}
    assert len(exprs) > 40
    assert set(exprs) - attributes - {LABEL} <= known_series()


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_grafanas_own_schema_knows_every_field_of_a_dashboard(file: Path) -> None:
    written = json.loads(file.read_text())
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(written)))
    assert not list(lost(written, read))


def lost(written: Any, read: Any, place: str = "") -> Iterator[str]:
    """Where something of `written` is missing or different in `read`."""
    if isinstance(written, dict):
        for key, value in written.items():
            yield from lost(value, read.get(key) if isinstance(read, dict) else None, f"{place}.{key}")
    elif isinstance(written, list):
        others = read if isinstance(read, list) else []
        for number, value in enumerate(written):
            yield from lost(value, others[number] if number < len(others) else None, f"{place}[{number}]")
    elif written != read:
        yield place


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    logs = tmp_path_factory.mktemp("watched")
    spec = ClusterSpec(
        model=DEMO_MODEL,
        log_directory=logs,
        engine="simulated",
        decode=2,
        frontend_processes=2,
        edge=True,
        metrics=True,
    )
    cluster = LocalCluster(spec)
    for worker in cluster.workers:
        extra = {"decode_step_s": 0.004, "control_file": str(logs / f"{worker.name}.rules")}
        worker.flags["engine-extra"] = json.dumps(extra)
    async with cluster:
        yield World(cluster)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def watched(
    world: World, prometheus_binary: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[PrometheusHost]:
    async with prometheus(prometheus_binary, world.cluster, tmp_path_factory.mktemp("prometheus")) as host:
        yield host


@pytest.mark.asyncio(loop_scope="session")
async def test_every_process_is_found_and_no_alert_fires(world: World, watched: PrometheusHost) -> None:
    expected = {("tandem", process.name) for process in world.cluster.processes} | {("tandem-envoy", "edge")}
    assert set(await watched.targets()) == expected
    assert set(await watched.rules()) == set(ALERTS)
    await generate(world.cluster, request_of("Once upon a time"))
    assert "firing" not in (await watched.rules()).values()


@pytest.mark.asyncio(loop_scope="session")
async def test_each_query_of_each_panel_gives_a_series(world: World, watched: PrometheusHost) -> None:
    for _ in range(4):
        async with on.an_answer(world), on.a_client_that_leaves(world), on.a_leg_that_breaks(world):
            pass
        async with on.a_refusal(world), on.a_request_over_http(world):
            pass
        async with on.a_tenants_answer(world), on.a_used_quota(world):
            pass
    async with on.a_continuation(world):
        pass
    async with on.an_open_stream(world):

        async def empty() -> list[tuple[str, str, str]]:
            found = []
            for where, title, query in panels():
                series = await watched.query(query.replace("$__rate_interval", "60s"))
                found += [] if series else [(where, title, query)]
            return found

        await assert_eventually(empty, lambda found: not found, within_s=20, every_s=1, what="a series of each query")


@pytest.mark.asyncio(loop_scope="session")
async def test_an_alert_fires_when_no_decode_worker_serves(world: World, watched: PrometheusHost) -> None:
    decodes = world.decodes
    for decode in decodes:
        decode.kill()
    with_none = pb.GenerateRequest(prompt="Once upon a time")
    await assert_eventually(
        lambda: watched.rules(),
        lambda states: states["TandemNoServingWorker"] == "firing",
        within_s=40,
        every_s=0.5,
        what="the alert",
    )
    assert (await refusal(world.cluster, with_none)).reason == "NO_WORKERS"
    for decode in decodes:
        await decode.wait_ended()
        await world.cluster.restart(decode.name)
    await assert_eventually(
        lambda: watched.rules(),
        lambda states: states["TandemNoServingWorker"] == "inactive",
        within_s=20,
        every_s=0.5,
        what="the end of the alert",
    )
