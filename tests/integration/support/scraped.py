"""What real scrape endpoints say: the sum of a metric over processes, and the greatest of its series.

Reads what Prometheus reads, with the parser of Prometheus's own library.
"""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from tandem.local_cluster.child_process import ClusterProcess
from tandem.observability.metric_catalog import BY_NAME, Emitter, Kind
from tandem.observability.metric_types import prometheus_name

TIMEOUT_S = 5.0
EMITTERS = {
    "registry": {Emitter.REGISTRY},
    "frontend": {Emitter.FRONTEND, Emitter.PARENT},
    "edge": {Emitter.EDGE},
    "prefill": {Emitter.WORKER},
    "decode": {Emitter.WORKER},
}
"""By the role of a process."""


@dataclass(frozen=True)
class Wanted:
    """Series of one metric."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    suffix: str = ""
    """Of a histogram: `_count`, or `_sum`."""

    @property
    def sample(self) -> str:
        metric = BY_NAME[self.name]
        suffix = (self.suffix or "_count") if metric.kind is Kind.HISTOGRAM else ""
        return prometheus_name(metric) + suffix


async def scrape(address: str, path: str = "/metrics") -> str:
    """The text of one endpoint."""

    def read() -> str:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=TIMEOUT_S) as response:
            return str(response.read().decode())

    return await asyncio.to_thread(read)


def samples(text: str) -> list[tuple[str, dict[str, str], float]]:
    """Name, labels and value of each series."""
    return [
        (sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]


async def values(processes: Iterable[ClusterProcess], wanted: Wanted) -> list[float]:
    """The value of each of its series, in every process that has it and can be scraped now."""
    emitters = set(BY_NAME[wanted.name].emitters)
    asked = [process for process in processes if process.runs and EMITTERS.get(process.role, set()) & emitters]
    texts = await asyncio.gather(*(_text(process) for process in asked))
    own = {key.replace(".", "_"): value for key, value in wanted.labels.items()}
    return [
        value
        for text in texts
        for name, labels, value in samples(text)
        if name == wanted.sample and own.items() <= labels.items()
    ]


async def _text(process: ClusterProcess) -> str:
    """Nothing of one that cannot be scraped."""
    if process.metrics_address is None:
        return ""
    try:
        return await scrape(process.metrics_address)
    except OSError:
        return ""
