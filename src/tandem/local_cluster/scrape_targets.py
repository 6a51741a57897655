"""The file by which Prometheus finds the processes of a local cluster (`file_sd_configs`).

Owns its form and that it appears whole or not at all. Which processes there are is `cluster.py`'s.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tandem.local_cluster.child_process import ClusterProcess

FILE = "targets.json"
JOB, ENVOY_JOB = "tandem", "tandem-envoy"
ENVOY_PATH = "/envoy"
"""Of the edge's endpoint, where Envoy's own figures are."""


def write(file: Path, processes: Iterable[ClusterProcess], *, with_tls: bool) -> None:
    """Tell of all processes that have a place to be scraped, whether they run or not: one that is gone is missed."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(list(_targets(processes, "https" if with_tls else "http")), indent=1) + "\n")
    os.replace(partial, file)


def remove(file: Path) -> None:
    """The cluster has been stopped: nobody is missed. May be called twice."""
    file.unlink(missing_ok=True)


def _targets(processes: Iterable[ClusterProcess], scheme: str) -> Iterator[dict[str, Any]]:
    for process in processes:
        if process.metrics_address is None:
            continue
        labels = {"job": JOB, "process": process.name, "role": process.role, "__scheme__": scheme}
        yield {"targets": [process.metrics_address], "labels": labels}
        if process.role == "edge":
            more = {"job": ENVOY_JOB, "__metrics_path__": ENVOY_PATH}
            yield {"targets": [process.metrics_address], "labels": {**labels, **more}}
