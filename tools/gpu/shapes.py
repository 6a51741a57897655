"""The clusters that are compared: a pair, and aggregated workers, with the same settings except for their roles.

Owns the assignment of GPUs and memory to workers. Starts nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.local_cluster.cluster import ClusterSpec, LocalCluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What is run on."""

    device: str
    """"cuda" or "cpu"."""
    gpus: int
    """GPUs to use; 0 on a CPU."""
    dtype: str
    logs: Path
    extra: dict[str, Any] = field(default_factory=dict)
    """More arguments of every engine."""

    def gpu(self, number: int) -> int:
        """The GPU of the worker of that number: with one GPU they share it."""
        return number % self.gpus if self.gpus else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How much a cluster is made for."""

    kv_capacity_tokens: int
    running_requests_max: int
    frontends: int = 1
    open_requests_max: int = 1024


def pair(machine: Machine, model: Path, load: Load, name: str) -> ClusterSpec:
    """One prefill and one decode worker."""
    return _spec(machine, model, load, name, prefill=1, decode=1, aggregated=0)


def aggregated(machine: Machine, model: Path, load: Load, name: str) -> ClusterSpec:
    """One worker that does both halves."""
    return _spec(machine, model, load, name, prefill=0, decode=0, aggregated=1)


def two_aggregated(machine: Machine, model: Path, load: Load, name: str) -> ClusterSpec:
    """Two of them: on as many GPUs as a pair."""
    return _spec(machine, model, load, name, prefill=0, decode=0, aggregated=2)


def place(cluster: LocalCluster, machine: Machine, first: int = 0) -> None:
    """Give each worker its GPU, in the order of the workers, from the `first` on; call it before the cluster starts."""
    for number, worker in enumerate(cluster.workers, start=first):
        worker.flags["engine-extra"] = json.dumps(engine_extra(machine, number))


def engine_extra(machine: Machine, number: int) -> dict[str, Any]:
    """Arguments of one engine beyond the worker's own settings."""
    place = {"base_gpu_id": machine.gpu(number)} if machine.gpus else {}
    return {**machine.extra, **place}


def _spec(
    machine: Machine, model: Path, load: Load, name: str, *, prefill: int, decode: int, aggregated: int
) -> ClusterSpec:
    flags = {
        "device": machine.device,
        "dtype": machine.dtype,
        "kv-capacity-tokens": str(load.kv_capacity_tokens),
        "running-requests-max": str(load.running_requests_max),
        # The first use of a kernel compiles it.
        "canary-timeout-s": "300",
    }
    return ClusterSpec(
        model=model,
        model_name="model",
        log_directory=machine.logs / name,
        frontends=load.frontends,
        worker_flags=flags,
        role_flags={"frontend": {"open-requests-max": str(load.open_requests_max), "tenant-share": "1"}},
        prefill=prefill,
        decode=decode,
        aggregated=aggregated,
    )
