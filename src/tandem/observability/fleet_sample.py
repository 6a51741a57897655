"""The state of the fleet at one moment, as `tandem top` and the console show it.

Owns the arithmetic of rates and totals; performs no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from tandem.api.admin.v1 import admin_service_pb2 as admin_pb
from tandem.api.types.v1 import worker_pb2
from tandem.api.worker.v1 import worker_service_pb2 as worker_pb
from tandem.rpc.convert import seconds

SERVING, DRAINING, UNREACHABLE, GONE = "serving", "draining", "unreachable", "gone"
"""SERVING and DRAINING as registered; UNREACHABLE: registered but not responding; GONE: no longer registered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSample:
    """One start of a worker."""

    name: str
    role: str
    epoch: int
    address: str
    state: str
    health: str
    """Status of its grpc.health.v1: "ok", "not serving", or "-" when it cannot be queried."""
    load: worker_pb.WatchLoadResponse | None = None
    """Its last load report; None: unreachable."""
    before: worker_pb.WatchLoadResponse | None = None
    """The report before that, of the same epoch."""
    failures: int = 0
    """Failed legs on it, as counted by the frontends over all its epochs."""

    def rate(self, counter: str) -> float | None:
        """Increase of a load counter per second; None: unknown."""
        if self.load is None or self.before is None or not self.load.HasField(counter):  # type: ignore[arg-type]
            return None
        took_s = seconds(self.load.measured_time) - seconds(self.before.measured_time)
        grown = int(getattr(self.load, counter)) - int(getattr(self.before, counter))
        return grown / took_s if took_s > 0 and grown >= 0 else None

    @property
    def tokens_per_s(self) -> float | None:
        """Prompt tokens/s of a prefill worker, completion tokens/s of the others."""
        return self.rate("prompt_tokens" if self.role == "prefill" else "completion_tokens")

    @property
    def hit_ratio(self) -> float | None:
        """Cached by all prompt tokens of the legs that have ended since its start; None: unknown, or none has."""
        load = self.load
        if load is None or not load.HasField("cached_tokens") or not load.prompt_tokens:
            return None
        return load.cached_tokens / load.prompt_tokens

    @property
    def transfer_bytes_per_s(self) -> float | None:
        """KV bytes/s sent (prefill) or received (decode)."""
        return self.rate("kv_transfer_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendSample:
    """One start of a frontend."""

    name: str
    epoch: int
    address: str
    state: str
    health: str
    stats: admin_pb.WatchFiguresResponse | None = None
    """Its last report; None: unreachable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """State of the fleet."""

    time_s: float
    """Since the Unix epoch."""
    workers: tuple[WorkerSample, ...] = ()
    frontends: tuple[FrontendSample, ...] = ()
    registry_problem: str | None = None
    """Why the member list may be outdated; None: a registry responds."""
    missing: tuple[str, ...] = field(default=())
    """Registered processes that have not sent two reports yet."""

    def total(self, name: str) -> int:
        """Sum of a counter or gauge over the frontends."""
        return sum(int(getattr(f.stats, name)) for f in self.frontends if f.stats is not None)

    def rate(self, name: str) -> float:
        """Sum of a rate over the frontends."""
        return sum(float(getattr(f.stats, name)) for f in self.frontends if f.stats is not None)


def role_name(number: worker_pb2.WorkerRole.ValueType) -> str:
    """Name of a role, in lower case."""
    return worker_pb2.WorkerRole.Name(number).removeprefix("WORKER_ROLE_").lower()


def state_name(number: worker_pb2.WorkerState.ValueType) -> str:
    """Name of a state, in lower case."""
    return worker_pb2.WorkerState.Name(number).removeprefix("WORKER_STATE_").lower()


def failures_by_worker(frontends: Iterable[FrontendSample]) -> dict[str, int]:
    """Failed legs by worker, over all frontends."""
    failures: dict[str, int] = {}
    for frontend in frontends:
        for failed in frontend.stats.leg_failures if frontend.stats is not None else ():
            failures[failed.worker_id] = failures.get(failed.worker_id, 0) + failed.count
    return failures
