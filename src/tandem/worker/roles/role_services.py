"""The gRPC services of all roles: a worker serves all of them, and its role says which may be called."""

from __future__ import annotations

from collections.abc import Callable

from tandem.domain.worker import Worker, WorkerRole
from tandem.rpc.server import AddServicer
from tandem.worker.legs import Legs
from tandem.worker.roles import decode, prefill
from tandem.worker.steps import StepStreams


def every_service(legs: Legs, streams: StepStreams, current: Callable[[], Worker]) -> list[tuple[str, AddServicer]]:
    """(full name, function that adds the servicer to a server) of each; `current` is the worker with its role."""
    return [*prefill.services(legs, streams, current), *decode.services(legs, streams, current)]


def idle_services(role: WorkerRole) -> tuple[str, ...]:
    """Names of the services that reject every leg in a role."""
    return decode.SERVICE_NAMES if role is WorkerRole.PREFILL else prefill.SERVICE_NAMES
