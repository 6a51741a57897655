"""What the registry's gauges show: members by role and state, ages of leases, and how Consul is followed.

Reads only. Worker ids are attributes here and nowhere else, so many of them are folded into one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from tandem.domain.worker import WorkerState
from tandem.errors import ServiceError
from tandem.observability.metric_catalog import MEMBER_ROLE, OTHER, WORKERS_MAX
from tandem.observability.metrics import Reading
from tandem_registry.backends.port import Backend
from tandem_registry.view import View


class RegistryGauges:
    """Readings of one registry."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def read(self) -> Iterable[Reading]:
        """All of this moment."""
        backend = self._backend
        readings = [
            Reading("tandem.watchers", backend.watcher_count),
            Reading("tandem.lease.ttl", backend.ttl_s),
            Reading("tandem.view.live", float(backend.origin.is_live)),
        ]
        if (followed := backend.followed) is not None:
            readings.append(Reading("tandem.consul.answer.age", followed.answer_age_s))
            readings.append(Reading("tandem.consul.index_lag", followed.index_lag))
        try:
            view = await backend.view()
        except ServiceError:
            # There is no view yet, or none any more.
            return readings
        return [*readings, *_members(view), *_ages(view)]


def _members(view: View) -> Iterator[Reading]:
    counts = Counter((listed.member.role.value, listed.member.state.value) for listed in view.workers)
    counts.update(("frontend", listed.member.state.value) for listed in view.frontends)
    for role in MEMBER_ROLE.values:
        for state in WorkerState:
            about = {"tandem.role": role, "tandem.state": state.value}
            yield Reading("tandem.members", counts[role, state.value], about)


def _ages(view: View) -> Iterator[Reading]:
    ages = [(listed.member.worker_id, listed.lease_age_s) for listed in view.workers if listed.lease_age_s is not None]
    for worker_id, age_s in ages[:WORKERS_MAX]:
        yield Reading("tandem.lease.age", age_s, {"tandem.worker.id": worker_id})
    if len(ages) > WORKERS_MAX:
        yield Reading("tandem.lease.age", max(age_s for _, age_s in ages[WORKERS_MAX:]), {"tandem.worker.id": OTHER})
