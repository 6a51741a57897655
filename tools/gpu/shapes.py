"""The clusters that are compared: workers by role and tensor parallelism, with the same settings except for these.

Owns the assignment of GPUs and memory to workers. Starts nothing.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
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
    places: int = 0
    """Engines of one GPU each that there is room for: GPUs times the engines that share one. On a CPU, the GPUs that a
    rehearsal is for."""
    dtype: str
    logs: Path
    extra: dict[str, Any] = field(default_factory=dict)
    """More arguments of every engine."""

    def gpu(self, number: int) -> int:
        """The GPU of the worker of that number: with one GPU they share it."""
        return number % self.gpus if self.gpus else 0

    def has_gpus_for(self, engine_gpus: Sequence[int]) -> bool:
        """Whether each of these engines finds GPUs of its own for its ranks; on a CPU they always do."""
        return not self.gpus or max(engine_gpus) == 1 or sum(engine_gpus) <= self.gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How much a cluster is made for."""

    kv_capacity_tokens: int
    running_requests_max: int
    frontends: int = 1
    open_requests_max: int = 1024


@dataclass(frozen=True, slots=True)
class Fleet:
    """Workers by role; each engine has as many GPUs as its tensor parallelism says."""

    prefill: int = 0
    decode: int = 0
    aggregated: int = 0
    prefill_tp: int = 1
    tp: int = 1
    """Of decode and aggregated engines."""

    @property
    def engine_gpus(self) -> list[int]:
        """GPUs of each engine, in the order of a cluster's workers."""
        return [self.prefill_tp] * self.prefill + [self.tp] * (self.decode + self.aggregated)

    @property
    def gpus(self) -> int:
        """GPUs of all engines."""
        return sum(self.engine_gpus)

    @property
    def name(self) -> str:
        """For example 1p3d, 4a, 1p1d_tp2, 1p1d_tp2to1."""
        roles = (("p", self.prefill), ("d", self.decode), ("a", self.aggregated))
        name = "".join(f"{count}{role}" for role, count in roles if count)
        if self.prefill and self.prefill_tp != self.tp:
            return f"{name}_tp{self.prefill_tp}to{self.tp}"
        return f"{name}_tp{self.tp}" if self.tp > 1 else name

    @classmethod
    def named(cls, name: str) -> Fleet:
        """The fleet of one GPU for each engine that has this name.

        Raises:
            ValueError: there is none.
        """
        found = re.fullmatch(r"(?:([1-9])p([1-9])d)?(?:([1-9])a)?", name)
        if not name or found is None:
            raise ValueError(f"{name!r} is no fleet: 2p2d, 4a or 1p1d2a are")
        return cls(*(int(count or 0) for count in found.groups()))


def fleets_of(gpus: int) -> list[Fleet]:
    """The fleets to compare that use so many GPUs: half of them in each role, all aggregated, and the uneven ones."""
    if gpus < 2:
        return []
    few = max(1, gpus // 4)
    splits = dict.fromkeys((gpus // 2, few, gpus - few))
    pairs = [Fleet(prefill, gpus - prefill) for prefill in splits]
    return [pairs[0], Fleet(aggregated=gpus), *pairs[1:]]


def cluster_spec(machine: Machine, model: Path, load: Load, fleet: Fleet, name: str) -> ClusterSpec:
    """A cluster of these workers."""
    counts = {"prefill": fleet.prefill, "decode": fleet.decode, "aggregated": fleet.aggregated}
    return _spec(machine, model, load, name, **counts)


def pair(machine: Machine, model: Path, load: Load, name: str) -> ClusterSpec:
    """One prefill and one decode worker."""
    return _spec(machine, model, load, name, prefill=1, decode=1, aggregated=0)


def aggregated(machine: Machine, model: Path, load: Load, name: str) -> ClusterSpec:
    """One worker that does both halves."""
    return _spec(machine, model, load, name, prefill=0, decode=0, aggregated=1)


def two_aggregated(machine: Machine, model: Path, load: Load, name: str) -> ClusterSpec:
    """Two of them: on as many GPUs as a pair."""
    return _spec(machine, model, load, name, prefill=0, decode=0, aggregated=2)


def place(
    cluster: LocalCluster,
    machine: Machine,
    first: int = 0,
    engine_gpus: Sequence[int] = (),
    extra: dict[str, Any] | None = None,
) -> None:
    """Give each worker its GPUs, in the order of the workers; call it before the cluster starts.

    Args:
        first: GPU of the first worker.
        engine_gpus: how many GPUs each worker's engine has; empty: one each.
        extra: arguments of every engine of this cluster.
    """
    sizes = engine_gpus or [1] * len(cluster.workers)
    begins = itertools.accumulate(sizes, initial=first)
    for worker, gpus, begin in zip(cluster.workers, sizes, begins, strict=False):
        parallel = {"tp_size": gpus} if gpus > 1 else {}
        arguments = {**engine_extra(machine, begin), **(extra or {}), **parallel}
        worker.flags["engine-extra"] = json.dumps(arguments)


def engine_extra(machine: Machine, number: int) -> dict[str, Any]:
    """Arguments of one engine beyond the worker's own settings; `number` is that of its first GPU."""
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
