"""Composition root of the prefill worker: the shared life of a worker with the prefill call on it."""

from __future__ import annotations

from functools import partial

from tandem.api.prefill.v1.prefill_service_pb2_grpc import add_PrefillServiceServicer_to_server
from tandem.engine.port import Engine
from tandem.model.worker import Worker, WorkerRole
from tandem.rpc.server import AddServicer
from tandem.worker.host import WorkerHost
from tandem.worker.legs import Legs
from tandem_prefill.config import PrefillConfig
from tandem_prefill.prefill import Prefill
from tandem_prefill.servicer import SERVICE_NAME, PrefillServicer


def build(config: PrefillConfig) -> WorkerHost:
    """The worker as `tandem.runtime.process` runs it; nothing is opened yet."""
    return WorkerHost(config, WorkerRole.PREFILL, _role_service)


def _role_service(engine: Engine, legs: Legs, worker: Worker) -> tuple[str, AddServicer]:
    servicer = PrefillServicer(Prefill(legs, worker), worker)
    return SERVICE_NAME, partial(add_PrefillServiceServicer_to_server, servicer)
