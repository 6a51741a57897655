"""The target file by which Prometheus finds the processes of a local cluster (`file_sd_configs`).

Owns its format and that it is replaced atomically. `cluster.py` owns the set of processes.
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
"""Path of Envoy's own metrics on the edge's metrics endpoint."""


def write(file: Path, processes: Iterable[ClusterProcess], *, with_tls: bool) -> None:
    """List all processes with a metrics endpoint, running or not, so that Prometheus alerts on one that is down."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(list(_targets(processes, "https" if with_tls else "http")), indent=1) + "\n")
    os.replace(partial, file)


def remove(file: Path) -> None:
    """Remove the file of a stopped cluster, so that nothing alerts. May be called twice."""
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
