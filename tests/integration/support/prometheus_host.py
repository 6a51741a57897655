"""A real Prometheus for a test: Debian's, with the repository's own rules, over the processes of one cluster.

Owns its process and its questions over HTTP. What is asked is the test's business.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tandem.local_cluster.cluster import LocalCluster
from tandem.testing.eventually import assert_eventually
from tests.faults.support.process_faults import free_port

DEPLOY = Path(__file__).parents[3] / "deploy" / "observability" / "prometheus"
START_S = 30.0


class PrometheusHost:
    """Use `prometheus`."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def query(self, expr: str) -> list[dict[str, Any]]:
        """The series of an expression, now."""
        answer = await self._get("/api/v1/query", query=expr)
        assert answer["status"] == "success", answer
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    async def rules(self) -> dict[str, str]:
        """State of each alert: inactive, pending or firing; its health must be ok."""
        groups = (await self._get("/api/v1/rules"))["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        assert all(rule["health"] != "err" for rule in rules), rules
        return {rule["name"]: rule["state"] for rule in rules}

    async def targets(self) -> dict[tuple[str, str], str]:
        """Health of each target, by job and process."""
        found = (await self._get("/api/v1/targets"))["data"]["activeTargets"]
        return {(one["labels"]["job"], one["labels"]["process"]): one["health"] for one in found}

    async def _get(self, path: str, **parameters: str) -> Any:
        url = f"{self.url}{path}?{urllib.parse.urlencode(parameters)}"

        def read() -> Any:
            with urllib.request.urlopen(url, timeout=10) as response:
                return json.load(response)

        return await asyncio.to_thread(read)


def configuration(targets: Path, interval: str) -> str:
    """The repository's, but for where the targets are and how often they are scraped."""
    text = (DEPLOY / "prometheus.yml").read_text()
    for own, other in (
        ("../../../.tandem/targets.json", str(targets)),
        ("  - alerts.yml", f"  - {DEPLOY / 'alerts.yml'}"),
        ("scrape_interval: 5s", f"scrape_interval: {interval}"),
        ("evaluation_interval: 5s", f"evaluation_interval: {interval}"),
        ("refresh_interval: 5s", f"refresh_interval: {interval}"),
    ):
        assert own in text, own
        text = text.replace(own, other)
    return text


@asynccontextmanager
async def prometheus(
    binary: Path, cluster: LocalCluster, directory: Path, interval: str = "1s"
) -> AsyncIterator[PrometheusHost]:
    """As long as the block; ready when every target has been scraped once."""
    config, port = directory / "prometheus.yml", free_port()
    config.write_text(configuration(cluster.targets_file, interval))
    command = [binary, f"--config.file={config}", f"--storage.tsdb.path={directory / 'tsdb'}"]
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: ASYNC220
            [*map(str, command), f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
        )
    host = PrometheusHost(f"http://127.0.0.1:{port}")
    try:
        await assert_eventually(lambda: _healths(host), lambda found: found == {"up"}, within_s=START_S, what="targets")
        yield host
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 20)


async def _healths(host: PrometheusHost) -> set[str]:
    try:
        return set((await host.targets()).values())
    except OSError:
        return set()
