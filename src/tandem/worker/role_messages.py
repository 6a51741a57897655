"""Messages of role changes: the fields of a request, checked, and one step of the progress."""

from __future__ import annotations

from google.protobuf import duration_pb2

from tandem.api.types.v1 import role_change_pb2 as pb
from tandem.api.types.v1 import worker_pb2
from tandem.api.worker.v1 import worker_service_pb2
from tandem.domain.worker import WorkerRole
from tandem.errors import InvalidRequest
from tandem.rpc.convert import ROLE_BY_NUMBER, worker_to_proto
from tandem.worker.role_progress import Stage, Step

STAGES = {
    Stage.DRAINING: pb.ROLE_CHANGE_STAGE_DRAINING,
    Stage.SWITCHING: pb.ROLE_CHANGE_STAGE_SWITCHING,
    Stage.REGISTERING: pb.ROLE_CHANGE_STAGE_REGISTERING,
    Stage.DONE: pb.ROLE_CHANGE_STAGE_DONE,
}


def checked_role(number: worker_pb2.WorkerRole.ValueType) -> WorkerRole:
    """The role of a request.

    Raises:
        InvalidRequest: it is not set, or none that this release knows.
    """
    role = ROLE_BY_NUMBER.get(number)
    if role is None:
        raise InvalidRequest("role", "must be PREFILL, DECODE or AGGREGATED")
    return role


def checked_timeout(request: worker_service_pb2.ChangeRoleRequest) -> float | None:
    """Seconds that open legs may take; None: the worker's setting.

    Raises:
        InvalidRequest: it is negative.
    """
    if not request.HasField("drain_timeout"):
        return None
    seconds = request.drain_timeout.ToNanoseconds() / 1e9
    if seconds < 0:
        raise InvalidRequest("drain_timeout", f"must be at least 0 s, not {seconds:g} s")
    return seconds


def change_to_proto(step: Step) -> pb.RoleChange:
    """One step of the progress."""
    message = pb.RoleChange(stage=STAGES[step.stage], open_legs=step.open_legs, in_place=step.in_place)
    if step.worker is not None:
        message.worker.CopyFrom(worker_to_proto(step.worker))
    if step.switch_s is not None:
        switch_time = duration_pb2.Duration()
        switch_time.FromNanoseconds(int(step.switch_s * 1e9))
        message.switch_time.CopyFrom(switch_time)
    return message
