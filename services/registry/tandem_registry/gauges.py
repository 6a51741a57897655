"""The registry's gauges: members by role and state, lease ages, and how far the view is behind Consul.

Reads only. Lease age is the only metric with the worker id as an attribute, so ids beyond WORKERS_MAX are folded into
one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from tandem.domain.worker import WorkerState
from tandem.errors import ServiceError
from tandem.observability.metric_attributes import MEMBER_ROLE, OTHER, WORKERS_MAX
from tandem.observability.metrics import Reading
from tandem_registry.backends.port import Backend
from tandem_registry.view import View


class RegistryGauges:
    """Gauge readings of one registry."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def read(self) -> Iterable[Reading]:
        """The current value of every gauge."""
        backend = self._backend
        readings = [
            Reading("tandem.watchers", backend.watcher_count),
            Reading("tandem.lease.ttl", backend.ttl_s),
            Reading("tandem.view.live", float(backend.origin.is_live)),
        ]
        if (lag := backend.lag) is not None:
            readings.append(Reading("tandem.consul.answer.age", lag.response_age_s))
            readings.append(Reading("tandem.consul.index_lag", lag.index_lag))
        try:
            view = await backend.view()
        except ServiceError:
            # No view: Consul has not responded yet, or the backend is closed.
            return readings
        return [*readings, *_members(view), *_ages(view)]


def _members(view: View) -> Iterator[Reading]:
    counts = Counter((listed.member.role.value, listed.member.state.value) for listed in view.workers)
    counts.update(("frontend", listed.member.state.value) for listed in view.frontends)
    for role in MEMBER_ROLE.values:
        for state in WorkerState:
            attributes = {"tandem.role": role, "tandem.state": state.value}
            yield Reading("tandem.members", counts[role, state.value], attributes)


def _ages(view: View) -> Iterator[Reading]:
    ages = [(listed.member.worker_id, listed.lease_age_s) for listed in view.workers if listed.lease_age_s is not None]
    for worker_id, age_s in ages[:WORKERS_MAX]:
        yield Reading("tandem.lease.age", age_s, {"tandem.worker.id": worker_id})
    if len(ages) > WORKERS_MAX:
        yield Reading("tandem.lease.age", max(age_s for _, age_s in ages[WORKERS_MAX:]), {"tandem.worker.id": OTHER})
