"""The view and its changes as messages of registry_service.proto.

Pure translation. A snapshot is the same for every watcher at one revision: the last one is cached, because after a
reconnect all frontends ask for it at the same time.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import duration_pb2

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.domain.frontend import Frontend, Member
from tandem.domain.worker import Worker
from tandem.rpc.convert import frontend_to_proto, timestamp, worker_to_proto
from tandem_registry.view import Change, Health, Listed, Origin, RemovalReason, View

REMOVAL_REASONS = {
    RemovalReason.DEREGISTERED: pb.REMOVAL_REASON_DEREGISTERED,
    RemovalReason.LEASE_EXPIRED: pb.REMOVAL_REASON_LEASE_EXPIRED,
    RemovalReason.REPLACED: pb.REMOVAL_REASON_REPLACED,
}
HEALTHS = {
    Health.UNKNOWN: pb.LISTED_HEALTH_UNSPECIFIED,
    Health.PASSING: pb.LISTED_HEALTH_PASSING,
    Health.CRITICAL: pb.LISTED_HEALTH_CRITICAL,
}


def serves(member: Member, model: str | None) -> bool:
    """Whether a member serves that model; None: any model."""
    own = member.capabilities.model if isinstance(member, Worker) else member.model
    return model is None or own == model


class Snapshots:
    """Snapshots of the view, with the last one cached."""

    def __init__(self) -> None:
        self._key: tuple[str, int, str | None] | None = None
        self._message = pb.WatchResponse()

    def message(self, view: View, model: str | None) -> pb.WatchResponse:
        """The first message of a watch."""
        key = (view.registry_id, view.revision, model)
        if key != self._key:
            workers = [worker_to_proto(entry.member) for entry in view.workers if serves(entry.member, model)]
            self._message = pb.WatchResponse(
                registry_id=view.registry_id, revision=view.revision, snapshot=pb.ViewSnapshot(workers=workers)
            )
            self._key = key
        return self._message


def is_of_workers(change: Change) -> bool:
    """Whether a change contains workers."""
    members = [*change.upserted, *(removed.member for removed in change.removed)]
    return any(isinstance(member, Worker) for member in members)


def delta(registry_id: str, previous_revision: int, change: Change, model: str | None) -> pb.WatchResponse:
    """A later message of a watch. A change to other models only is an empty delta, so that no revision is skipped."""
    upserted = [
        worker_to_proto(member) for member in change.upserted if isinstance(member, Worker) and serves(member, model)
    ]
    removed = [
        pb.RemovedWorker(worker_id=gone.member.worker_id, epoch=gone.member.epoch, reason=REMOVAL_REASONS[gone.reason])
        for gone in change.removed
        if isinstance(gone.member, Worker) and serves(gone.member, model)
    ]
    return pb.WatchResponse(
        registry_id=registry_id,
        revision=change.revision,
        delta=pb.ViewDelta(upserted=upserted, removed=removed),
        previous_revision=previous_revision,
    )


class FrontendList:
    """The frontend list as last sent to one watcher."""

    def __init__(self, view: View, model: str | None) -> None:
        self._model = model
        self._frontends: dict[str, Frontend] = {}
        self._begin(view)

    def apply(self, step: Change | View) -> bool:
        """Apply one change; returns whether the list must be sent again."""
        if isinstance(step, View):
            self._begin(step)
            return True
        before = dict(self._frontends)
        self._revision = step.revision
        for removed in step.removed:
            if isinstance(removed.member, Frontend):
                self._frontends.pop(removed.member.frontend_id, None)
        for member in step.upserted:
            if isinstance(member, Frontend) and serves(member, self._model):
                self._frontends[member.frontend_id] = member
        return self._frontends != before

    def message(self) -> pb.WatchFrontendsResponse:
        """The whole list, ordered by id."""
        frontends = [frontend_to_proto(frontend) for _, frontend in sorted(self._frontends.items())]
        return pb.WatchFrontendsResponse(registry_id=self._registry_id, revision=self._revision, frontends=frontends)

    def _begin(self, view: View) -> None:
        self._registry_id, self._revision = view.registry_id, view.revision
        listed = (entry.member for entry in view.frontends)
        self._frontends = {member.frontend_id: member for member in listed if serves(member, self._model)}


def listing(replica_id: str, origin: Origin, view: View, model: str | None) -> pb.ListResponse:
    """The whole view with the state of each lease."""
    return pb.ListResponse(
        registry_id=view.registry_id,
        revision=view.revision,
        workers=[
            pb.ListedWorker(worker=worker_to_proto(entry.member), **_lease(entry))
            for entry in view.workers
            if serves(entry.member, model)
        ],
        frontends=[
            pb.ListedFrontend(frontend=frontend_to_proto(entry.member), **_lease(entry))
            for entry in view.frontends
            if serves(entry.member, model)
        ],
        replica_id=replica_id,
        source=pb.VIEW_SOURCE_LIVE if origin.is_live else pb.VIEW_SOURCE_LAST_KNOWN,
        source_since=timestamp(origin.since_s),
    )


def _lease(entry: Listed[Worker] | Listed[Frontend]) -> dict[str, Any]:
    age = None if entry.lease_age_s is None else duration(entry.lease_age_s)
    return {"lease_age": age, "lease_keeper": entry.owner, "health": HEALTHS[entry.health]}


def duration(seconds: float) -> duration_pb2.Duration:
    """Seconds as a protobuf Duration."""
    message = duration_pb2.Duration()
    message.FromNanoseconds(int(seconds * 1e9))
    return message
