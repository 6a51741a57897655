"""Composition root of the decode worker: the shared life of a worker with the decode calls on it."""

from __future__ import annotations

from functools import partial

from tandem.api.decode.v1.decode_service_pb2 import DESCRIPTOR as FORMER
from tandem.api.decode.v1.decode_service_pb2_grpc import add_DecodeServiceServicer_to_server as add_former
from tandem.api.decode.v2.decode_service_pb2_grpc import add_DecodeServiceServicer_to_server
from tandem.domain.worker import Worker
from tandem.rpc.server import AddServicer
from tandem.worker.app import WorkerHost
from tandem.worker.leg_starts import LegStarts
from tandem.worker.legs import Legs
from tandem.worker.roles.decode import Decode
from tandem.worker.step_servicer import FormerDecodeServicer
from tandem.worker.steps import StepStreams
from tandem_decode.config import DecodeConfig
from tandem_decode.servicer import SERVICE_NAME, DecodeServicer

FORMER_NAME = FORMER.services_by_name["DecodeService"].full_name


def build(config: DecodeConfig) -> WorkerHost:
    """The worker as `tandem.service.process` runs it; nothing is opened yet."""
    return WorkerHost(config, config.worker_role, _role_services)


def _role_services(legs: Legs, streams: StepStreams, worker: Worker) -> list[tuple[str, AddServicer]]:
    servicer = DecodeServicer(LegStarts(legs, streams, Decode(worker)))
    return [
        (SERVICE_NAME, partial(add_DecodeServiceServicer_to_server, servicer)),
        (FORMER_NAME, partial(add_former, FormerDecodeServicer(legs))),
    ]
