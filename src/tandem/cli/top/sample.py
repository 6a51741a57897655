"""What `tandem top` knows of the fleet at one moment, as values.

Owns the arithmetic of rates and totals; asks nobody.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.api.admin.v1 import admin_service_pb2 as admin_pb
from tandem.api.types.v1 import worker_pb2
from tandem.api.worker.v1 import worker_service_pb2 as worker_pb
from tandem.rpc.convert import seconds

SERVING, DRAINING, UNREACHABLE, GONE = "serving", "draining", "unreachable", "gone"
"""States: what the registry says; or it lists the process, which does not answer; or it lists it no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSample:
    """One start of a worker."""

    name: str
    role: str
    epoch: int
    address: str
    state: str
    health: str
    """What its own grpc.health.v1 says: "ok", "not serving", or "-" where it says nothing."""
    load: worker_pb.WatchLoadResponse | None = None
    """Its last word; None: it does not answer."""
    before: worker_pb.WatchLoadResponse | None = None
    """The one before that, of the same epoch."""
    failures: int = 0
    """Legs that broke on it, as the frontends count them over all its starts."""

    def rate(self, counter: str) -> float | None:
        """How much a second a counter of its load grows; None: not known."""
        if self.load is None or self.before is None or not self.load.HasField(counter):  # type: ignore[arg-type]
            return None
        took_s = seconds(self.load.measured_time) - seconds(self.before.measured_time)
        grown = int(getattr(self.load, counter)) - int(getattr(self.before, counter))
        return grown / took_s if took_s > 0 and grown >= 0 else None

    @property
    def tokens_per_s(self) -> float | None:
        """Of a prefill worker the tokens of prompts, of the others those they have told."""
        return self.rate("prompt_tokens" if self.role == "prefill" else "completion_tokens")

    @property
    def transfer_bytes_per_s(self) -> float | None:
        """KV sent or received."""
        return self.rate("kv_transfer_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendSample:
    """One start of a frontend."""

    name: str
    epoch: int
    address: str
    state: str
    health: str
    figures: admin_pb.WatchFiguresResponse | None = None
    """Its last word; None: it does not answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The fleet."""

    time_s: float
    """Since the Unix epoch."""
    workers: tuple[WorkerSample, ...] = ()
    frontends: tuple[FrontendSample, ...] = ()
    registry_problem: str | None = None
    """Why the fleet may have changed since; None: a registry answers."""
    missing: tuple[str, ...] = field(default=())
    """Who has not said anything yet."""

    def total(self, name: str) -> int:
        """A figure of the frontends, added up."""
        return sum(int(getattr(f.figures, name)) for f in self.frontends if f.figures is not None)

    def rate(self, name: str) -> float:
        """A rate of the frontends, added up."""
        return sum(float(getattr(f.figures, name)) for f in self.frontends if f.figures is not None)


def role_name(number: worker_pb2.WorkerRole.ValueType) -> str:
    """Name of a role."""
    return worker_pb2.WorkerRole.Name(number).removeprefix("WORKER_ROLE_").lower()


def state_name(number: worker_pb2.WorkerState.ValueType) -> str:
    """Name of a state."""
    return worker_pb2.WorkerState.Name(number).removeprefix("WORKER_STATE_").lower()
