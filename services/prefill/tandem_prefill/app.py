"""Composition root of the prefill worker: the shared life of a worker with the prefill calls on it."""

from __future__ import annotations

from functools import partial

from tandem.api.prefill.v1.prefill_service_pb2 import DESCRIPTOR as FORMER
from tandem.api.prefill.v1.prefill_service_pb2_grpc import add_PrefillServiceServicer_to_server as add_former
from tandem.api.prefill.v2.prefill_service_pb2_grpc import add_PrefillServiceServicer_to_server
from tandem.domain.worker import Worker, WorkerRole
from tandem.rpc.server import AddServicer
from tandem.worker.app import WorkerHost
from tandem.worker.leg_starts import LegStarts
from tandem.worker.legs import Legs
from tandem.worker.roles.prefill import Prefill
from tandem.worker.step_servicer import FormerPrefillServicer
from tandem.worker.steps import StepStreams
from tandem_prefill.config import PrefillConfig
from tandem_prefill.servicer import SERVICE_NAME, PrefillServicer

FORMER_NAME = FORMER.services_by_name["PrefillService"].full_name


def build(config: PrefillConfig) -> WorkerHost:
    """The worker as `tandem.service.process` runs it; nothing is opened yet."""
    return WorkerHost(config, WorkerRole.PREFILL, _role_services)


def _role_services(legs: Legs, streams: StepStreams, worker: Worker) -> list[tuple[str, AddServicer]]:
    servicer = PrefillServicer(LegStarts(legs, streams, Prefill(worker)))
    return [
        (SERVICE_NAME, partial(add_PrefillServiceServicer_to_server, servicer)),
        (FORMER_NAME, partial(add_former, FormerPrefillServicer(legs))),
    ]
